"""What every block does in a forward: made once for a row of counts, looked up afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx.experimental.sym_node import DynamicInt

from shiva_dit.core.roles import Group
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.models.block_state import DENSE, BlockState
from shiva_dit.models.guidance import Pass

Grouping = tuple[tuple[Group, ...], ...]
"""Of every block its groups."""


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What a block does."""

    k: int
    """Tokens that run in it; a `DynamicInt` (see `BlockState`)."""
    leader: int | None
    """The block whose scores it uses, if not its own."""
    is_followed: bool
    """Whether others use its scores."""
    groups: tuple[Group, ...] = ()
    """Those of its tokens that have a budget of their own, with k each; empty: one budget."""


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What every block does in a forward."""

    counts: tuple[int, ...]
    """k of every block."""
    num_tokens: int
    """N."""
    blocks: tuple[BlockPlan, ...]
    pruned: tuple[int, ...]
    """Blocks that choose tokens."""
    groups: Grouping = ()
    """Of every block, where tokens are in groups."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for plans that keep as many of the same."""
        return (self.counts, self.groups) if self.groups else self.counts

    @property
    def roles(self) -> set[int]:
        """Roles of all groups."""
        return {group.role for groups in self.groups for group in groups}

    def states(
        self,
        which: Pass,
        led: Mapping[int, Tensor],
        observer: Callable[[int, Tensor], None] | None,
        gates: Mapping[int, SelectionGates],
    ) -> list[BlockState]:
        """New states of all blocks, for one forward.

        Args:
            which: The pass of guidance that runs.
            led: Tokens that another pass has chosen, by block.
            observer: Told what is chosen.
            gates: Of blocks, in training.
        """
        states = [DENSE] * len(self.blocks)
        for index in self.pruned:
            block = self.blocks[index]
            states[index] = BlockState(
                k=block.k,
                dense=False,
                num_tokens=self.num_tokens,
                share=which.share,
                gates=gates.get(index),
                leads=which is Pass.LEADS,
                chosen=led.get(index),
                observer=observer,
                follows=None if block.leader is None else states[block.leader],
                is_followed=block.is_followed,
                groups=block.groups,
            )
        return states


def make_plan(
    counts: tuple[int, ...],
    num_tokens: int,
    selecting: tuple[bool, ...],
    leader: Callable[[int], int | None],
    groups: Grouping = (),
) -> ForwardPlan:
    """What every block does.

    Args:
        counts: k of every block.
        num_tokens: N.
        selecting: Of every block, whether it chooses tokens also where it keeps all of them.
        leader: The block whose scores one uses, or None.
        groups: Of every block, where tokens are in groups; their k are `counts` together.
    """
    pruned = tuple(
        index
        for index, (k, selects) in enumerate(zip(counts, selecting, strict=True))
        if k < num_tokens or selects
    )
    leaders = {index: leader(index) for index in pruned}
    followed = set(leaders.values())
    blocks = tuple(
        BlockPlan(
            DynamicInt(k),
            leaders.get(index),
            index in followed,
            tuple(replace(group, k=DynamicInt(group.k)) for group in groups[index])
            if groups
            else (),
        )
        for index, k in enumerate(counts)
    )
    return ForwardPlan(counts, num_tokens, blocks, pruned, groups)
