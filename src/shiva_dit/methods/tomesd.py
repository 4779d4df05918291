"""Token Merging for Stable Diffusion (Bolya & Hoffman 2023, arXiv 2303.17604), from its formulas.

Before a module, tokens that are alike are replaced by their mean; after it, each of them gets a
copy of what the mean got. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from shiva_dit.core.selection import keep_count
from shiva_dit.methods.base import Reducer, Site, Where
from shiva_dit.methods.plans import AssignPlan, Plan

MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Odd numbers that spread bits (those of SplitMix64), in 64 bits with a sign."""


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
        return ToMeSD(
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
            raise ValueError("ToMeSD merges neighbours on a grid, and the image's is not known.")
        num_merged = x.shape[1] - self.count(x.shape[1])
        if not num_merged:
            return None
        rows, columns = (side // step for side, step in zip(where.grid, self.cell, strict=True))
        if self.random:
            offsets = self._draw(rows * columns, where, x.device).view(rows, columns)
        else:
            offsets = torch.zeros(rows, columns, dtype=torch.long, device=x.device)
        return merged(x, destinations(where.grid, self.cell, offsets), num_merged)

    def _draw(self, number: int, where: Where, device: torch.device) -> Int[Tensor, " M"]:
        """A token of each cell, by mixed bits of seed, block, time and cell."""
        bits = torch.arange(number, device=device)
        time = torch.zeros((), device=device) if where.time is None else where.time
        for key in (self.seed, where.block, time.view(torch.int32).long()):
            bits = (bits + key) * MIX[0]
            bits = (bits ^ (bits >> 30)) * MIX[1]
            bits = (bits ^ (bits >> 27)) * MIX[2]
            bits = bits ^ (bits >> 31)
        return (bits >> 20).remainder(self.cell[0] * self.cell[1])


def destinations(
    grid: tuple[int, int], cell: tuple[int, int], offsets: Int[Tensor, "h w"]
) -> Int[Tensor, " M"]:
    """The destination of each cell, as a place among the grid's tokens, from that in the cell.

    >>> destinations((2, 4), (2, 2), torch.tensor([[0, 3]]))
    tensor([0, 7])
    """
    down, along = offsets.shape
    device = offsets.device
    rows = torch.arange(down, device=device)[:, None] * cell[0] + offsets // cell[1]
    columns = torch.arange(along, device=device) * cell[1] + offsets % cell[1]
    return (rows * grid[1] + columns).flatten()


@torch.no_grad()
def merged(
    x: Float[Tensor, "B N D"], destinations: Int[Tensor, " M"], num_merged: int
) -> AssignPlan:
    """The sources most alike to a destination, merged into it; the others stay alone.

    Raises:
        ValueError: If there are too few sources, or no destinations.
    """
    batch, num_tokens, _ = x.shape
    others = num_tokens - len(destinations)
    if num_merged > others or not len(destinations):
        raise ValueError(
            f"{num_merged} of {num_tokens} tokens can't be merged into {len(destinations)} of "
            "them: take other cells, or keep more."
        )
    is_source = torch.ones(num_tokens, dtype=torch.int8, device=x.device)
    sources = is_source.index_fill(0, destinations, 0).argsort(descending=True, stable=True)
    sources = sources[:others]  # (N - M,), ascending
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    cosines = unit[:, sources] @ unit[:, destinations].mT  # (B, N - M, M)
    best, mate = cosines.max(dim=-1)
    place = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    alone = others - num_merged  # these are the first groups; those of destinations follow
    group = torch.empty(batch, num_tokens, dtype=torch.long, device=x.device)
    group[:, sources] = torch.where(place < num_merged, alone + mate, place - num_merged)
    group[:, destinations] = torch.arange(alone, num_tokens - num_merged, device=x.device)
    return AssignPlan(group, num_tokens - num_merged)
