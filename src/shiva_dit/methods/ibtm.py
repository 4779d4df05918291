"""Importance-based token merging (Wu et al. 2025, arXiv 2411.16720), from its formulas.

What guidance changed least at the step before is merged: the N - k least important tokens, each
into the mean with its nearest one of some important tokens. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.core.selection import best_tokens, keep_count
from shiva_dit.methods.base import Need, Reducer, Site, Where
from shiva_dit.methods.matching import draws
from shiva_dit.methods.plans import AssignPlan, Plan

PUBLISHED = range(7, 21)
"""Blocks of the published code, of PixArt's 28."""


class IBTM(Reducer):
    """Merges the tokens that guidance changed least into near ones that it changed more.

    The first step of a run, which has no guidance before it, runs on all tokens.

    Args:
        keep_ratio: Share of the tokens that a module runs on.
        sites: Around which modules.
        blocks: In which blocks; by default 7 to 20 as published, and the middle half of a model
            that hasn't as many.
        seed: Of the draws of destinations, which depend on seed, block and time alone.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs: tuple[Need, ...] = ("steps", "guidance")

    def __init__(
        self,
        keep_ratio: float = 0.75,
        *,
        sites: Sequence[Site] = ("attention",),
        blocks: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        keep_count(1, keep_ratio)  # refuses what is no ratio
        self.keep_ratio, self.blocks, self.seed = keep_ratio, blocks, seed
        self.sites = tuple(sites)

    def count(self, num_tokens: int) -> int:
        """Tokens left, from the second step on."""
        return keep_count(num_tokens, self.keep_ratio)

    def seeded(self, seed: int) -> IBTM:
        """Another one with these settings."""
        return IBTM(self.keep_ratio, sites=self.sites, blocks=self.blocks, seed=seed)

    def plan(self, x: Float[Tensor, "B N D"], where: Where) -> Plan | None:
        """By the guidance of the step before; both passes of an image merge alike.

        Raises:
            ValueError: If a block that was named isn't there.
        """
        if where.earlier is not None:
            return where.earlier
        batch, num_tokens, _ = x.shape
        k, importance = self.count(num_tokens), where.guidance
        if importance is None or k == num_tokens or where.block not in self._blocks(where):
            return None
        assert where.grid is not None
        if batch % len(importance):
            raise ValueError(
                f"a call of {batch} samples isn't one of {len(importance)} images, each once or "
                "in both passes of guidance."
            )
        order = draws(num_tokens, self.seed, where, x.device)
        group = by_importance(importance, where.grid, k, order)
        return AssignPlan(group.repeat(batch // len(group), 1), k)

    def _blocks(self, where: Where) -> Sequence[int]:
        if where.num_blocks is None:
            raise ValueError("IBTM works in the middle of the blocks: it needs their number.")
        last = where.num_blocks - 1
        if self.blocks is None:
            quarter = where.num_blocks // 4
            middle = range(quarter, where.num_blocks - quarter)
            return PUBLISHED if last >= PUBLISHED[-1] else middle
        if not self.blocks or not all(0 <= block <= last for block in self.blocks):
            raise ValueError(f"blocks must be some of 0 to {last}, got {tuple(self.blocks)}.")
        return self.blocks


@torch.no_grad()
def by_importance(
    importance: Float[Tensor, "b N"],
    grid: tuple[int, int],
    k: int,
    order: Int[Tensor, " N"],
) -> Int[Tensor, "b N"]:
    """The group of each token: the k most important are one each, in ascending order.

    A quarter of the image's tokens, but at most all of these k, are destinations. Every other token
    goes to the nearest one on the grid; of equally near ones to the one that was drawn first.

    Args:
        importance: Larger is kept sooner; among equals the first.
        grid: Height and width.
        k: Tokens that are left.
        order: Drawn numbers: the important tokens of the smallest ones are destinations.

    >>> by_importance(torch.tensor([[1.0, 9.0, 8.0, 2.0]]), (1, 4), 2, torch.tensor([3, 2, 1, 0]))
    tensor([[1, 0, 1, 1]])
    """
    batch, num_tokens = importance.shape
    ranked = best_tokens(importance, num_tokens)
    kept, rest = ranked[:, :k].sort(dim=1).values, ranked[:, k:]
    first = order[kept].argsort(dim=1)[:, : max(1, min(num_tokens // 4, k))]
    near = kept.gather(1, first)  # (b, M), in the order of the draws
    down = rest[:, :, None] // grid[1] - near[:, None] // grid[1]
    along = rest[:, :, None] % grid[1] - near[:, None] % grid[1]
    distance = (down.square() + along.square()) * near.shape[1]  # (b, N - k, M)
    nearest = (distance + torch.arange(near.shape[1], device=order.device)).argmin(dim=-1)
    own = torch.arange(k, device=order.device).expand(batch, -1)
    group = ranked.new_empty(batch, num_tokens).scatter(1, kept, own)
    return group.scatter(1, rest, first.gather(1, nearest))
