"""Hooks on and off: the only room that touches a model.

A `ModelHook` on every block gathers, runs the block, and scatters. A torch pre-hook on the model
reads the time once per forward and sets every block's k before the blocks run; a torch hook on the
time embedder computes the routers' conditioning. Nothing is patched, replaced or registered as a
submodule, so the state dict is the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.fx.experimental.sym_node import DynamicInt

from shiva_dit.core.schedule import KeepTable, Schedule, nearest_bin
from shiva_dit.core.selection import (
    gather_tokens,
    scatter_tokens,
    select_top_k,
    share_between_halves,
)
from shiva_dit.methods.base import Selector
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.models.backbone import TunedBackbone
from shiva_dit.models.families import block_spec, model_spec
from shiva_dit.models.spec import BlockSpec, argument_place, bind

HOOK_NAME = "shiva_dit"


@dataclass(slots=True)
class BlockState:
    """What one block does in one forward.

    Made anew each time, so that a recomputation in backward can be given its own forward's.
    """

    k: int
    """A `DynamicInt`: compiled blocks take it as a symbolic size from their first call on."""
    dense: bool
    share_halves: bool = False
    condition: Tensor | None = None
    gates: SelectionGates | None = None


class Slot:
    """Holds a block's current state. Not a module: dynamo then treats k as a symbolic size."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = BlockState(k=0, dense=True)


class BlockHook(ModelHook):
    """Gather, run, scatter around one block."""

    def __init__(self, attachment: Attachment, module: nn.Module, index: int) -> None:
        super().__init__()
        self.attachment = attachment
        self.scores = attachment.selector.scorer(index)
        self.index = index
        self.spec: BlockSpec = block_spec(module)
        self.place = argument_place(module, self.spec.hidden)
        self.slot = Slot()

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block on its chosen tokens; the unchanged block where nothing is pruned."""
        del module
        state = self.slot.state
        if state.dense:
            return self.run(*args, **kwargs)
        by_name = self.spec.hidden in kwargs
        x = kwargs[self.spec.hidden] if by_name else args[self.place]  # (B, N, D)
        scores = self.scores(x.detach(), state.condition)
        if state.share_halves:
            scores = share_between_halves(scores)
        gates = state.gates
        if gates is None:
            chosen = select_top_k(scores, state.k)
        else:
            chosen = gates.choose(scores, state.k)
            x = gates.enter(x)
        if self.attachment.observer is not None:
            self.attachment.observer(self.index, chosen)
        before = gather_tokens(x, chosen)  # (B, k, D)
        if by_name:
            kwargs = {**kwargs, self.spec.hidden: before}
        else:
            args = (*args[: self.place], before, *args[self.place + 1 :])
        output = self.run(*args, **kwargs)
        place = self.spec.output
        after = output if place is None else output[place]
        if gates is not None:
            x, after = gates.leave(x, before, after)
        x = scatter_tokens(x, chosen, after)  # (B, N, D)
        return x if place is None else (*output[:place], x, *output[place + 1 :])

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        forward = self.fn_ref.original_forward
        assert forward is not None
        return forward(*args, **kwargs)

    def gate_value(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Torch hook on the block's value projections (KV gate)."""
        del module, args
        gates = self.slot.state.gates
        return output if gates is None else gates.value(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise RuntimeError(
            "a model with an adapter attached cannot be deep-copied: the copy would run the "
            "original's blocks. Call shiva_dit.remove(model) first, copy, and apply to both."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedForward:
    """One training forward: how many tokens, and the gates of each pruned block."""

    counts: Sequence[int]
    """k of every block; N where the block is not pruned."""
    gates: Callable[[int], SelectionGates | None]
    """Makes the gates of a block; None trains nothing there."""


class Attachment:
    """A selector on a model. Made by `attach`; `detach` takes it off again."""

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        schedule: Schedule,
        *,
        multiple: int = 1,
        shares_halves: Callable[[], bool] | None = None,
        gate_values: bool = False,
    ) -> None:
        self.spec = model_spec(model)
        self.model, self.selector, self.schedule = model, selector, schedule
        self.multiple = multiple
        self.shares_halves = shares_halves
        self.enabled = True
        self.observer: Callable[[int, Tensor], None] | None = None
        """Told each pruned block's index and the tokens chosen, (B, k); for maps and tests."""
        self.backbone: TunedBackbone | None = None
        self.adapter: Any = None
        self.blocks = self.spec.blocks(model)
        self._gated: GatedForward | None = None
        self._context: Tensor | None = None
        self._tables: dict[int, KeepTable] = {}
        self._undo: list[Callable[[], object]] = []
        if schedule.num_blocks != len(self.blocks):
            raise ValueError(
                f"the schedule is for {schedule.num_blocks} blocks, "
                f"{type(model).__name__} has {len(self.blocks)}: it was made for another model."
            )
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}.")
        self.hooks = [BlockHook(self, block, index) for index, block in enumerate(self.blocks)]
        try:
            self._register(gate_values)
        except BaseException:
            self.detach()
            raise

    def _register(self, gate_values: bool) -> None:
        for block, hook in zip(self.blocks, self.hooks, strict=True):
            registry = HookRegistry.check_if_exists_or_initialize(block)
            self._undo.append(partial(_unregister, block))
            registry.register_hook(hook, HOOK_NAME)
            if gate_values:
                for name in hook.spec.value_modules:
                    parent, _, leaf = name.rpartition(".")
                    owner = getattr(block, parent, None)
                    if owner is not None:
                        handle = getattr(owner, leaf).register_forward_hook(hook.gate_value)
                        self._undo.append(handle.remove)
        embedder = self.model.get_submodule(self.spec.time_embedder)
        for register in (
            partial(self.model.register_forward_pre_hook, self._before_model, with_kwargs=True),
            partial(self.model.register_forward_hook, self._after_model, always_call=True),
            partial(embedder.register_forward_hook, self._after_time_embedding),
        ):
            self._undo.append(register().remove)
        _forget_registries(self.model)

    def detach(self) -> None:
        """Take every hook off. The model is then as it was, to the attribute."""
        while self._undo:
            self._undo.pop()()
        _forget_registries(self.model)

    def table(self, num_tokens: int) -> KeepTable:
        """The integers executed for N image tokens."""
        if num_tokens not in self._tables:
            self._tables[num_tokens] = self.schedule.for_tokens(num_tokens, multiple=self.multiple)
        return self._tables[num_tokens]

    @contextmanager
    def gated(self, forward: GatedForward) -> Iterator[None]:
        """Within: forwards keep the given counts and carry gates (training)."""
        self._gated = forward
        try:
            yield
        finally:
            self._gated = None

    def compile(self, **options: Any) -> None:
        """Compile each block by itself; `detach` takes that back too."""
        for block in self.blocks:
            before = block.__dict__.get("_compiled_call_impl")
            block.compile(**options)
            self._undo.append(partial(_restore_compiled, block, before))

    # --- hooks ------------------------------------------------------------------------------

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._forget()  # an interrupted forward (Ctrl-C) leaves its state: torch skips the hook
        if not self.enabled:
            return
        arguments = bind(model, args, kwargs)
        num_tokens = self.spec.tokens(model, arguments[self.spec.sample])
        gated = self._gated
        share = False
        if gated is None:
            counts = self.table(num_tokens).row(self._time(arguments[self.spec.timestep]))
            extra = self.spec.no_sharing is not None and arguments.get(self.spec.no_sharing)
            share = not extra and self.shares_halves is not None and self.shares_halves()
        else:
            counts = gated.counts
            for k in counts:
                if not 1 <= k <= num_tokens:
                    raise ValueError(f"k must lie in [1, N] = [1, {num_tokens}], got {k}.")
        self._context = arguments[self.spec.context]
        for hook, k in zip(self.hooks, counts, strict=True):
            hook.slot.state = BlockState(
                k=DynamicInt(k),
                dense=k >= num_tokens,
                share_halves=share,
                gates=None if gated is None or k >= num_tokens else gated.gates(hook.index),
            )
        if torch.is_grad_enabled() and getattr(model, "gradient_checkpointing", False):
            self._snapshot_checkpoints(model)

    def _time(self, timestep: Tensor | float) -> float:
        """The forward's t in [0, 1]: the one host read per step, none if t doesn't matter."""
        if self.schedule.num_bins == 1:
            return 0.0
        steps = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep]
        times = [step / self.spec.timestep_scale for step in steps]
        bins = {nearest_bin(t, self.schedule.num_bins) for t in times}
        if len(bins) > 1:
            raise ValueError(
                f"the samples of one forward must share their time bin, so that they keep equally "
                f"many tokens; got times {sorted(set(times))}. Split the batch by timestep."
            )
        return times[0]

    def _after_time_embedding(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        del module, args
        if self._context is None:
            return
        parameter = next(self.selector.parameters(), None)
        if parameter is not None and parameter.device != output.device:
            self.selector.to(output.device)
        for hook in self.hooks:
            state = hook.slot.state
            if not state.dense:
                state.condition = self.selector.condition(output, self._context, hook.index)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args, output
        self._forget()

    def _forget(self) -> None:
        """Keep nothing between forwards, also after an exception."""
        self._context = None
        for hook in self.hooks:
            hook.slot.state = BlockState(k=0, dense=True)

    def _snapshot_checkpoints(self, model: Any) -> None:
        """Recompute each block with the state of its own forward, whatever ran since."""
        current = model._gradient_checkpointing_func
        if isinstance(current, _SnapshotCheckpoint) and current.attachment is self:
            return
        model._gradient_checkpointing_func = _SnapshotCheckpoint(self, current)
        self._undo.append(partial(_restore_checkpoints, model, self))


class _SnapshotCheckpoint:
    """A model's checkpointing function that remembers each block's state for its recomputation."""

    def __init__(self, attachment: Attachment, original: Callable[..., Any]) -> None:
        self.attachment, self.original = attachment, original
        self._slots = {
            id(b): h.slot for b, h in zip(attachment.blocks, attachment.hooks, strict=True)
        }

    def __call__(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        slot = self._slots.get(id(module))
        if slot is None:
            return self.original(module, *args, **kwargs)
        return self.original(_WithState(module, slot), *args, **kwargs)


class _WithState:
    def __init__(self, module: Callable[..., Any], slot: Slot) -> None:
        self.module, self.slot, self.state = module, slot, slot.state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = self.slot.state
        self.slot.state = self.state
        try:
            return self.module(*args, **kwargs)
        finally:
            self.slot.state = current


def _restore_checkpoints(model: Any, attachment: Attachment) -> None:
    current = model._gradient_checkpointing_func
    if isinstance(current, _SnapshotCheckpoint) and current.attachment is attachment:
        model._gradient_checkpointing_func = current.original


def _restore_compiled(block: nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        block.__dict__.pop("_compiled_call_impl", None)
    else:
        block._compiled_call_impl = before


def _unregister(block: nn.Module) -> None:
    registry: HookRegistry = block._diffusers_hook  # type: ignore[assignment]
    registry.remove_hook(HOOK_NAME, recurse=False)
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
    return hook.attachment if isinstance(hook, BlockHook) else None


def attach(model: nn.Module, selector: Selector, schedule: Schedule, **options: Any) -> Attachment:
    """Put a selector on a model, in place of an earlier one.

    Args:
        model: A supported transformer.
        selector: Scores the tokens of each block; any device.
        schedule: Keep ratios for the model's blocks.
        **options: `multiple` (k is a multiple of this), `shares_halves` (a function that says
            whether the running call is a batched guidance pass), `gate_values` (training with the
            KV gate).

    Raises:
        ValueError: If the model is not supported or the schedule is another model's.
    """
    model_spec(model)
    previous = attachment_of(model)
    if previous is not None:
        previous.detach()
    return Attachment(model, selector, schedule, **options)
