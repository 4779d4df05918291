"""What is asked of a class beside other software, and how a cell tells what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import shiva_dit
from shiva_dit.models.attach import attachment_of
from tests import families
from tests.matrix import BESIDE, SOFTWARE
from tests.test_composition import adapter

STEPS = 6
Note = Callable[[str, object], None]


def tell(note: Note, software: str, family: str, status: str) -> None:
    """Put into the record what became of a class beside some software.

    Args:
        note: pytest's `record_property`.
        software: Its name, as `SOFTWARE` in `tests/matrix.py` has it.
        family: The model.
        status: "works", "structure" (so did a stand-in for it), "refused" (by us, in a line), "no
            effect" (it finds nothing to act on in this class), "not offered" (it isn't for this
            class), or "fails bare" (it takes the class, and fails with or without an adapter).
    """
    assert software in SOFTWARE
    note(BESIDE, [software, type(families.FAMILIES[family].build()).__name__, family, status])


def times(model: Any, family: str, steps: int = STEPS) -> list[Tensor]:
    """Outputs of a model over the steps of one sampling, as conditional passes in one context."""
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            t = 1.0 - step / steps
            position = {"step_index": step, "sigma": t, "num_inference_steps": steps}
            given = families.arguments(family, t=t)
            if not hasattr(model, "cache_context"):
                outputs.append(families.run(model, given))
                continue
            with model.cache_context("cond", **position):
                outputs.append(families.run(model, given))
    return outputs


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all steps agree to the bit."""
    return all(map(torch.equal, found, expected))


def blocks_run(model: Any, run: Callable[[], list[Tensor]]) -> tuple[int, list[Tensor]]:
    """How often a block chose tokens during a run, and what the run gave."""
    attachment = attachment_of(model)
    assert attachment is not None
    chosen: list[int] = []
    attachment.forwards.observer = lambda block, tokens: chosen.append(block)
    outputs = run()
    attachment.forwards.observer = None
    return len(chosen), outputs


class Plain:
    """A model's steps bare and with an adapter, nothing else on it; and its adapter."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model: Any = families.made(family)
        self.adapter = adapter(self.model, "frozen", family)
        self.bare = times(self.model, family)
        shiva_dit.apply(self.model, self.adapter)
        self.blocks, self.pruned = blocks_run(self.model, lambda: times(self.model, family))
        assert self.blocks
        assert not equal(self.pruned, self.bare)
