"""Token Merging for Stable Diffusion (Bolya & Hoffman 2023, arXiv 2303.17604), from its formulas.

Before a module, tokens that are alike are replaced by their mean; after it, each of them gets a
copy of what the mean got. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.core.selection import keep_count
from shiva_dit.methods.base import Reducer, Site, Where
from shiva_dit.methods.matching import destinations, draws, merged
from shiva_dit.methods.plans import AssignPlan, Plan


class ToMeSD(Reducer):
    """Merges the most alike tokens around modules of every block.

    One token of each cell of the image is a destination, all others are sources. A source's mate is
    the destination nearest to it by cosine; the sources nearest to their mates are merged.

    Args:
        keep_ratio: Share of the tokens that a module runs on; at least one of each cell stays.
        sites: Around which modules. The paper advises self-attention alone.
        cell: Height and width of a cell in tokens. What a grid has beyond whole cells are sources.
        random: Whether a cell's destination is drawn, or its first token.
        seed: Of these draws, which depend on seed, block and time alone: both passes of guidance
            get the same, batched or not.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        keep_ratio: float = 0.5,
        *,
        sites: Sequence[Site] = ("attention",),
        cell: tuple[int, int] = (2, 2),
        random: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        height, width = cell
        if height < 1 or width < 1 or height * width < 2:
            raise ValueError(f"a cell must have two tokens at least, got {height} x {width}.")
        if not 1 / (height * width) <= keep_ratio <= 1.0:
            raise ValueError(
                f"keep_ratio must lie in [1/{height * width}, 1] with cells of {height} x {width} "
                f"(one token of each stays), got {keep_ratio}: it is the share KEPT."
            )
        known = ("attention", "cross_attention", "feed_forward", "block")
        if not sites or any(site not in known for site in sites):
            raise ValueError(f"sites must be some of {', '.join(known)}, got {tuple(sites)}.")
        self.keep_ratio, self.cell, self.random, self.seed = keep_ratio, cell, random, seed
        self.sites = tuple(sites)

    def count(self, num_tokens: int) -> int:
        """Tokens left: as many as a selection of that ratio keeps."""
        return keep_count(num_tokens, self.keep_ratio)

    def seeded(self, seed: int) -> ToMeSD:
        """Another one with these settings."""
        return type(self)(
            self.keep_ratio, sites=self.sites, cell=self.cell, random=self.random, seed=seed
        )

    def plan(self, x: Float[Tensor, "B N D"], where: Where) -> Plan | None:
        """Matched once per block, by what the first of its modules is called with.

        Raises:
            ValueError: If nothing says what the image's grid is.
        """
        if where.earlier is not None:
            return where.earlier
        if where.grid is None:
            name = type(self).__name__
            raise ValueError(f"{name} merges neighbours on a grid, and the image's is not known.")
        num_merged = x.shape[1] - self.count(x.shape[1])
        if not num_merged:
            return None
        rows, columns = (side // step for side, step in zip(where.grid, self.cell, strict=True))
        if self.random:
            offsets = self._draw(rows * columns, where, x.device).view(rows, columns)
        else:
            offsets = torch.zeros(rows, columns, dtype=torch.long, device=x.device)
        return self.merge(x, destinations(where.grid, self.cell, offsets), num_merged, where)

    def merge(
        self,
        x: Float[Tensor, "B N D"],
        places: Int[Tensor, " M"],
        num_merged: int,
        where: Where,
    ) -> AssignPlan:
        """How sources become one with their destinations."""
        del where
        return merged(x, places, num_merged)

    def _draw(self, number: int, where: Where, device: torch.device) -> Int[Tensor, " M"]:
        """A token of each cell."""
        return draws(number, self.seed, where, device).remainder(self.cell[0] * self.cell[1])
