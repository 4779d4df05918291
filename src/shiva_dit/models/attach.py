"""Hooks on and off: the only room that touches a model.

A `ModelHook` on every block gathers, runs the block, and scatters. A torch pre-hook on the model
reads the time once per forward and sets every block's k before the blocks run; a torch hook on the
time embedder computes the routers' conditioning. Nothing is patched, replaced or registered as a
submodule, so the state dict is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.base import Selector
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.models.block_hook import BlockHook, BlockState, Uncopied
from shiva_dit.models.checkpointing import leave_snapshots, snapshots_are_on, take_snapshots
from shiva_dit.models.counted import counted
from shiva_dit.models.counts import Counts
from shiva_dit.models.families import model_spec
from shiva_dit.models.graphs import GRAPHS, GraphRunner, Recorder, put_on
from shiva_dit.models.guidance import Pass, Passes
from shiva_dit.models.neighbours import (
    reaches,
    refuse_neighbours,
    refuse_to_compile,
    register_innermost,
    unhook,
    unregister,
)
from shiva_dit.models.plan import DENSE, IDLE, ForwardPlan
from shiva_dit.models.spec import bind, given
from shiva_dit.models.tuned import TunedBackbone
from shiva_dit.models.turns import turns_of
from shiva_dit.models.undo import Undo
from shiva_dit.models.watch import Watch
from shiva_dit.modules.context import time_features
from shiva_dit.modules.updates import RejectedUpdates

HOOK_NAME = "shiva_dit"


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedForward:
    """One training forward: how many tokens, and the gates of each pruned block."""

    counts: Sequence[int]
    """k of every block; N where the block is not pruned."""
    gates: Callable[[int], SelectionGates | None]
    """Makes the gates of a block; None trains nothing there."""


class Attachment(Uncopied):
    """A selector on a model. Made by `attach`; `detach` takes it off again."""

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        schedule: Schedule,
        *,
        updates: RejectedUpdates | None = None,
        multiple: int | None = None,
        segments: int | None = None,
        select_every: int = 1,
        gate_values: bool = False,
        backbone: TunedBackbone | None = None,
        freeze: bool = False,
    ) -> None:
        self.spec = model_spec(model)
        self.model, self.selector = model, selector
        self.updates = updates
        self.gates_values = gate_values
        self._freezes = freeze
        self._frozen_for: torch.dtype | None = None
        self.enabled = True
        self.always_select = False
        """Select, gather and scatter also where a block keeps all its tokens: what that costs."""
        self.observer: Callable[[int, Tensor], None] | None = None
        """Told each pruned block's index and the tokens chosen, (B, k); for maps and tests."""
        self.graphs: GraphRunner | None = None
        """Replays forwards."""
        self.backbone = backbone
        """Tuned weights; they come and go with the hooks."""
        self.adapter: Any = None
        self._is_on = False
        self.was_enabled = True
        """Whether it is on again when the last `disabled` block ends."""
        self._compiled: dict[str, Any] | None = None
        self.num_tokens: int | None = None
        """N of the last forward."""
        self.blocks = self.spec.blocks(model)
        self.turns = turns_of(model)
        self._gated: GatedForward | None = None
        self._context: Tensor | None = None
        self._plan: ForwardPlan | None = None
        self._times: slice = slice(None)
        """Rows of the running forward's time embedding, one for each time that it was given."""
        self._undo = Undo()
        self.counts = Counts(
            model, schedule, multiple=multiple, segments=segments, select_every=select_every
        )
        self.passes = Passes()
        self.hooks = [
            BlockHook(self, selector, updates, block, index, self.passes)
            for index, block in enumerate(self.blocks)
        ]
        # Where hooks that come later are looked for: they are put on all blocks.
        self._watched = [m for b in (self.blocks[0], self.blocks[-1]) for m in b.modules()]
        self._slots = {id(b): h.slot for b, h in zip(self.blocks, self.hooks, strict=True)}

    def put_on(self) -> None:
        """Put tuned weights and hooks on: all of them or, if something fails, none.

        Raises:
            ValueError: If something on the model can't go along with it.
        """
        self._put(self._put_weights_on)

    def put_back(self) -> None:
        """Put on what was taken off, as it was: for undoing that."""
        self._put(self._put_weights_back)

    def _put(self, put_weights: Callable[[], None]) -> None:
        with self.turns.switch():
            if self._is_on:
                return
            refuse_neighbours(self.model, self.model.modules())
            try:
                self._undo.add(self._take_weights_off)
                put_weights()
                self._put_hooks_on()
                self.watch = Watch(self._watch)
                self._is_on = True
                if self.turns.pauses:
                    self.enable(False)
            except BaseException:
                self._is_on = False
                self._undo.run()
                raise

    def _put_weights_on(self) -> None:
        if self.backbone is not None:
            self.backbone.put_on()

    def _put_weights_back(self) -> None:
        if self.backbone is not None:
            self.backbone.put_back()
            self.backbone.enable(self.enabled)

    def _take_weights_off(self) -> None:
        if self.backbone is not None:
            self.backbone.restore()

    def _put_hooks_on(self) -> None:
        self._undo.add(partial(_forget_registries, self.model))
        for block, hook in zip(self.blocks, self.hooks, strict=True):
            self._undo.add(partial(unregister, block, HOOK_NAME))
            register_innermost(block, hook, HOOK_NAME)
        if self.gates_values:
            self._undo.add(self._ungate_values)
            self._gate_values()
        model = self.model
        self._undo.add(partial(unhook, model, self._before_model))
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self._undo.add(partial(unhook, model, self._after_model))
        model.register_forward_hook(self._after_model, always_call=True)
        if self.spec.time_embedder is not None:
            embedder = model.get_submodule(self.spec.time_embedder)
            self._undo.add(partial(unhook, embedder, self._after_time_embedding))
            embedder.register_forward_hook(self._after_time_embedding)
        if self.backbone is not None and self.backbone.is_merged:
            self._undo.add(partial(self.model.__dict__.pop, "save_pretrained", None))
            self.model.save_pretrained = self._save_bare  # type: ignore[assignment]
        _forget_registries(self.model)
        if self._compiled is not None:
            self.compile(**self._compiled)

    def _save_bare(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `save_pretrained`, with its own weights."""
        assert self.backbone is not None
        with self.turns.switch():
            before = self.backbone.enabled
            self.backbone.enable(False)
            try:
                return type(self.model).save_pretrained(self.model, *args, **kwargs)  # type: ignore[attr-defined]
            finally:
                self.backbone.enable(before)

    def detach(self) -> None:
        """Take hooks and tuned weights off. The model is then as it was, to bit and attribute.

        Raises:
            RuntimeError: If the model's own weights can't be given back (`TunedBackbone.restore`);
                nothing has changed then.
        """
        with self.turns.switch():
            self._take_weights_off()
            self._is_on = False
            self._undo.run()

    def enable(self, enabled: bool) -> None:
        """Run pruned and with tuned weights, or as the model itself.

        Raises:
            RuntimeError: As `detach`.
        """
        with self.turns.switch(interruptible=not enabled):
            if not self._is_on:
                return  # taken off meanwhile
            if self.backbone is not None:
                self.backbone.enable(enabled)
            self.enabled = enabled

    def _watch(self, watch: Watch) -> None:
        """What must hold before each forward (`Watch`)."""
        for hook, block in zip(self.hooks, self.blocks, strict=True):
            watch.add(block.__dict__, "forward", partial(self._judge_forward, hook, block))
        index = 0
        for name in self.spec.block_lists:
            held = self.model.get_submodule(name)
            for key in held._modules:
                watch.add(held._modules, key, partial(self._judge_block, held, key, index))
                index += 1
        if self.backbone is not None:
            self.backbone.watch(watch)

    def _judge_forward(self, hook: BlockHook, block: nn.Module) -> None:
        if not reaches(block.__dict__.get("forward"), hook):
            raise RuntimeError(
                f"block {hook.index} runs past the adapter: its forward was replaced, or put back "
                "by something that was on the model before. Call shiva_dit.apply again."
            )

    def _judge_block(self, held: nn.Module, key: str, index: int) -> None:
        if held._modules.get(key) is not self.blocks[index]:
            raise RuntimeError(
                f"block {index} was replaced while the adapter was on: call shiva_dit.remove, "
                "replace it, and apply again."
            )

    @property
    def schedule(self) -> Schedule:
        """Keep ratios over time and depth."""
        return self.counts.schedule

    @property
    def num_parameters(self) -> int:
        """Parameters of the selector and of what rejected tokens get."""
        return sum(p.numel() for module in self.learned for p in module.parameters())

    @property
    def learned(self) -> list[nn.Module]:
        """What the adapter brings: selector and, where there are any, updates."""
        return [self.selector] if self.updates is None else [self.selector, self.updates]

    def flops(self, num_tokens: int, text_tokens: int, counts: Sequence[int]) -> int:
        """FLOPs of one forward of one sample, with router, updates and what lies beside layers.

        Args:
            num_tokens: Image tokens N.
            text_tokens: Text tokens T.
            counts: k of every block (a row of `table`).
        """
        update = 0 if self.updates is None else self.updates.flops(num_tokens)
        costs = counted(self.model, text_tokens)
        total = costs.flops(num_tokens).pruned(counts, update)
        for beside in () if self.backbone is None else self.backbone.beside:
            total += beside.flops(costs.linear_rows(beside.path, num_tokens, counts))
        pruned = [block for block, k in enumerate(counts) if k < num_tokens]
        if pruned:
            total += self.selector.condition_flops()
            total += 0 if self.updates is None else self.updates.condition_flops()
        scoring = sum(self.counts.leader(block, counts, num_tokens) is None for block in pruned)
        return total + scoring * self.selector.flops(num_tokens)

    @contextmanager
    def gated(self, forward: GatedForward) -> Iterator[None]:
        """Within: forwards keep the given counts and carry gates (training)."""
        self._gated = forward
        try:
            yield
        finally:
            self._gated = None

    @contextmanager
    def values_gated(self) -> Iterator[None]:
        """Within: value projections pass through the gates, on a model attached without them."""
        try:
            self._gate_values()
            yield
        finally:
            self._ungate_values()

    def _gate_values(self) -> None:
        for layer, hook in self._value_layers():
            layer.register_forward_hook(hook.gate_value)

    def _ungate_values(self) -> None:
        for layer, hook in self._value_layers():
            unhook(layer, hook.gate_value)

    def _value_layers(self) -> Iterator[tuple[nn.Module, BlockHook]]:
        for block, hook in zip(self.blocks, self.hooks, strict=True):
            for name in hook.spec.value_modules:
                parent, _, leaf = name.rpartition(".")
                owner = getattr(block, parent, None)
                if owner is not None:
                    yield getattr(owner, leaf), hook

    def compile(self, **options: Any) -> None:
        """Compile each block by itself; `detach` takes that back too.

        Raises:
            ValueError: If a cache is on the blocks and they shall be one graph each.
        """
        if options.get("fullgraph"):
            refuse_to_compile(self.blocks)
        self._compiled = options
        for block in self.blocks:
            before = block.__dict__.get("_compiled_call_impl")
            self._undo.add(partial(_restore_compiled, block, before))
            block.compile(**options)

    def use_graphs(self, recorder: Recorder, limit: int) -> None:
        """Capture forwards and replay them, until `detach`."""
        if self.graphs is None:
            self._undo.add(self._stop_graphs)
            self.graphs = put_on(self, recorder, limit)

    def _stop_graphs(self) -> None:
        self.graphs = None
        unregister(self.model, GRAPHS)

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks into the forwards, which a replay would not let them."""
        return self._gated is not None or self.observer is not None

    # --- hooks ------------------------------------------------------------------------------

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.turns.start_forward()
        # An interrupted forward (Ctrl-C) leaves its state: torch skips the hook.
        self._forget(DENSE)
        if not self.enabled:
            return
        self.watch.check()
        refuse_neighbours(model, self._watched)
        arguments = bind(model, args, kwargs)
        sample = given(model, arguments, self.spec.sample)
        num_tokens = self.num_tokens = self.spec.tokens(model, sample)
        timestep = given(model, arguments, self.spec.timestep)
        timestep = self._one_time(timestep, len(sample))
        gated = self._gated
        which = Pass.ALONE
        if gated is None:
            counts = self.counts.row(num_tokens, timestep)
            if min(counts) < self.spec.least_tokens:
                raise ValueError(
                    f"blocks of {type(model).__name__} run on {self.spec.least_tokens} tokens at "
                    f"least, and the schedule keeps {min(counts)}: apply with "
                    f"multiple={self.spec.least_tokens}."
                )
            which = self.passes.of_call(len(sample))
        else:
            counts = gated.counts
            self.counts.check(counts, num_tokens)
        self._settle(sample[0].dtype, sample[0].device)
        self._begin(counts, num_tokens, which, len(sample))
        if self.graphs is None:
            self.read_context(args, kwargs)
        if torch.is_grad_enabled() and getattr(model, "gradient_checkpointing", False):
            self._snapshot_checkpoints(model)

    def _begin(self, counts: Sequence[int], num_tokens: int, which: Pass, batch: int) -> None:
        """Give every block its state for this forward."""
        prunable, gated = self.counts.prunable, self._gated
        gates: dict[int, SelectionGates] = {}
        if gated is not None:
            # In training a block that happens to keep all its tokens is judged too (Eq. 24).
            made = {block: gated.gates(block) for block, may in enumerate(prunable) if may}
            gates = {block: gate for block, gate in made.items() if gate is not None}
        selecting = prunable if self.always_select else [b in gates for b in range(len(prunable))]
        plan = self._plan = self.counts.plan(counts, num_tokens, selecting)
        led = self.passes.led(which, batch, plan.counts)
        states = plan.states(which, led, self.observer, gates)
        for hook, state in zip(self.hooks, states, strict=True):
            hook.slot.state = state

    def read_context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Text and, where the model has no embedder for all blocks, time, as routers read them.

        The part of `_before_model` that computes on the device: graphs capture it with the forward.
        """
        if not self.enabled:
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
        """One time per sample, also where the call has one for each of its tokens or frames."""
        self._times = slice(batch)
        if not isinstance(timestep, Tensor) or timestep.ndim == 0:
            return timestep
        self._times = slice(len(timestep))  # one for all samples, or one for each
        if timestep.ndim == 1:
            return timestep
        timestep = timestep.flatten(1)  # (B, M)
        each = timestep.shape[1]
        self._times = slice(0, timestep.numel(), each)
        known = each == 1 or self.passes.times_are_equal()
        if not known and not bool((timestep == timestep[:, :1]).all()):
            raise ValueError(
                f"{type(self.model).__name__} was called with different times for the tokens of a "
                f"sample, {tuple(timestep.shape)}: what a block keeps depends on one time per "
                "sample."
            )
        return timestep[:, 0]

    def _after_time_embedding(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        del module, args
        if self._context is None:
            return
        batch = len(self._context)
        # Some models append times of their own: those that they were given come first.
        rows = output[:batch, 0] if output.ndim == 3 else output[self._times]
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
            for index, state in choosing.items():
                state.terms = terms[index]
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
                self.selector.freeze(dtype)
                if self.updates is not None:
                    self.updates.freeze(dtype)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
            self.passes.keep(self._plan.counts, chosen)

    def _forget(self, state: BlockState = IDLE) -> None:
        """Keep nothing between forwards, also after an exception."""
        self._context = self._plan = None
        for hook in self.hooks:
            hook.slot.state = state

    def _snapshot_checkpoints(self, model: nn.Module) -> None:
        if not snapshots_are_on(model, self._slots):
            take_snapshots(model, self._slots)
            self._undo.add(partial(leave_snapshots, model, self._slots))


def _restore_compiled(block: nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        block.__dict__.pop("_compiled_call_impl", None)
    else:
        block._compiled_call_impl = before


def _forget_registries(model: nn.Module) -> None:
    """Diffusers caches which modules have registries; adding or removing hooks stales that."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, or None."""
    blocks = model_spec(model).blocks(model)
    registry = getattr(blocks[0], "_diffusers_hook", None) if blocks else None
    hook = None if registry is None else registry.get_hook(HOOK_NAME)
    owner = hook.owner if isinstance(hook, BlockHook) else None
    return owner if isinstance(owner, Attachment) else None


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Within: the model itself. Those that overlap last until the last one ends.

    What is attached meanwhile is off until then.
    """
    turns = turns_of(model)
    with turns.switch():
        on = attachment_of(model)
        if on is not None and not turns.pauses:
            on.was_enabled = on.enabled
            on.enable(False)
        turns.pauses += 1
    try:
        yield
    finally:
        with turns.switch(interruptible=False):
            turns.pauses -= 1
            on = attachment_of(model)
            if on is not None and not turns.pauses:
                on.enable(on.was_enabled)


def attach(model: nn.Module, selector: Selector, schedule: Schedule, **options: Any) -> Attachment:
    """Put a selector on a model, in place of an earlier one.

    Args:
        model: A supported transformer.
        selector: Scores the tokens of each block; any device.
        schedule: Keep ratios for the model's blocks.
        **options: `updates` (what rejected tokens get, see `RejectedUpdates`), `multiple` (k is a
            multiple of this), `segments` (at most so many different rows over time),
            `select_every` (so many prunable blocks in a row share their first one's scores),
            `gate_values` (training with the KV gate), `freeze` (weights of the selector and the
            updates are the attachment's own and never change).

    Raises:
        ValueError: If the model is not supported or the schedule is another model's.
    """
    model_spec(model)
    attachment = Attachment(model, selector, schedule, **options)
    exchange([attachment])
    return attachment


def exchange(new: Sequence[Attachment], gone: Sequence[Attachment] = ()) -> None:
    """Attachments in the place of those that are on their models: whole or not at all.

    Args:
        new: What is put on.
        gone: What is taken off other models meanwhile.

    Raises:
        RuntimeError: If an old one can't be taken off.
        ValueError: If a new one can't be put on.
    """
    with ExitStack() as switches:
        for attachment in sorted((*new, *gone), key=_place_in_turn):
            switches.enter_context(attachment.turns.switch())
        undo = Undo()
        try:
            for attachment in gone:
                undo.add(attachment.put_back)
                attachment.detach()
            for attachment in new:
                old = attachment_of(attachment.model)
                if old is not None:
                    undo.add(old.put_back)
                    old.detach()
                undo.add(attachment.detach)
                attachment.put_on()
        except BaseException:
            undo.run()
            raise


def _place_in_turn(attachment: Attachment) -> int:
    """All take the turns of several models in one order, lest two wait for each other."""
    return id(attachment.model)


def detach_all(attachments: Sequence[Attachment]) -> None:
    """Take attachments off: all of them, or none.

    Raises:
        RuntimeError: If one can't be taken off.
    """
    undo = Undo()
    with ExitStack() as switches:
        for attachment in sorted(attachments, key=_place_in_turn):
            switches.enter_context(attachment.turns.switch())
        try:
            for attachment in attachments:
                undo.add(attachment.put_back)
                attachment.detach()
        except BaseException:
            undo.run()
            raise
