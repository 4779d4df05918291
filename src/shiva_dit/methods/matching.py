"""What merging methods share: draws of chance, destinations, and sources matched to them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from shiva_dit.core.selection import gather_tokens
from shiva_dit.methods.base import Where
from shiva_dit.methods.plans import AssignPlan

MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Odd numbers that spread bits (those of SplitMix64), in 64 bits with a sign."""


def draws(number: int, seed: int, where: Where, device: torch.device) -> Int[Tensor, " n"]:
    """Numbers in [-2^43, 2^43) by chance: mixed bits of seed, block, time and their places."""
    bits = torch.arange(number, device=device)
    time = torch.zeros((), device=device) if where.time is None else where.time
    for key in (seed, where.block, time.view(torch.int32).long()):
        bits = (bits + key) * MIX[0]
        bits = (bits ^ (bits >> 30)) * MIX[1]
        bits = (bits ^ (bits >> 27)) * MIX[2]
        bits = bits ^ (bits >> 31)
    return bits >> 20


def unit_rows(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Tokens of length 1 in float32 at least: their products are cosines."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def products(
    one: Float[Tensor, "*B m D"], other: Float[Tensor, "*B n D"]
) -> Float[Tensor, "*B m n"]:
    """Of each row with each other one, in their own bits, also where autocast would take fewer."""
    with torch.autocast(one.device.type, enabled=False):
        return one @ other.mT


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


def cells(grid: tuple[int, int], cell: tuple[int, int], device: Any) -> Int[Tensor, "M n"]:
    """The tokens of each whole cell, in the order of their offsets.

    >>> cells((2, 4), (2, 2), None)
    tensor([[0, 1, 4, 5],
            [2, 3, 6, 7]])
    """
    (high, wide), (down, along) = cell, (grid[0] // cell[0], grid[1] // cell[1])
    tokens = torch.arange(grid[0] * grid[1], device=device).view(grid)
    whole = tokens[: down * high, : along * wide].reshape(down, high, along, wide)
    return whole.transpose(1, 2).reshape(down * along, high * wide)


@torch.no_grad()
def merged(
    x: Float[Tensor, "B N D"],
    destinations: Int[Tensor, "*B M"],
    num_merged: int,
    bonus: Float[Tensor, "B N"] | None = None,
) -> AssignPlan:
    """The sources most alike to a destination, merged into it; the others stay alone.

    Args:
        x: The tokens.
        destinations: The same for all samples, or of each.
        num_merged: Sources that merge.
        bonus: What is added to a source's similarity in their order.

    Raises:
        ValueError: If there are too few sources, or no destinations.
    """
    batch, num_tokens, _ = x.shape
    num_places = destinations.shape[-1]
    others = num_tokens - num_places
    if num_merged > others or not num_places:
        raise ValueError(
            f"{num_merged} of {num_tokens} tokens can't be merged into {num_places} of "
            "them: take other cells, or keep more."
        )
    places = destinations.view(-1, num_places)
    is_source = torch.ones(len(places), num_tokens, dtype=torch.int8, device=x.device)
    sources = is_source.scatter(1, places, 0).argsort(dim=1, descending=True, stable=True)
    sources = sources[:, :others].expand(batch, -1)  # (B, N - M), ascending
    places = places.expand(batch, -1)
    unit = unit_rows(x)
    cosines = products(gather_tokens(unit, sources), gather_tokens(unit, places))  # (B, N - M, M)
    best, mate = cosines.max(dim=-1)
    if bonus is not None:
        best = best + bonus.gather(1, sources)
    rank = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    alone = others - num_merged  # these are the first groups; those of destinations follow
    found = torch.where(rank < num_merged, alone + mate, rank - num_merged)
    own = torch.arange(alone, num_tokens - num_merged, device=x.device).expand(batch, -1)
    group = found.new_empty(batch, num_tokens).scatter(1, sources, found).scatter(1, places, own)
    return AssignPlan(group, num_tokens - num_merged)


@torch.no_grad()
def merged_cells(
    x: Float[Tensor, "B N D"],
    members: Int[Tensor, "M n"],
    num_cells: int,
    bonus: Float[Tensor, "B N"],
) -> AssignPlan:
    """The cells whose tokens are most alike, one group each; all other tokens are alone.

    Args:
        x: The tokens.
        members: Those of each cell.
        num_cells: Cells that merge: their groups are the last ones.
        bonus: Its mean over a cell is added to the mean cosine of all pairs of its tokens.

    Raises:
        ValueError: If there are too few cells.
    """
    size = members.shape[1]
    alone = x.shape[1] - num_cells * size
    if num_cells > len(members):
        raise ValueError(f"{num_cells} of {len(members)} cells can't be merged: keep more tokens.")
    # The mean of all cosines is the squared length of the mean of unit vectors.
    alike = unit_rows(x)[:, members].mean(dim=2).square().sum(dim=-1)  # (B, M)
    best = (alike + bonus[:, members].mean(dim=-1)).argsort(dim=1, descending=True, stable=True)
    chosen = members[best[:, :num_cells]].flatten(1)
    is_alone = torch.ones(x.shape[:2], dtype=torch.long, device=x.device).scatter(1, chosen, 0)
    own = torch.arange(alone, alone + num_cells, device=x.device).repeat_interleave(size)
    group = (is_alone.cumsum(dim=1) - 1).scatter(1, chosen, own.expand(len(x), -1))
    return AssignPlan(group, alone + num_cells)
