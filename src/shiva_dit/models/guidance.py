"""How the running call of a model is guided: told by the caller, a guider or a pipeline.

Guidance makes a conditional and an unconditional pass, in one batch or one call after the other,
and both shall keep the same tokens. Which pass a call is cannot be seen from its tensors, so it is
asked of whoever makes the call, anew each time: in this order of `shiva_dit.guided`, of
`cache_context`, of the guider of a modular pipeline, and of the variables of the pipeline's running
`__call__`. What nobody says isn't shared.

What is said and left belongs to the thread whose calls it is about: others that serve on the same
model, one call at a time, don't see it. None of it is read inside of a compiled graph.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import Any
from weakref import ref

import torch
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from shiva_dit.core.selection import Share
from shiva_dit.models.pipelines import PIPELINES, Guided

logger = logging.getLogger("shiva_dit")
IDENTIFIER = "__guidance_identifier__"
"""What guiders of diffusers write into each pass's batch: "pred_cond", "pred_uncond", others."""


class Pass(Enum):
    """Which pass of guidance a call is."""

    LEADS = "cond"
    """The conditional one of two in turn: the other keeps its tokens."""
    FOLLOWS = "uncond"
    """The other one."""
    BOTH = "both"
    """Both in one batch, in halves that keep the tokens that either wants."""
    PAIR = "pair"
    """Both in one batch, the second half leads: how training sees two that run in turn."""
    ALONE = "alone"
    """Any other: it chooses for itself."""

    @property
    def share(self) -> Share | None:
        """Which half of the batch decides, where both keep the same tokens."""
        if self is Pass.BOTH:
            return "either"
        return "second" if self is Pass.PAIR else None


@dataclass(frozen=True, slots=True)
class Lead:
    """What a conditional pass leaves for the unconditional one of the same step."""

    batch: int
    counts: tuple[Any, ...]
    """k of every block, and of its groups (`ForwardPlan.key`)."""
    chosen: dict[int, Tensor]
    """Tokens by block, each (B, k)."""
    step: ref[Tensor] | None
    """The step of the pipeline's call; None outside of pipelines."""


@dataclass(frozen=True, slots=True)
class Running:
    """The `__call__` of a pipeline, or of a block of a modular one, that is running."""

    name: str
    """Class that the code is of, if it's diffusers' own; else the object's."""
    is_known: bool
    """Whether the code is diffusers' own."""
    is_block: bool
    """Whether it is a block of a modular pipeline, whose passes its guider names."""
    scope: Mapping[str, Any]
    """Its variables."""

    @property
    def time(self) -> Tensor | None:
        """The current step's t, as its loop took it from the list of all."""
        t = self.scope.get("t", self.scope.get("t_sched"))  # as ACE-Step's loop calls it
        return t if isinstance(t, Tensor) else None

    @property
    def step(self) -> ref[Tensor] | None:
        """The current step: the tensor t that its loop made for this step of this call alone."""
        return None if self.time is None else ref(self.time)

    @property
    def batch(self) -> Any:
        """What a guider has prepared for the running pass; None without one."""
        found = [value for value in self.scope.values() if type(value).__name__ == "BlockState"]
        found = [value for value in found if isinstance(getattr(value, IDENTIFIER, None), str)]
        return found[0] if len(found) == 1 else None

    def value(self, name: str) -> Any:
        """A variable of the call, or "self." a property of its pipeline.

        Raises:
            LookupError: If there is none.
        """
        name, _, bound = name.partition(" > ")
        of_pipeline = name.startswith("self.")
        name = name.removeprefix("self.")
        scope = self.scope
        value = getattr(scope["self"], name, None) if of_pipeline else scope.get(name)
        if value is None:
            raise LookupError(name)
        return value > float(bound) if bound else value


CALL = nn.Module._wrapped_call_impl.__code__
LIBRARIES = {"accelerate", "contextlib", "diffusers", "functools", "peft", "shiva_dit", "torch"}
"""Through whose code a pipeline reaches its model."""


def running_call() -> Running | None:
    """The pipeline's call that is calling the model: the innermost on this thread's stack, or None.

    A call from a user's code in between (a callback) is none of the pipeline's.
    """
    frame, is_outside, detour = sys._getframe(1), False, False
    while frame is not None:
        module, bases = str(frame.f_globals.get("__name__")), set()
        if frame.f_code.co_name == "__call__":
            bases = {base.__name__ for base in type(frame.f_locals.get("self")).__mro__}
        is_block = "ModularPipelineBlocks" in bases
        if is_block or "DiffusionPipeline" in bases:
            is_known = module.startswith("diffusers.")
            if is_known and detour:
                return None
            scope = frame.f_locals
            name = frame.f_code.co_qualname.removesuffix(".__call__")
            name = name if is_known else type(scope["self"]).__name__
            return Running(name, is_known, is_block, scope)
        detour |= is_outside and module.partition(".")[0] not in LIBRARIES
        is_outside |= frame.f_code is CALL  # of the model, from whose hook this is asked
        frame = frame.f_back
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Word:
    """What a caller has said of a model's calls."""

    passes: ref[Passes]
    which: Pass


_WORDS: ContextVar[tuple[_Word, ...]] = ContextVar("shiva_dit_guided", default=())
"""Of all models, the last one last. One variable for all: those that are made are never freed."""


class _OfThread(threading.local):
    """What the calls of one thread have said and left."""

    name: str | None = None
    """Of the running pass, by `cache_context`."""
    lead: Lead | None = None
    step: ref[Tensor] | None = None
    """That of the last call."""
    calls: int = 0
    """Calls in that step so far."""


class Passes(StateManager):
    """Which pass of guidance runs, and what the conditional one has left for the other.

    diffusers tells every stateful hook's managers the context of `model.cache_context(name)`.
    """

    def __init__(self) -> None:
        super().__init__(BaseState)  # type: ignore[arg-type]
        self._here = _OfThread()
        self._said: set[str] = set()

    @property
    def lead(self) -> Lead | None:
        """What this thread's last conditional pass has left."""
        return self._here.lead

    def set_context(self, context: Any) -> None:
        """Take the name of the running pass: "cond" and "uncond" among others; None ends it."""
        self._here.name = context and context.name.removeprefix("pred_")

    @contextmanager
    def told(self, which: Pass) -> Iterator[None]:
        """Within: every call is this pass, whatever runs it; for this thread or task alone."""
        word = _Word(ref(self), which)
        _WORDS.set((*_WORDS.get(), word))
        try:
            yield
        finally:
            _WORDS.set(tuple(w for w in _WORDS.get() if w is not word))

    @property
    def _word(self) -> Pass | None:
        return next((w.which for w in reversed(_WORDS.get()) if w.passes() is self), None)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget pass and lead."""
        super().reset(*args, **kwargs)
        self._here.name = self._here.lead = None

    @torch.compiler.disable()
    def of_call(self, batch: int) -> Pass:
        """Which pass the running call is.

        Args:
            batch: Samples of the call.

        Raises:
            ValueError: If the batch holds more passes than two.
        """
        running = running_call()
        step, here = None if running is None else running.step, self._here
        here.calls = here.calls + 1 if same_step(step, here.step) else 1
        here.step = step
        if running and getattr(running.scope["self"], "do_perturbed_attention_guidance", False):
            raise ValueError(
                f"perturbed-attention guidance puts a further pass into {running.name}'s batch, "
                "which its halves can't share their tokens with: pass pag_scale=0, or call "
                "shiva_dit.remove."
            )
        word = self._word
        if word is not None:
            return word
        if here.name in ("cond", "uncond"):
            return Pass(here.name)
        if running is None:
            self._say(
                "the model is called outside of a pipeline, and nothing says whether it is guided",
                logging.INFO,
            )
            return Pass.ALONE
        if running.batch is not None:
            name = getattr(running.batch, IDENTIFIER).removeprefix("pred_")
            return Pass(name) if name in ("cond", "uncond") else Pass.ALONE
        if running.is_block and running.is_known:  # no guider: a model with its guidance inside
            return Pass.ALONE
        guided = PIPELINES.get(running.name) if running.is_known else None
        if guided is None:
            self._say(f"{running.name} doesn't say which pass of guidance runs")
            return Pass.ALONE
        try:
            return self._by_pipeline(running, guided, batch)
        except LookupError as error:
            self._say(f"this version's {running.name} has no {error} to say whether it is guided")
            return Pass.ALONE

    def _by_pipeline(self, running: Running, guided: Guided, batch: int) -> Pass:
        if guided.on is None or not running.value(guided.on):
            return Pass.ALONE
        if guided.how == "in turn":
            if self._here.step is None:
                raise LookupError("t")
            first_two = {1: Pass.LEADS, 2: Pass.FOLLOWS}
            return first_two.get(self._here.calls, Pass.ALONE)
        images = len(running.value(guided.latents))
        if batch not in (images, 2 * images):
            self._say(f"{running.name} calls with {batch} samples for {images} images")
        # A further pass of one half (SD3's that skips layers) is no pair.
        return Pass.BOTH if batch == 2 * images else Pass.ALONE

    @torch.compiler.disable()
    def keep(self, counts: tuple[Any, ...], chosen: dict[int, Tensor]) -> None:
        """What a conditional pass has chosen, for the unconditional one that follows."""
        batch = len(next(iter(chosen.values())))
        self._here.lead = Lead(batch, counts, chosen, self._here.step)

    @torch.compiler.disable()
    def led(self, which: Pass, batch: int, counts: tuple[Any, ...]) -> dict[int, Tensor]:
        """Tokens that the running pass takes over, by block; none where it leads or is alone.

        A lead serves once, and only a pass of the same step, of as many samples and tokens.
        """
        here = self._here
        lead, here.lead = here.lead, None
        if lead is None or which is not Pass.FOLLOWS:
            return {}
        fits = (lead.batch, lead.counts) == (batch, counts)
        both_outside = lead.step is None and here.step is None
        return lead.chosen if fits and (both_outside or same_step(lead.step, here.step)) else {}

    def _say(self, what: str, level: int = logging.WARNING) -> None:
        """Log once that nothing is shared, and how to tell."""
        if what not in self._said:
            self._said.add(what)
            logger.log(
                level,
                "shiva_dit: %s: each pass chooses its tokens for itself. "
                "shiva_dit.guided(model, passes=...) says it.",
                what,
            )


def same_step(one: ref[Tensor] | None, other: ref[Tensor] | None) -> bool:
    """Whether two steps are the same, and still going on."""
    step = None if one is None else one()
    return step is not None and other is not None and step is other()
