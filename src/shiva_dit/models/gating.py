"""What training adds to forwards (counts, gates, mixtures), and weights of what is selected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from shiva_dit.core.roles import TARGET, Group
from shiva_dit.methods.base import Mixture
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.methods.role_gates import GroupGates
from shiva_dit.models.block_hook import BlockHook
from shiva_dit.models.guidance import Pass
from shiva_dit.models.neighbours import unhook
from shiva_dit.models.plan import Grouping


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedForward:
    """One training forward: how many tokens, and the gates of each pruned block."""

    counts: Sequence[int]
    """k of every block; N where the block is not pruned."""
    gates: Callable[[int], SelectionGates | None]
    """Makes the gates of a block; None trains nothing there."""
    which: Pass = Pass.ALONE
    """The pass of guidance that the forward is."""
    mixtures: Mapping[int, Mixture] = field(default_factory=dict)
    """Of blocks that run more than once."""

    def made(self, prunable: Sequence[bool], groups: Grouping = ()) -> dict[int, SelectionGates]:
        """The gates of all blocks that have any.

        In training a block that happens to keep all its tokens is judged too (Eq. 24).

        Args:
            prunable: Of each block, whether it may be pruned.
            groups: Of each block, where its tokens are in groups: of the target's the gates say k
                before rounding, of others it is what they keep.
        """
        made = {block: self.gates(block) for block, may in enumerate(prunable) if may}
        held = {block: gate for block, gate in made.items() if gate is not None}
        if not groups:
            return held
        return {block: _by_group(gate, groups[block]) for block, gate in held.items()}


def _by_group(gates: SelectionGates, groups: Sequence[Group]) -> GroupGates:
    soft = [gates.soft_k if group.role == TARGET else float(group.k) for group in groups]
    return GroupGates.of(gates, groups, soft)


def gate_values(blocks: Sequence[nn.Module], hooks: Sequence[BlockHook]) -> None:
    """Let the blocks' value projections pass through the gates of each forward (KV gate)."""
    for layer, hook in _value_layers(blocks, hooks):
        layer.register_forward_hook(hook.gate_value)


def ungate_values(blocks: Sequence[nn.Module], hooks: Sequence[BlockHook]) -> None:
    """Take back what `gate_values` did, or as much of it as was done."""
    for layer, hook in _value_layers(blocks, hooks):
        unhook(layer, hook.gate_value)


def weigh_updates(blocks: Sequence[nn.Module], hooks: Sequence[BlockHook]) -> None:
    """Let the blocks' feed-forwards be multiplied by the selector's weights.

    Raises:
        ValueError: If it isn't known where a block has its feed-forward.
    """
    for block, hook in zip(blocks, hooks, strict=True):
        if not hook.spec.sites.get("feed_forward"):
            raise ValueError(
                f"it isn't known where {type(block).__name__} has its feed-forward, whose update "
                'the method multiplies: set its weight_site = "block".'
            )
    for layer, hook in _feed_forwards(blocks, hooks):
        layer.register_forward_hook(hook.weigh)


def unweigh_updates(blocks: Sequence[nn.Module], hooks: Sequence[BlockHook]) -> None:
    """Take back what `weigh_updates` did, or as much of it as was done."""
    for layer, hook in _feed_forwards(blocks, hooks):
        unhook(layer, hook.weigh)


def _feed_forwards(
    blocks: Sequence[nn.Module], hooks: Sequence[BlockHook]
) -> Iterator[tuple[nn.Module, BlockHook]]:
    for block, hook in zip(blocks, hooks, strict=True):
        for place in hook.spec.sites.get("feed_forward", ()):
            yield block.get_submodule(place.module), hook


def _value_layers(
    blocks: Sequence[nn.Module], hooks: Sequence[BlockHook]
) -> Iterator[tuple[nn.Module, BlockHook]]:
    for block, hook in zip(blocks, hooks, strict=True):
        for name in hook.spec.value_modules:
            parent, _, leaf = name.rpartition(".")
            owner = getattr(block, parent, None)
            if owner is not None:
                yield getattr(owner, leaf), hook
