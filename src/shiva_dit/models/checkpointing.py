"""Gradient checkpointing: each block is recomputed with the state of its own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shiva_dit.models.block_state import Slot


class SnapshotCheckpoint:
    """A model's checkpointing function that remembers each block's state for its recomputation.

    Args:
        original: The function that it wraps.
        slots: Slots of the blocks, by the id of the block.
    """

    def __init__(self, original: Callable[..., Any], slots: Mapping[int, Slot]) -> None:
        self.original, self.slots = original, slots

    def __call__(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The block through the wrapped function; other modules as they are."""
        block = getattr(module, "__self__", module)  # some models hand its `__call__` over
        slot = self.slots.get(id(block))
        if slot is None:
            return self.original(module, *args, **kwargs)
        return self.original(_WithState(module, slot, kwargs), *args)


class _WithState:
    """A block with the state and keywords of a forward: diffusers' own function takes none."""

    def __init__(self, module: Callable[..., Any], slot: Slot, kwargs: dict[str, Any]) -> None:
        self.module, self.slot, self.state = module, slot, slot.state
        self.kwargs = kwargs

    def __call__(self, *args: Any) -> Any:
        current = self.slot.state
        self.slot.state = self.state
        try:
            return self.module(*args, **self.kwargs)
        finally:
            self.slot.state = current


def snapshots_are_on(model: Any, slots: Mapping[int, Slot]) -> bool:
    """Whether the model's checkpointing function is ours, for these slots."""
    current = model._gradient_checkpointing_func
    return isinstance(current, SnapshotCheckpoint) and current.slots is slots


def take_snapshots(model: Any, slots: Mapping[int, Slot]) -> None:
    """Wrap the model's checkpointing function."""
    model._gradient_checkpointing_func = SnapshotCheckpoint(
        model._gradient_checkpointing_func, slots
    )


def leave_snapshots(model: Any, slots: Mapping[int, Slot]) -> None:
    """Give the model its own function back, unless it has another by now."""
    if snapshots_are_on(model, slots):
        model._gradient_checkpointing_func = model._gradient_checkpointing_func.original
