"""Token merge with attention (Lu et al. 2025, arXiv 2509.10918), from its formulas.

In each tile of the image a few tokens are chosen that together are most alike to all. The others
are mixed into these by a matrix, whose transpose mixes the outputs back. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.core.selection import keep_count
from shiva_dit.methods.base import Need, Reducer, Site, Where
from shiva_dit.methods.matching import cells, products, unit_rows
from shiva_dit.methods.plans import Plan

SHARPNESS = 1000.0
"""What cosines are multiplied by before the softmax over destinations."""


@dataclass(frozen=True, slots=True)
class TiledPlan(Plan):
    """In each tile m mixtures of its n tokens, and mixtures of these back.

    >>> plan = TiledPlan(torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[1, 0]]))
    >>> x = torch.tensor([[[1.0], [3.0]]])
    >>> plan.reduce(x).flatten(), plan.restore(plan.reduce(x), rest=x).flatten()
    (tensor([2.]), tensor([2., 2.]))
    """

    weights: Float[Tensor, "B G m n"]
    """How much of a token goes to each of the m: over these it sums to 1."""
    members: Int[Tensor, "G n"]
    """The tokens of each tile."""

    def reduce(self, x: Tensor) -> Tensor:
        """The weighted mean of each of the m."""
        mix = self.weights / self.weights.sum(dim=-1, keepdim=True)
        return (mix.to(x.dtype) @ x[:, self.members]).flatten(1, 2)  # (B, G m, D)

    def restore(self, y: Tensor, rest: Tensor) -> Tensor:
        """By the transpose."""
        del rest
        mixed = self.weights.mT.to(y.dtype) @ y.unflatten(1, self.weights.shape[1:3])
        return mixed.flatten(1, 2)[:, self.members.flatten().argsort()]


class ToMA(Reducer):
    """Mixes the tokens of each tile into those that stand for it best.

    Args:
        keep_ratio: Share of each tile's tokens that modules run on.
        sites: Around which modules.
        tile: Height and width of a tile in tokens; grids must be whole tiles.
        first_block: The blocks before it run on all tokens.
        destinations_every: Steps after which the tokens that stand for a tile are chosen anew.
        weights_every: Steps after which the matrix is; with new destinations it always is.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        keep_ratio: float = 0.75,
        *,
        sites: Sequence[Site] = ("attention", "feed_forward"),
        tile: tuple[int, int] = (8, 8),
        first_block: int = 1,
        destinations_every: int = 1,
        weights_every: int = 1,
    ) -> None:
        super().__init__()
        if min(*tile, destinations_every, weights_every) < 1:
            raise ValueError(
                "tile, destinations_every and weights_every must be 1 at least, got "
                f"{tile}, {destinations_every} and {weights_every}."
            )
        self.keep_ratio, self.tile, self.first_block = keep_ratio, tile, first_block
        self.kept = keep_count(tile[0] * tile[1], keep_ratio)
        """Tokens of each tile that are left."""
        self.destinations_every, self.weights_every = destinations_every, weights_every
        self.sites = tuple(sites)
        reuses = max(destinations_every, weights_every) > 1
        self.needs: tuple[Need, ...] = ("passes", "steps") if reuses else ("passes",)

    def count(self, num_tokens: int) -> int:
        """Tokens left of an image of whole tiles."""
        return num_tokens // (self.tile[0] * self.tile[1]) * self.kept

    @torch.no_grad()
    def plan(self, x: Float[Tensor, "B N D"], where: Where) -> Plan | None:
        """One matrix per block, by what the first of its modules is called with.

        Raises:
            ValueError: If the image isn't one of whole tiles.
        """
        if where.earlier is not None:
            return where.earlier
        high, wide = self.tile
        if where.block < self.first_block or self.kept == high * wide:
            return None
        if where.grid is None or where.grid[0] % high or where.grid[1] % wide:
            raise ValueError(
                f"ToMA needs an image of whole tiles of {high} x {wide} tokens, and this one's "
                f"size is {where.grid}: pass another tile=(height, width)."
            )
        members = cells(where.grid, self.tile, x.device)
        memory: dict[object, Tensor] = {} if where.memory is None else where.memory
        step, unit = where.step or 0, unit_rows(x)[:, members]  # (B, G, n, D)
        chosen, weights = (memory.get((where.block, what)) for what in ("chosen", "weights"))
        if chosen is None or step % self.destinations_every == 0:
            memory[where.block, "chosen"] = chosen = self._choose(unit, where.is_both)
            weights = None
        if weights is None or step % self.weights_every == 0:
            near = unit.take_along_dim(chosen[..., None], dim=2)  # (B, G, m, D)
            weights = (SHARPNESS * products(near, unit)).softmax(dim=2)
            memory[where.block, "weights"] = weights
        return TiledPlan(weights, members)

    def _choose(self, unit: Float[Tensor, "B G n D"], is_both: bool) -> Int[Tensor, "B G m"]:
        """The tokens that stand for each tile, the same in both passes of one batch."""
        similarity = products(unit, unit)
        if not is_both:
            return cover(similarity, self.kept)
        first, second = similarity.chunk(2)
        return cover((first + second) / 2, self.kept).repeat(2, 1, 1)


def cover(similarity: Float[Tensor, "*G n n"], m: int) -> Int[Tensor, "*G m"]:
    """The m tokens whose nearest similarity to all sums up highest, greedily one by one.

    >>> cover(torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.1], [0.0, 0.1, 1.0]]), 2)
    tensor([1, 2])
    """
    gain, chosen = similarity.sum(dim=-2), []
    covered = torch.full_like(gain, -torch.inf)
    taken = torch.zeros_like(gain, dtype=torch.bool)
    for _ in range(m):
        best = gain.masked_fill(taken, -1.0 - gain.shape[-1]).argmax(dim=-1, keepdim=True)
        chosen.append(best)
        taken = taken.scatter(-1, best, True)
        reached = similarity.take_along_dim(best[..., None, :], dim=-1).squeeze(-1)
        covered = torch.maximum(covered, reached)
        gain = (similarity - covered[..., None]).relu().sum(dim=-2)
    return torch.cat(chosen, dim=-1)
