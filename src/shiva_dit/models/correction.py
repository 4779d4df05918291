"""Whole steps: what a pruned model is off by there is added to what it predicts in later steps.

In a few steps of a run the unpruned model predicts as well. Its prediction is taken, and what the
pruned one's lacks of it is remembered: errors change slower than predictions do. (Defect correction
of numerical analysis, with the steps of a sampler as its iterations.)
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shiva_dit.config import finite_number, whole_number
from shiva_dit.models.block_hook import Uncopied
from shiva_dit.models.guidance import Pass
from shiva_dit.models.neighbours import (
    CORRECTION,
    below_offloading,
    forget_registries,
    reaches,
    refuse_caches,
    unregister,
)
from shiva_dit.models.runs import Run, Runs

HALF_LIFE = 0.25
"""The share of a run after which half of a correction is left: of 12 steps, three."""


@dataclass(frozen=True, slots=True)
class WholeSteps:
    """Which steps of a run are whole, and how long their corrections hold.

    Args:
        steps: How many: a run is cut into twice as many parts and one more, and every other
            boundary is whole (of 12 steps the 3rd and the 8th). Or which, from 0, whatever number
            of steps a run has.
        half_life: The share of a run's steps after which half of a correction is left, above 0;
            `math.inf`: it holds until the next whole step.

    Raises:
        ValueError: If one of these lies outside that.
    """

    steps: int | tuple[int, ...]
    half_life: float = HALF_LIFE

    def __post_init__(self) -> None:
        if isinstance(self.steps, tuple):
            for step in self.steps:
                whole_number("whole_steps", step, least=0)
        else:
            whole_number("whole_steps", self.steps, least=0)
        if self.half_life != math.inf:
            finite_number("half_life", self.half_life)
        if not self.half_life > 0.0:
            raise ValueError(f"half_life must be above 0, got {self.half_life}.")

    def of(self, num_steps: int) -> tuple[int, ...]:
        """The whole steps of a run, in order.

        >>> WholeSteps(2).of(12), WholeSteps(1).of(8), WholeSteps(9).of(3)
        ((2, 7), (3,), (0, 1, 2))
        """
        if isinstance(self.steps, tuple):
            return tuple(sorted({step for step in self.steps if step < num_steps}))
        if self.steps >= num_steps:
            return tuple(range(num_steps))
        parts = 2 * self.steps + 1
        at = {(2 * num_steps * (2 * i + 1) + parts) // (2 * parts) for i in range(self.steps)}
        return tuple(sorted(at))

    def unread(self, num_steps: int) -> tuple[int, ...]:
        """Those before another one, or last: the pruned model needn't run for them.

        >>> WholeSteps((1, 2, 5, 7)).unread(8)
        (1, 7)
        """
        whole = self.of(num_steps)
        return tuple(step for step in whole if step + 1 in (*whole, num_steps))

    def left(self, since: int, num_steps: int) -> float:
        """What is left of a correction in a step.

        Args:
            since: Steps since the whole one, at least 1.
            num_steps: Of the run.

        >>> WholeSteps(1, half_life=0.25).left(3, 8)
        0.5
        """
        return 0.5 ** ((since - 1) / num_steps / self.half_life)


@runtime_checkable
class Owner(Protocol):
    """What is on the model: an attachment or a reduction."""

    model: nn.Module
    runs: Runs

    def running_pass(self) -> Pass | None:
        """Which pass the running forward is; None if it is the unpruned model's."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within, in a forward: the unpruned model, with its own weights.

        Raises:
            ValueError: If gradients are asked for that would be another model's.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Defect:
    """What the pruned model lacked at a whole step."""

    step: int
    off: tuple[Tensor, ...]
    """By tensor that the model returns."""


class Correction(Uncopied, ModelHook):
    """Stands in the place of a model's forward; see the module.

    Args:
        owner: What is on the model.
        whole: Which steps are whole.
    """

    def __init__(self, owner: Owner, whole: WholeSteps) -> None:
        super().__init__()
        self.owner, self.whole = owner, whole

    def put_on(self) -> None:
        """Put it on, outside of all else of diffusers' that replaces the model's forward."""
        registry = HookRegistry.check_if_exists_or_initialize(self.owner.model)
        with below_offloading(self.owner.model):
            registry.register_hook(self, CORRECTION)

    def check(self) -> None:
        """See that the model's forward still leads here.

        Raises:
            RuntimeError: If it was replaced.
        """
        if not reaches(self.owner.model.__dict__.get("forward"), self):
            raise RuntimeError(
                "whole steps no longer act: the model's forward was replaced, or put back by "
                "something that was on the model before. Call shiva_dit.correct again."
            )

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The pruned forward and its correction; at whole steps, the unpruned one."""
        forward = self.fn_ref.original_forward
        assert forward is not None
        which = self.owner.running_pass()
        if which is None:
            return forward(*args, **kwargs)
        run = self._run()
        key, memory = (CORRECTION, run.calls(which)), run.memory(which)
        if run.at in self.whole.of(run.num_steps):
            output = self._whole(module, partial(forward, *args, **kwargs), memory, key, run)
        else:
            output = self._corrected(forward(*args, **kwargs), memory.get(key), run)
        run.count(which)
        if run.at + 1 == run.num_steps:  # some pipelines keep a run's last t, and it, for ever
            memory.pop(key, None)
        return output

    def _whole(
        self,
        module: nn.Module,
        forward: partial[Any],
        memory: dict[Any, Any],
        key: object,
        run: Run,
    ) -> Any:
        """The unpruned model's prediction; what the pruned one's lacks is remembered."""
        refuse_caches(module)
        memory.pop(key, None)
        lacking: Any = None
        if run.at not in self.whole.unread(run.num_steps):
            # Some models take what they are given from its lists.
            args, kwargs = tree_map(lambda leaf: leaf, (forward.args, forward.keywords))
            lacking = forward.func(*args, **kwargs)
        with self.owner.whole():
            output = forward()
        if lacking is not None:
            pairs = zip(tensors_of(output), tensors_of(lacking), strict=True)
            memory[key] = _Defect(run.at, tuple((one - two).detach() for one, two in pairs))
        return output

    def _run(self) -> Run:
        run = self.owner.runs.current()
        if run is None:
            raise ValueError(
                "whole steps go by the steps of a run, and nothing says which one this call is: "
                "let a pipeline of diffusers make it, or make it within step(i) of what "
                "shiva_dit.steps(model, num_steps) returns."
            )
        return run

    def _corrected(self, output: Any, defect: _Defect | None, run: Run) -> Any:
        """A prediction with what is left of a correction."""
        if defect is None:
            return output
        left = self.whole.left(run.at - defect.step, run.num_steps)
        found = tensors_of(output)
        if [value.shape for value in found] != [off.shape for off in defect.off]:
            raise ValueError(
                f"the model gave {[tuple(v.shape) for v in found]}, and "
                f"{[tuple(off.shape) for off in defect.off]} at the whole step {defect.step} of "
                "this run: whole steps need the same samples in every step."
            )
        off = iter(defect.off)
        return tree_map(partial(_plus, left, off), output)


def _plus(left: float, off: Any, value: Any) -> Any:
    return value + left * next(off) if isinstance(value, Tensor) else value


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors that a model returned, in order."""
    found: list[Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, output)
    return found


def put_correction_on(owner: Owner, whole: WholeSteps | None) -> None:
    """Put one on in the place of an earlier one; None: take that off."""
    take_correction_off(owner.model)
    if whole is not None:
        Correction(owner, whole).put_on()
    forget_registries(owner.model)


def take_correction_off(model: nn.Module) -> None:
    """Take off what `put_correction_on` has put on, if anything."""
    if correction_of(model) is not None:
        unregister(model, CORRECTION)


def correction_of(model: nn.Module) -> Correction | None:
    """The correction on a model, or None."""
    registry = model.__dict__.get("_diffusers_hook")
    found = None if registry is None else registry.get_hook(CORRECTION)
    return found if isinstance(found, Correction) else None
