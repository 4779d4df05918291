"""Which adapter goes to which transformer of a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.adapter.parts import EXPERTS

logger = logging.getLogger("shiva_dit")
Source = ShivaAdapter | str | Path
NEAR = 1e-6
"""How far two boundaries may lie from each other and be one."""


def dealt(
    target: Any,
    models: Sequence[nn.Module],
    adapter: Source,
    transformer_2: Source | None,
    read: Callable[[str | Path], ShivaAdapter],
) -> list[ShivaAdapter]:
    """The adapters of the transformers, in order; fewer than these where some stay dense.

    Args:
        target: What the user passed.
        models: Its transformers.
        adapter: Of the first, or of both.
        transformer_2: Of the second.
        read: Reads a folder or a Hub id.

    Raises:
        ValueError: If an adapter has no transformer to go to, or was trained for the other one.
    """
    if transformer_2 is not None and len(models) == 1:
        raise ValueError(
            f"transformer_2 was passed, but {type(target).__name__} has one transformer alone: "
            "pass one adapter."
        )
    given = [adapter] if transformer_2 is None else [adapter, transformer_2]
    found = [one if isinstance(one, ShivaAdapter) else read(one) for one in given]
    both = [one for one in found if one.parts is not None and one.parts.grouping.kind == "experts"]
    if both:
        found = _of_both(target, models, both[0], len(given))
    if len(models) > 1:
        _check_places(target, found)
    if len(models) > len(found):
        logger.warning(
            "shiva_dit: the pipeline's second transformer stays dense: pass its adapter as "
            "apply(pipe, adapter, transformer_2=...), or one adapter for both "
            "(ShivaAdapter.of_experts)."
        )
    return found


def _of_both(
    target: Any, models: Sequence[nn.Module], adapter: ShivaAdapter, given: int
) -> list[ShivaAdapter]:
    """The parts of an adapter for two transformers."""
    if given > 1:
        raise ValueError(
            "the adapter is one for both transformers: leave transformer_2 out, or pass one part "
            'of it, adapter.part("high") or adapter.part("low").'
        )
    if len(models) == 1:
        raise ValueError(
            f"the adapter is one for two transformers, and {type(target).__name__} has one: pass "
            'the pipeline of both, or one part, adapter.part("high") or adapter.part("low").'
        )
    boundary = getattr(target, "config", {}).get("boundary_ratio")
    if boundary is None:
        raise ValueError(
            f"this {type(target).__name__} has no boundary_ratio, so its second transformer never "
            'runs: give it one, pipe.register_to_config(boundary_ratio=...), or apply "high" alone '
            'to pipe.transformer, adapter.part("high").'
        )
    assert adapter.parts is not None
    trained = adapter.parts.grouping.boundary_ratio
    if trained is not None and abs(trained - boundary) > NEAR:
        logger.warning(
            "shiva_dit: the adapters of both transformers were trained for boundary_ratio = %g, "
            "the pipeline has %g: in between each runs at times it was not trained for.",
            trained,
            boundary,
        )
    return [adapter.part(name) for name in EXPERTS]


def _check_places(target: Any, found: Sequence[ShivaAdapter]) -> None:
    """Raise unless each adapter that says which transformer it was trained for goes there."""
    names = ("the first (apply's adapter)", "the second (transformer_2=)")
    for place, (name, one) in enumerate(zip(EXPERTS, found, strict=False)):
        trained = one.trained_expert
        if trained is not None and trained[0] != name:
            raise ValueError(
                f"the adapter for {names[place]} transformer of this {type(target).__name__} was "
                f"trained for {trained[0]!r}, which is {names[1 - place]}."
            )
