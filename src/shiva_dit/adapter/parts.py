"""What the parts of an adapter's folder are to each other, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shiva_dit.config import check_types, finite_number
from shiva_dit.saved_folder import PART_NAME

Expert = Literal["high", "low"]
EXPERTS: tuple[Expert, Expert] = ("high", "low")
"""Of a pipeline's `transformer`, which takes the noisy steps, and of its `transformer_2`."""
MOST_PARTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouping:
    """What the parts of a folder are to each other; as it stands in its config."""

    kind: Literal["experts", "budgets"]
    """ "experts": of one pipeline's two transformers, "high" and "low"; "budgets": of one model at
    keep ratios of their own, such as "keep-0.3"."""
    first: str
    """Name of the part that has the folder's usual files."""
    boundary_ratio: float | None = None
    """Of experts: the time t in (0, 1) from which on the pipeline asks the high one, as in its
    config; None: not known."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.boundary_ratio is not None:
            finite_number("boundary_ratio", self.boundary_ratio)
            if not 0.0 < self.boundary_ratio < 1.0:
                raise ValueError(f"boundary_ratio must lie in (0, 1), got {self.boundary_ratio}.")

    def check_names(self, others: Mapping[str, object]) -> None:
        """Raise unless the names of all parts fit together.

        Args:
            others: The other parts, by name.

        Raises:
            ValueError: If a name is none, comes twice, or isn't of this kind.
        """
        names = [self.first, *others]
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(PART_NAME, name):
                raise ValueError(f"{name!r} is no name of a part: small letters, digits and -.")
        if len(set(names)) < len(names) or not 2 <= len(names) <= MOST_PARTS:
            raise ValueError(f"2 to {MOST_PARTS} parts of different names, got {', '.join(names)}.")
        if self.kind == "experts" and names != list(EXPERTS):
            raise ValueError(f"experts are {' and '.join(EXPERTS)}, got {', '.join(names)}.")

    def place(self, name: str) -> tuple[int, str]:
        """What parts are sorted by: a config's keys are sorted by letter."""
        return (EXPERTS.index(name) if self.kind == "experts" else 0, name)  # type: ignore[arg-type]


def budget_name(keep_ratio: float) -> str:
    """What the part for a keep ratio is called.

    >>> budget_name(0.3)
    'keep-0.3'
    """
    return f"keep-{keep_ratio:g}"
