"""Ratios out of logits, moved alike to any mean: one trained policy serves any budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ratios_from_logits(
    logits: torch.Tensor,
    target: float,
    full_blocks: Sequence[int],
    weights: Sequence[float] | None = None,
) -> tuple[tuple[float, ...], ...]:
    """Ratios sigmoid(logit + shift), the shift chosen so that their mean is the target exactly.

    This is how one trained policy serves any budget: its shape stays, its anchor moves.

    Args:
        logits: Of shape (bins, blocks).
        target: Mean keep ratio over the prunable blocks, in (0, 1].
        full_blocks: Blocks whose ratio is 1.
        weights: How much each bin counts for the mean; all alike by default.
    """
    if not 0.0 < target <= 1.0:
        raise ValueError(f"target keep ratio must lie in (0, 1], got {target}.")
    wide = logits.detach().double().cpu()
    prunable = [block for block in range(wide.shape[1]) if block not in full_blocks]
    ratios = torch.ones_like(wide)
    if target < 1.0 and prunable:
        shift = anchor_shift(wide, target, full_blocks, weights)
        ratios[:, prunable] = torch.sigmoid(wide[:, prunable] + shift).clamp_min(1e-6)
    return tuple(tuple(row) for row in ratios.tolist())


def shifted_logits(
    logits: torch.Tensor,
    target: float,
    full_blocks: Sequence[int],
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """The logits with `anchor_shift` added, and its gradient: what moves all alike has none.

    The shift s solves mean(sigmoid(logits + s)) = target, so ds is minus the mean of the logits'
    changes, each weighed by its sigmoid's slope.

    Args:
        logits: Of shape (bins, blocks), with at least one block that may be pruned.
        target: Mean keep ratio over the prunable blocks, in (0, 1).
        full_blocks: Blocks that don't count.
        weights: How much each bin counts for the mean; all alike by default.
    """
    moved = logits + anchor_shift(logits, target, full_blocks, weights)
    chosen = moved[:, [block for block in range(moved.shape[1]) if block not in full_blocks]]
    ratios = torch.sigmoid(chosen)
    by_row = ratios.new_tensor(weights or [1.0] * len(ratios))
    mean = by_row @ ratios.mean(1)
    slope = by_row @ (ratios * (1.0 - ratios)).mean(1).detach()
    return moved - (mean - mean.detach()) / slope


def anchor_shift(
    logits: torch.Tensor,
    target: float,
    full_blocks: Sequence[int],
    weights: Sequence[float] | None = None,
) -> float:
    """What to add to logits of ratios so that the mean ratio is the target.

    Args:
        logits: Of shape (bins, blocks), with at least one block that may be pruned.
        target: Mean keep ratio over the prunable blocks, in (0, 1).
        full_blocks: Blocks that don't count.
        weights: How much each bin counts for the mean; all alike by default.
    """
    wide = logits.detach().double().cpu()
    chosen = wide[:, [block for block in range(wide.shape[1]) if block not in full_blocks]]
    by_row = torch.tensor(weights or [1.0] * len(wide), dtype=torch.float64)
    by_row = by_row / by_row.sum()
    low, high = -40.0 - float(chosen.max()), 40.0 - float(chosen.min())
    for _ in range(200):
        middle = 0.5 * (low + high)
        if float(by_row @ torch.sigmoid(chosen + middle).mean(1)) < target:
            low = middle
        else:
            high = middle
    return high
