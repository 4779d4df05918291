"""Refresh: tokens that are left out get the last update that was computed for them. Ours.

Nothing is trained, so it runs on the first day. Its choice reads how far tokens have moved since.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.core.selection import best_tokens, gather_tokens, keep_count, scatter_tokens
from shiva_dit.methods.base import Need, Where
from shiva_dit.methods.blocks import BlockReducer, BlockRun

APART = 12.0
"""What the movement of the halves' difference counts beside that of the halves: the error of
u + g (c - u) is e_u + g (e_c - e_u). From 6 to 30 it makes no difference; without it, pictures are
0.8 dB worse at guidance 4."""


@dataclass(frozen=True, slots=True)
class _Last:
    """What a block did last to each token."""

    seen: Float[Tensor, "B N D"]
    """The token that it ran on."""
    update: Float[Tensor, "B N D"]
    """What it added."""


class Refresh(BlockReducer):
    r"""Only the tokens that moved farthest run; :math:`x_i + F_i^{last}` for the others.

    A block's update of a token changes slowly from step to step, the slower the less the token
    itself has changed: the k of the largest :math:`|x_i - x_i^{last}|` run. In the first steps all
    do, and in the first blocks always. Both halves of a guided batch run the same tokens, those of
    the largest :math:`|\Delta u_i|^2 + |\Delta c_i|^2 + 12 |\Delta c_i - \Delta u_i|^2`; passes in
    turn choose for themselves. Memory: two tensors of a block's tokens for every block and pass, as
    long as the run lives.

    Args:
        keep_ratio: Share of the tokens that run, in (0, 1]; 1 leaves the model as it is.
        whole_steps: First steps in which all run, at least 1.
        whole_blocks: First blocks in which all run.
        keys: What the chosen attend to: "all", keys and values of all tokens, computed anew; or
            "chosen", those of the chosen.

    Raises:
        ValueError: If one of these lies outside that.
    """

    needs: tuple[Need, ...] = ("passes", "steps")

    def __init__(
        self,
        keep_ratio: float,
        *,
        whole_steps: int = 2,
        whole_blocks: int = 1,
        keys: Literal["all", "chosen"] = "all",
    ) -> None:
        super().__init__()
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}.")
        if whole_steps < 1 or whole_blocks < 0:
            raise ValueError(
                f"whole_steps must be at least 1 and whole_blocks 0, got {whole_steps} and "
                f"{whole_blocks}: the first step has nothing to remember."
            )
        if keys not in ("all", "chosen"):
            raise ValueError(f'keys must be "all" or "chosen", got {keys!r}.')
        self.keep_ratio, self.keys = keep_ratio, keys
        self.whole_steps, self.whole_blocks = whole_steps, whole_blocks

    @torch.no_grad()
    def around(self, x: Float[Tensor, "B n D"], where: Where) -> BlockRun | None:
        """The block on the tokens that moved farthest; on all, to be remembered, at first."""
        k = keep_count(x.shape[1], self.keep_ratio)
        if where.block < self.whole_blocks or k == x.shape[1]:
            return None
        memory, step = where.memory, where.step
        if memory is None or step is None:
            raise ValueError("Refresh goes by the steps of a run, and they aren't known.")
        last: _Last | None = memory.get(where.block)
        if last is None or step < self.whole_steps:
            return BlockRun(finish=partial(_remembered, memory, where.block, x))
        moved = _moved(x - last.seen, halves=where.is_both)
        chosen = best_tokens(moved, k)
        return BlockRun(
            tokens=gather_tokens(x, chosen),
            keys=x if self.keys == "all" else None,
            finish=partial(_refreshed, memory, where.block, x, chosen, last),
        )


def _moved(change: Float[Tensor, "B N D"], *, halves: bool) -> Float[Tensor, "B N"]:
    """How far tokens have moved; with both passes in a batch, what guidance makes of that."""
    change = change.float()
    far = change.square().sum(dim=-1)
    if not halves:
        return far
    one, other = change.chunk(2)
    apart = (other - one).square().sum(dim=-1)
    return (far.unflatten(0, (2, -1)).sum(dim=0) + APART * apart).repeat(2, 1)


def _remembered(
    memory: dict[Any, Any], block: int, x: Float[Tensor, "B N D"], y: Float[Tensor, "B N D"]
) -> Float[Tensor, "B N D"]:
    """All tokens ran: as they are, and remembered."""
    memory[block] = _Last(x.detach(), (y - x).detach())
    return y


def _refreshed(
    memory: dict[Any, Any],
    block: int,
    x: Float[Tensor, "B N D"],
    chosen: Int[Tensor, "B k"],
    last: _Last,
    y: Float[Tensor, "B k D"],
) -> Float[Tensor, "B N D"]:
    """The chosen as they are, the others with their last update."""
    before = gather_tokens(x, chosen)
    update = scatter_tokens(last.update, chosen, y - before)
    memory[block] = _Last(scatter_tokens(last.seen, chosen, before), update.detach())
    return scatter_tokens(x + update, chosen, y)
