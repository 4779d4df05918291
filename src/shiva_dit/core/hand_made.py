"""Schedules that are not learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from shiva_dit.core.anchor import ratios_from_logits
from shiva_dit.core.schedule import Schedule
from shiva_dit.core.time_law import UNIFORM, TimeLaw


def hand_made(
    target: float,
    *,
    depth: float,
    time: float,
    form: Literal["linear", "step"],
    num_blocks: int,
    num_bins: int,
    full_blocks: Sequence[int] = (0,),
    law: TimeLaw = UNIFORM,
) -> Schedule:
    r"""A schedule that is not learned: logits that rise or fall with depth and time.

    .. math:: r = \sigma(a\, u_l + b\, u_t + \text{anchor})

    where u goes from -1 in the first prunable block (at t = 0) to 1 in the last (at t = 1), and
    is only its sign with "step". The anchor makes the mean the target.

    Args:
        target: Mean keep ratio over the prunable blocks, in (0, 1].
        depth: a; positive keeps more in late blocks.
        time: b; positive keeps more in noise.
        form: "linear", or "step": two levels, halves of depth and time.
        num_blocks: L.
        num_bins: Time bins.
        full_blocks: Blocks that are never pruned.
        law: Whose steps the mean is over; the uniform law by default.

    >>> made = hand_made(0.5, depth=-9.0, time=0.0, form="step", num_blocks=5, num_bins=1)
    >>> [round(ratio, 2) for ratio in made.ratios[0]]
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    prunable = [block for block in range(num_blocks) if block not in full_blocks]

    def spread(count: int) -> torch.Tensor:
        u = torch.linspace(-1.0, 1.0, count) if count > 1 else torch.zeros(1)
        return u.sign() if form == "step" else u

    logits = torch.zeros(num_bins, num_blocks)
    logits[:, prunable] = depth * spread(len(prunable)) + time * spread(num_bins)[:, None]
    ratios = ratios_from_logits(logits, target, full_blocks, law.weights(num_bins))
    return Schedule(ratios=ratios, full_blocks=tuple(full_blocks), law=law)
