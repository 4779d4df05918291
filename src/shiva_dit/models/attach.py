"""Hooks on and off: the only room that touches a model.

A `ModelHook` on every block gathers, runs the block, and scatters. A torch pre-hook on the model
reads the time once per forward and sets every block's k before the blocks run; a torch hook on the
time embedder computes the routers' conditioning. Nothing is patched, replaced or registered as a
submodule, so the state dict is the model's own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn
from torch.fx.experimental.sym_node import DynamicInt

from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.base import Selector
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.models.backbone import TunedBackbone
from shiva_dit.models.block_hook import BlockHook, BlockState, Lead, Passes, Uncopied
from shiva_dit.models.checkpointing import leave_snapshots, snapshots_are_on, take_snapshots
from shiva_dit.models.counts import Counts
from shiva_dit.models.families import model_spec
from shiva_dit.models.graphs import GRAPHS, GraphRunner, Recorder, put_on
from shiva_dit.models.neighbours import (
    refuse_neighbours,
    refuse_to_compile,
    register_innermost,
    unregister,
)
from shiva_dit.models.spec import bind, given
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
        shares_halves: Callable[[Mapping[str, Any]], bool] | None = None,
        gate_values: bool = False,
    ) -> None:
        self.spec = model_spec(model)
        self.model, self.selector = model, selector
        self.updates = updates
        self.shares_halves = shares_halves
        self.enabled = True
        self.always_select = False
        """Select, gather and scatter also where a block keeps all its tokens: what that costs."""
        self.observer: Callable[[int, Tensor], None] | None = None
        """Told each pruned block's index and the tokens chosen, (B, k); for maps and tests."""
        self.graphs: GraphRunner | None = None
        """Replays forwards."""
        self.backbone: TunedBackbone | None = None
        self.adapter: Any = None
        self.blocks = self.spec.blocks(model)
        self._gated: GatedForward | None = None
        self._runs_in: threading.Thread | None = None
        self._context: Tensor | None = None
        self._undo: list[Callable[[], object]] = []
        self.counts = Counts(
            model, schedule, multiple=multiple, segments=segments, select_every=select_every
        )
        refuse_neighbours(model, model.modules())
        self.passes = Passes()
        self.hooks = [
            BlockHook(self, selector, updates, block, index, self.passes)
            for index, block in enumerate(self.blocks)
        ]
        # Where hooks that come later are looked for: they are put on all blocks.
        self._watched = [m for b in (self.blocks[0], self.blocks[-1]) for m in b.modules()]
        self._slots = {id(b): h.slot for b, h in zip(self.blocks, self.hooks, strict=True)}
        try:
            self._register(gate_values)
        except BaseException:
            self.detach()
            raise

    def _register(self, gate_values: bool) -> None:
        for block, hook in zip(self.blocks, self.hooks, strict=True):
            HookRegistry.check_if_exists_or_initialize(block)
            self._undo.append(partial(_unregister, block))
            register_innermost(block, hook, HOOK_NAME)
        if gate_values:
            self._undo += self._gate_values()
        registers: list[Callable[[], Any]] = [
            partial(self.model.register_forward_pre_hook, self._before_model, with_kwargs=True),
            partial(self.model.register_forward_hook, self._after_model, always_call=True),
        ]
        if self.spec.time_embedder is not None:
            embedder = self.model.get_submodule(self.spec.time_embedder)
            registers.append(partial(embedder.register_forward_hook, self._after_time_embedding))
        for register in registers:
            self._undo.append(register().remove)
        _forget_registries(self.model)

    def detach(self) -> None:
        """Take hooks and tuned weights off. The model is then as it was, to bit and attribute.

        Raises:
            RuntimeError: If the tuned weights can't be taken off (`TunedBackbone.restore`);
                nothing has changed then.
        """
        if self.backbone is not None:
            self.backbone.restore()
        while self._undo:
            self._undo.pop()()
        _forget_registries(self.model)

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
        """FLOPs of one forward of one sample, router and update of the rejected tokens included.

        Args:
            num_tokens: Image tokens N.
            text_tokens: Text tokens T.
            counts: k of every block (a row of `table`).
        """
        update = 0 if self.updates is None else self.updates.flops(num_tokens)
        total = self.spec.flops(self.model, num_tokens, text_tokens).pruned(counts, update)
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
        removals = self._gate_values()
        try:
            yield
        finally:
            for remove in removals:
                remove()

    def _gate_values(self) -> list[Callable[[], None]]:
        removals = []
        for block, hook in zip(self.blocks, self.hooks, strict=True):
            for name in hook.spec.value_modules:
                parent, _, leaf = name.rpartition(".")
                owner = getattr(block, parent, None)
                if owner is not None:
                    handle = getattr(owner, leaf).register_forward_hook(hook.gate_value)
                    removals.append(handle.remove)
        return removals

    def compile(self, **options: Any) -> None:
        """Compile each block by itself; `detach` takes that back too.

        Raises:
            ValueError: If a cache is on the blocks and they shall be one graph each.
        """
        if options.get("fullgraph"):
            refuse_to_compile(self.blocks)
        for block in self.blocks:
            before = block.__dict__.get("_compiled_call_impl")
            block.compile(**options)
            self._undo.append(partial(_restore_compiled, block, before))

    def use_graphs(self, recorder: Recorder, limit: int) -> None:
        """Capture forwards and replay them, until `detach`."""
        if self.graphs is None:
            self.graphs = put_on(self, recorder, limit)
            self._undo.append(self._stop_graphs)

    def _stop_graphs(self) -> None:
        self.graphs = None
        _unregister(self.model, GRAPHS)

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks into the forwards, which a replay would not let them."""
        return self._gated is not None or self.observer is not None

    # --- hooks ------------------------------------------------------------------------------

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._enter_thread()
        self._forget()  # an interrupted forward (Ctrl-C) leaves its state: torch skips the hook
        if not self.enabled:
            return
        refuse_neighbours(model, self._watched)
        if self.backbone is not None:
            self.backbone.keep_on()
        arguments = bind(model, args, kwargs)
        sample = given(model, arguments, self.spec.sample)
        num_tokens = self.spec.tokens(model, sample)
        timestep = given(model, arguments, self.spec.timestep)
        if isinstance(timestep, Tensor) and timestep.ndim > 1:
            raise ValueError(
                f"{type(model).__name__} was called with a time for every token, "
                f"{tuple(timestep.shape)}: what a block keeps depends on one time per sample."
            )
        self._refuse_lora_scale(arguments)
        gated = self._gated
        share = False
        if gated is None:
            counts = self.counts.row(num_tokens, timestep)
            if min(counts) < self.spec.least_tokens:
                raise ValueError(
                    f"blocks of {type(model).__name__} run on {self.spec.least_tokens} tokens at "
                    f"least, and the schedule keeps {min(counts)}: apply with "
                    f"multiple={self.spec.least_tokens}."
                )
            share = self.shares_halves is not None and self.shares_halves(arguments)
        else:
            counts = gated.counts
            self.counts.check(counts, num_tokens)
        led = self.passes.led(len(sample), tuple(counts))
        states: list[BlockState] = []
        for hook, k in zip(self.hooks, counts, strict=True):
            # In training a block that happens to keep all its tokens is judged too (Eq. 24).
            prunable = self.counts.prunable[hook.index]
            gates = gated.gates(hook.index) if gated is not None and prunable else None
            selects = gates is not None or (prunable and self.always_select)
            state = hook.slot.state = BlockState(
                k=DynamicInt(k),
                dense=k >= num_tokens and not selects,
                num_tokens=num_tokens,
                share_halves=share,
                gates=gates,
                leads=gated is None and self.passes.name == "cond",
                chosen=led.get(hook.index),
                observer=self.observer,
            )
            states.append(state)
            leader = None if state.dense else self.counts.leader(hook.index, counts, num_tokens)
            if leader is not None:
                state.follows = states[leader]
                states[leader].is_followed = True
        if self.graphs is None:
            self.read_context(args, kwargs)
        if torch.is_grad_enabled() and getattr(model, "gradient_checkpointing", False):
            self._snapshot_checkpoints(model)

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

    def _enter_thread(self) -> None:
        """One forward at a time: its state lies in the blocks' slots."""
        current, other = threading.current_thread(), self._runs_in
        if other is not None and other is not current and other.is_alive():
            raise RuntimeError(
                f"this model is running in thread {other.name!r} already: a model with an adapter "
                "serves one forward at a time. Guard it by a lock, or give each thread a pipeline."
            )
        self._runs_in = current

    def _refuse_lora_scale(self, arguments: dict[str, Any]) -> None:
        """A scale for the user's LoRAs, given with the call, would scale the adapter's too."""
        if self.backbone is None or self.backbone.lora is None or self.spec.lora_scale is None:
            return
        scale = (arguments.get(self.spec.lora_scale) or {}).get("scale", 1.0)
        if scale != 1.0:
            raise ValueError(
                f"{self.spec.lora_scale}'s scale = {scale} would scale the adapter's own LoRA as "
                'well: set the weights of your LoRAs by pipe.set_adapters(["name"], [weight]).'
            )

    def _after_time_embedding(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        del module, args
        if self._context is not None:  # some models append times of their own: ours come first
            self._condition(output[: len(self._context)].flatten(1))  # (B, Dt) or (B, 1, Dt)

    def _condition(self, time: Tensor) -> None:
        """Compute what routers and updates read beside tokens."""
        if self._context is None:
            return
        for module in self.learned:
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device != time.device:
                module.to(time.device)
        pruned = [hook for hook in self.hooks if not hook.slot.state.dense]
        choosing = [hook for hook in pruned if hook.slot.state.chosen is None]
        terms = self.selector.condition(time, self._context) if choosing else None
        if terms is not None:
            for hook in choosing:
                hook.slot.state.condition = terms[hook.index]
        if pruned and self.updates is not None:
            terms = self.updates.condition(time, self._context)
            for hook in pruned:
                hook.slot.state.update_condition = terms[hook.index]

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args
        if self._runs_in is threading.current_thread():  # not a forward that was refused
            if output is not None:  # not one that broke
                self._keep_lead()
            self._forget()
            self._runs_in = None

    def _keep_lead(self) -> None:
        """What a conditional pass has chosen, for the unconditional one that follows."""
        states = {hook.index: hook.slot.state for hook in self.hooks}
        chosen = {i: s.chosen for i, s in states.items() if s.leads and s.chosen is not None}
        if chosen:
            batch = len(next(iter(chosen.values())))
            self.passes.lead = Lead(batch, tuple(int(s.k) for s in states.values()), chosen)

    def _forget(self) -> None:
        """Keep nothing between forwards, also after an exception."""
        self._context = None
        for hook in self.hooks:
            hook.slot.state = BlockState(k=0, dense=True)

    def _snapshot_checkpoints(self, model: nn.Module) -> None:
        if not snapshots_are_on(model, self._slots):
            take_snapshots(model, self._slots)
            self._undo.append(partial(leave_snapshots, model, self._slots))


def _restore_compiled(block: nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        block.__dict__.pop("_compiled_call_impl", None)
    else:
        block._compiled_call_impl = before


def _unregister(block: nn.Module, name: str = HOOK_NAME) -> None:
    registry: HookRegistry = block._diffusers_hook  # type: ignore[assignment]
    if name in registry.hooks:
        unregister(registry, name)
    if registry.hooks:
        return
    # The registry leaves itself and the bound forward behind as instance attributes.
    del block._diffusers_hook
    own = block.__dict__.get("forward")
    if inspect.ismethod(own) and own.__func__ is type(block).forward and own.__self__ is block:
        del block.__dict__["forward"]


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


def attach(model: nn.Module, selector: Selector, schedule: Schedule, **options: Any) -> Attachment:
    """Put a selector on a model, in place of an earlier one.

    Args:
        model: A supported transformer.
        selector: Scores the tokens of each block; any device.
        schedule: Keep ratios for the model's blocks.
        **options: `updates` (what rejected tokens get, see `RejectedUpdates`), `multiple` (k is a
            multiple of this), `segments` (at most so many different rows over time),
            `select_every` (so many prunable blocks in a row share their first one's scores),
            `shares_halves` (a function that says of a call's arguments whether they hold both
            halves of guidance), `gate_values` (training with the KV gate).

    Raises:
        ValueError: If the model is not supported or the schedule is another model's.
    """
    model_spec(model)
    previous = attachment_of(model)
    if previous is not None:
        previous.detach()
    return Attachment(model, selector, schedule, **options)
