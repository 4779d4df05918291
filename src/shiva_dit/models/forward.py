"""What runs around the blocks in each forward: before them, at the time embedder, and after.

The time is read once per forward and sets every block's k before the blocks run; what routers and
updates read beside tokens is computed when the model has embedded the time. Nothing is kept between
forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shiva_dit.core.roles import REFERENCE, num_of
from shiva_dit.methods.base import Selector
from shiva_dit.models.block_hook import BlockHook, Uncopied
from shiva_dit.models.block_state import DENSE, IDLE, BlockState
from shiva_dit.models.checkpointing import leave_snapshots, snapshots_are_on, take_snapshots
from shiva_dit.models.context_parallel import shards_of
from shiva_dit.models.counts import Counts
from shiva_dit.models.families import model_spec
from shiva_dit.models.gating import GatedForward
from shiva_dit.models.graphs import GraphRunner
from shiva_dit.models.guidance import Pass, Passes
from shiva_dit.models.plan import ForwardPlan
from shiva_dit.models.references import Spans
from shiva_dit.models.spec import bind, given
from shiva_dit.models.token_times import ONE, Layout, layout_of, num_times
from shiva_dit.models.turns import turns_of
from shiva_dit.models.undo import Undo
from shiva_dit.modules.context import time_features
from shiva_dit.modules.updates import RejectedUpdates


class Forwards(Uncopied):
    """Gives every block its state in each forward of one model. Its hooks are put on by others.

    Args:
        model: A supported transformer.
        blocks: Its blocks.
        hooks: What is on these.
        selector: Scores tokens.
        updates: What rejected tokens get; None: nothing.
        counts: How many tokens each block keeps.
        passes: Told by the pipeline which pass of guidance runs.
        is_pruned: Asked in each forward whether it is the dense one; raises where something on the
            model keeps it from being either.
        undo: Notes how what is put on the model later is taken off.
        freeze: Whether weights of selector and updates never change.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        hooks: Sequence[BlockHook],
        *,
        selector: Selector,
        updates: RejectedUpdates | None,
        counts: Counts,
        passes: Passes,
        is_pruned: Callable[[], bool],
        undo: Undo,
        freeze: bool,
    ) -> None:
        self.model, self.spec, self.hooks = model, model_spec(model), hooks
        self.selector, self.updates = selector, updates
        self.counts, self.passes = counts, passes
        self.turns = turns_of(model)
        self.always_select = False
        """Select, gather and scatter also where a block keeps all its tokens: what that costs."""
        self.observer: Callable[[int, Tensor], None] | None = None
        """Told each pruned block's index and the tokens chosen, (B, k); for maps and tests."""
        self.graphs: GraphRunner | None = None
        """Replays forwards, and then calls `read_context`."""
        self.num_tokens: int | None = None
        """N of the last forward."""
        self.num_references = 0
        """How many of these were references' with a budget of their own."""
        self.by_frame = False
        """Whether it was told a time for each frame or token."""
        self._is_pruned, self._undo = is_pruned, undo
        self._freezes = freeze
        self._frozen_for: torch.dtype | None = None
        self._gated: GatedForward | None = None
        self._held: tuple[tuple[int, ...], Pass] | None = None
        self._context: Tensor | None = None
        self._plan: ForwardPlan | None = None
        self._row: tuple[int, ...] = ()
        self._which = Pass.ALONE
        self.layout = ONE
        """How times differ among the tokens of a sample in the last forward."""
        self._times: slice = slice(None)
        """Rows of the running forward's time embedding, one for each time that it was given."""
        self._slots = {id(b): h.slot for b, h in zip(blocks, hooks, strict=True)}

    @property
    def learned(self) -> list[Selector | RejectedUpdates]:
        """What the adapter brings: selector and, where there are any, updates."""
        return [self.selector] if self.updates is None else [self.selector, self.updates]

    @contextmanager
    def gated(self, forward: GatedForward) -> Iterator[None]:
        """Within: forwards keep the given counts and carry gates (training)."""
        self._gated = forward
        try:
            yield
        finally:
            self._gated = None

    @contextmanager
    def held(self, counts: Sequence[int], which: Pass, layout: Layout) -> Iterator[None]:
        """Within: forwards keep these counts whatever the time, and ask nothing but their tensors.

        For tracing: what is on the model has been checked by a forward before.
        """
        self._held, self.layout = (tuple(counts), which), layout
        try:
            yield
        finally:
            self._held = None

    @property
    def running_counts(self) -> tuple[int, ...] | None:
        """What each block keeps in the running forward; None if it is the unpruned model's.

        Of the image's own tokens, where references have a budget of their own.
        """
        return None if self._plan is None else self._row

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks into the forwards, which a replay would not let them."""
        return self._gated is not None or self.observer is not None

    def running_pass(self) -> Pass | None:
        """Which pass the running forward is; None if it is the unpruned model's or in training."""
        return None if self._plan is None or self._gated is not None else self._which

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Within, in a forward: blocks run as they are."""
        states = [hook.slot.state for hook in self.hooks]
        plan, context = self._plan, self._context
        self._forget(DENSE)
        try:
            yield
        finally:
            self._plan, self._context = plan, context
            for hook, state in zip(self.hooks, states, strict=True):
                hook.slot.state = state

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Torch pre-hook on the model: how many tokens each block keeps in this forward."""
        self.turns.start_forward()
        # An interrupted forward (Ctrl-C) leaves its state: torch skips the hook.
        self._forget(DENSE)
        if self._held is None and not self._is_pruned():
            return
        arguments = bind(model, args, kwargs)
        sample = given(model, arguments, self.spec.sample)
        num_tokens = self.num_tokens = self.spec.tokens_of(model, arguments)
        timestep = given(model, arguments, self.spec.timestep)
        self.by_frame = num_times(timestep) > 1
        if self._held is None:
            self.layout = layout_of(model, self.spec, timestep, num_tokens)
        timestep = self._one_time(timestep, len(sample))
        spans = self._spans(arguments, num_tokens)
        self.num_references = num_of(spans, REFERENCE)
        targets = num_tokens - self.num_references
        counts, which = self._asked(targets, timestep, len(sample))
        self._row = tuple(counts)
        shards = shards_of(
            model,
            counts,
            num_tokens,
            timestep=given(model, arguments, self.spec.timestep),
            has_roles=bool(spans),
            learns=self._gated is not None,
        )
        self._settle(sample[0].dtype, sample[0].device)
        self._begin(counts, num_tokens, which, len(sample), spans)
        for index in () if shards is None or self._plan is None else self._plan.pruned:
            self.hooks[index].slot.state.shards = shards
        if self.graphs is None:
            self.read_context(args, kwargs)
        if torch.is_grad_enabled() and getattr(model, "gradient_checkpointing", False):
            self._snapshot_checkpoints(model)

    def _asked(self, num_tokens: int, timestep: Any, batch: int) -> tuple[Sequence[int], Pass]:
        """What each block keeps, and the pass: by training, who traces, or time and caller."""
        if self._gated is not None:
            self.counts.check(self._gated.counts, num_tokens)
            return self._gated.counts, self._gated.which
        if self._held is not None:
            return self._held
        counts, least = self.counts.row(num_tokens, timestep), self.spec.least_tokens
        if min(counts) < least:
            raise ValueError(
                f"blocks of {type(self.model).__name__} run on {least} tokens at least, and the "
                f"schedule keeps {min(counts)}: apply with multiple={least}."
            )
        return counts, self.passes.of_call(batch)

    def _spans(self, arguments: Mapping[str, Any], num_tokens: int) -> Spans:
        """The call's tokens by role, where references have a budget of their own."""
        references, cached = self.counts.references, self.spec.caches_references
        by_time = self.layout.spans(num_tokens)
        if by_time and references is None:
            raise ValueError(
                f"{type(self.model).__name__} was called with different times for the tokens of a "
                f"sample, {num_of(by_time, REFERENCE)} of {num_tokens} clean: give these a budget "
                "of their own, apply(..., reference_keep_ratio=1.0) to keep them all."
            )
        if references is not None:
            return by_time or references.spans(arguments)
        if cached is not None and arguments.get(cached) is not None:
            raise ValueError(
                f"{type(self.model).__name__} keeps keys of pictures to go by ({cached}), as many "
                "in every step: give their tokens a budget of their own, apply(..., "
                "reference_keep_ratio=), or use a pipeline that runs them along."
            )
        return ()

    def _begin(
        self, counts: Sequence[int], num_tokens: int, which: Pass, batch: int, spans: Spans
    ) -> None:
        """Give every block its state for this forward."""
        prunable = self.counts.prunable
        counts, groups = self.counts.by_role(counts, spans)
        gates = {} if self._gated is None else self._gated.made(prunable, groups)
        self._which = which
        mixtures = {} if self._gated is None else self._gated.mixtures
        selecting = [b in gates or b in mixtures for b in range(len(prunable))]
        selecting = prunable if self.always_select else selecting
        plan = self._plan = self.counts.plan(counts, num_tokens, selecting, groups)
        led = self.passes.led(which, batch, plan.key)
        states = plan.states(which, led, self.observer, gates)
        for hook, state in zip(self.hooks, states, strict=True):
            hook.slot.state = state
        for block, mixture in mixtures.items():
            states[block].mixture = mixture

    def read_context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Text and, where the model has no embedder for all blocks, time, as routers read them.

        The part of `before_model` that computes on the device: graphs capture it with the forward.
        """
        if self._plan is None:  # a dense forward
            return
        arguments = bind(self.model, args, kwargs)
        self._context = self.spec.context(self.model, arguments)
        if self.spec.time_embedder is None:
            sample, step = arguments[self.spec.sample], arguments[self.spec.timestep]
            if not isinstance(step, Tensor):
                step = torch.full((), step, device=sample.device)
            times = self.spec.time(step.to(sample.device)).float()
            self._condition(time_features(times.expand(len(sample))))

    def _one_time(self, timestep: Any, batch: int) -> Any:
        """One time per sample, its largest where the call has one for each token or frame."""
        self._times = slice(batch)
        if not isinstance(timestep, Tensor) or timestep.ndim == 0:
            return timestep
        self._times = slice(len(timestep))  # one for all samples, or one for each
        if timestep.ndim == 1:
            return timestep
        timestep = timestep.flatten(1)  # (B, M)
        self._times = slice(self.layout.place, timestep.numel(), timestep.shape[1])
        return timestep[:, self.layout.place]

    def after_time_embedding(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        """Torch hook on the time embedder: what routers and updates read beside tokens."""
        del module, args
        if self._context is None:
            return
        batch = len(self._context)
        # Some models append times of their own: those that they were given come first.
        place = self.layout.place
        rows = output[:batch, place] if output.ndim == 3 else output[self._times]
        self._condition(rows.expand(batch, -1))  # (B, Dt)

    def _condition(self, time: Tensor) -> None:
        """Compute what routers and updates read beside tokens."""
        if self._context is None:
            return
        assert self._plan is not None
        states = {index: self.hooks[index].slot.state for index in self._plan.pruned}
        choosing = {index: state for index, state in states.items() if state.chosen is None}
        terms = None
        if choosing:  # what chooses reads the model and trains nothing in it
            terms = self.selector.terms(time.detach(), self._context.detach())
        if terms is not None:
            own = {role: self.selector.of_role(terms, role) for role in self._plan.roles}
            for index, state in choosing.items():
                by_group = tuple(own[group.role][index] for group in state.groups)
                state.terms = by_group or terms[index]
        if states and self.updates is not None:
            conditions = self.updates.condition(time, self._context)
            for index, state in states.items():
                state.update_condition = conditions[index]

    def _settle(self, dtype: torch.dtype, device: torch.device) -> None:
        """Put what was learned where it is used."""
        for module in self.learned:
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device != device:
                module.to(device)
        if self._freezes and self._frozen_for != dtype:
            self._frozen_for = dtype
            with torch.inference_mode(False):
                for module in self.learned:
                    module.freeze(dtype)

    def after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Torch hook on the model, also after an exception."""
        del module, args
        if not self.turns.is_mine():  # a forward that was refused
            return
        if output is not None:  # not one that broke
            self._keep_lead()
        self._forget()
        self.turns.end_forward()

    def _keep_lead(self) -> None:
        """What a conditional pass has chosen, for the unconditional one that follows."""
        if self._plan is None:
            return
        states = {index: self.hooks[index].slot.state for index in self._plan.pruned}
        chosen = {i: s.chosen for i, s in states.items() if s.leads and s.chosen is not None}
        if chosen:
            self.passes.keep(self._plan.key, chosen)

    def _forget(self, state: BlockState = IDLE) -> None:
        """Keep nothing between forwards, also after an exception."""
        self._context = self._plan = None
        for hook in self.hooks:
            hook.slot.state = state

    def _snapshot_checkpoints(self, model: nn.Module) -> None:
        if not snapshots_are_on(model, self._slots):
            take_snapshots(model, self._slots)
            self._undo.add(partial(leave_snapshots, model, self._slots))
