"""Which run of a sampler a call is part of, at which step, and what is remembered until its end.

The step is read off the loop of the pipeline that is calling, by the place of its t in its list of
times, without asking the device; loops of one's own say it (`OwnRun.step`). A run is known by that
list, and a scheduler has one run at a time. What a run remembers goes with the last step's t, which
the pipeline's call holds; that of a run which was broken off, when its scheduler begins another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from shiva_dit.config import whole_number
from shiva_dit.methods.base import Need
from shiva_dit.models.clock import place_in
from shiva_dit.models.guidance import Pass, Passes, running_call


class Run:
    """One run of a sampler.

    Args:
        num_steps: How many steps it has.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.at = 0
        """The step of the last call."""
        self.is_guided = False
        """Whether calls have been passes of guidance."""
        self._memories: dict[Pass, dict[Any, Any]] = {}
        self._calls: dict[tuple[int, Pass], int] = {}
        self._guidance: dict[int, Tensor] = {}
        self._lead: tuple[int, Tensor] | None = None
        self._last: ref[Tensor] | None = None

    def until(self, t: Tensor, forget: Callable[[ref[Tensor]], None]) -> None:
        """Have it forgotten when the last step's t goes."""
        if self._last is None:
            self._last = ref(t, forget)

    def memory(self, which: Pass) -> dict[Any, Any]:
        """That of one pass."""
        return self._memories.setdefault(which, {})

    def calls(self, which: Pass) -> int:
        """How many calls of a pass this step has had so far, of those that `count` was told of."""
        return self._calls.get((self.at, which), 0)

    def count(self, which: Pass) -> None:
        """A call of a pass has come to its end."""
        self._calls = {key: number for key, number in self._calls.items() if key[0] == self.at}
        self._calls[self.at, which] = self.calls(which) + 1

    def guidance(self) -> Float[Tensor, "b N"] | None:
        """What the last step before this one has shown, if there was one."""
        return next((g for at, g in reversed(self._guidance.items()) if at < self.at), None)

    def show(self, guidance: Float[Tensor, "b N"]) -> None:
        """Remember how much guidance changes each token at this step."""
        older = [item for item in self._guidance.items() if item[0] < self.at]
        self._guidance = {**dict(older[-1:]), self.at: guidance}

    @torch.no_grad()
    def observe(
        self, which: Pass, prediction: Float[Tensor, "B C H W"], grid: tuple[int, int]
    ) -> None:
        """Take in a pass's prediction, of the latents' channels: two make a difference."""
        if which is Pass.BOTH:
            one, other = prediction.chunk(2)
        elif which is Pass.LEADS:
            self._lead = self.at, prediction.detach()
            return
        elif which is Pass.FOLLOWS and self._lead is not None and self._lead[0] == self.at:
            one, other = self._lead[1], prediction
            self._lead = None
        else:
            return
        size = (one.float() - other.float()).abs().mean(dim=1, keepdim=True)
        self.show(F.adaptive_avg_pool2d(size, grid).flatten(1))


class OwnRun:
    """A run of a loop of one's own. Made by `shiva_dit.steps`.

    Args:
        runs: Of the model that the loop calls.
        num_steps: Its steps.
    """

    def __init__(self, runs: Runs, num_steps: int) -> None:
        self.run, self._runs = Run(whole_number("num_steps", num_steps, least=1)), runs

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Within: the calls of this thread or task are of this step.

        A step before the last one begins the run anew.

        Args:
            index: From 0.

        Raises:
            ValueError: If the run hasn't this step.
        """
        if not 0 <= whole_number("step", index) < self.run.num_steps:
            raise ValueError(f"a run of {self.run.num_steps} steps has no step {index}.")
        if index < self.run.at:
            self.run = Run(self.run.num_steps)
        word = _Word(ref(self._runs), self.run, index)
        _WORDS.set((*_WORDS.get(), word))
        try:
            yield
        finally:
            _WORDS.set(tuple(w for w in _WORDS.get() if w is not word))


@dataclass(frozen=True, slots=True, eq=False)
class _Word:
    """What a loop has said of its calls."""

    runs: ref[Runs]
    run: Run
    step: int


_WORDS: ContextVar[tuple[_Word, ...]] = ContextVar("shiva_dit_steps", default=())


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of one call of a model."""

    which: Pass = Pass.ALONE
    run: Run | None = None

    def told(self) -> dict[str, Any]:
        """What reducers are told of it (`Where`)."""
        known: dict[str, Any] = {"is_both": self.which is Pass.BOTH}
        if self.run is not None:
            known |= {
                "step": self.run.at,
                "num_steps": self.run.num_steps,
                "memory": self.run.memory(self.which),
                "guidance": self.run.guidance(),
            }
        return known


class Runs:
    """The runs that call one model.

    Args:
        passes: Told which pass of guidance a call is.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self._runs: WeakKeyDictionary[Any, tuple[Tensor, Run]] = WeakKeyDictionary()
        """Of each scheduler, its list of times and the run."""

    def of_call(self, name: str, needs: Collection[Need], batch: int) -> Call:
        """What a reducer needs to know of the running call.

        Args:
            name: The reducer's, for errors.
            needs: What it needs to know.
            batch: Samples of the call.

        Raises:
            ValueError: If what it can't do without is not known.
        """
        if not needs:
            return Call()
        which = self.passes.of_call(batch)
        if which is Pass.BOTH and batch % 2:
            raise ValueError(f"a call of {batch} samples can't hold both passes of guidance.")
        if "steps" not in needs:
            return Call(which)
        run = self.current()
        if run is None:
            raise ValueError(
                f"{name} goes by the steps of a run, and nothing says which one this call is: let "
                "a pipeline of diffusers make it, or make it within step(i) of what "
                "shiva_dit.steps(model, num_steps) returns."
            )
        run.is_guided |= which is not Pass.ALONE
        if "guidance" in needs and not run.is_guided:
            raise ValueError(
                f"{name} goes by what guidance changes, and this call is of no guided run: pass a "
                "guidance_scale above 1 or, in a loop of your own, say which pass a call is by "
                "shiva_dit.guided."
            )
        return Call(which, run)

    def current(self) -> Run | None:
        """The run of the running call, at its step."""
        for word in reversed(_WORDS.get()):
            if word.runs() is self:
                word.run.at = word.step
                return word.run
        found = _listed()
        if found is None:
            return None
        scheduler, listed, step, t = found
        own, run = self._runs.get(scheduler, (None, None))
        if run is None or own is not listed or step < run.at:
            run = Run(len(listed))
            self._runs[scheduler] = listed, run
        run.at = step
        if step == run.num_steps - 1:
            run.until(t, partial(_forget, ref(self), ref(scheduler), ref(run)))
        return run

    def clear(self) -> None:
        """Forget all that pipelines have begun."""
        self.passes.reset()
        self._runs.clear()


def _forget(runs: ref[Runs], scheduler: ref[Any], run: ref[Run], t: ref[Tensor]) -> None:
    """A pipeline's call has let go of its last step: so is its run, unless there is a newer one."""
    del t
    here, key = runs(), scheduler()
    if here is not None and key is not None and here._runs.get(key, (None, None))[1] is run():
        here._runs.pop(key, None)


def _listed() -> tuple[Any, Tensor, int, Tensor] | None:
    """The running pipeline's scheduler, its times, the place of the current one, and that."""
    running = running_call()
    if running is None or not running.is_known:
        return None
    scope = running.scope
    owner = scope.get("components") if running.is_block else scope["self"]
    scheduler = getattr(owner, "scheduler", None)
    # Loops that count have a list of their own, a part of the scheduler's (image to image).
    own = scope.get("timesteps") if "i" in scope else None
    listed = getattr(scheduler, "timesteps", None) if own is None else own
    t = running.time
    if not isinstance(listed, Tensor) or t is None or not len(listed):
        return None
    step = place_in(t, listed)
    return (scheduler, listed, step, t) if 0 <= step < len(listed) else None
