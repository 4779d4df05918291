"""Temperatures over training."""

from __future__ import annotations


def anneal(start: float, end: float, progress: float) -> float:
    """Temperature after a share of training: exponential from `start` to `end`.

    Args:
        start: Positive.
        end: Positive.
        progress: Share of the steps done; values outside [0, 1] mean the nearer end.

    >>> round(anneal(0.2, 0.02, 0.5), 4)
    0.0632
    """
    if min(start, end) <= 0:
        raise ValueError(f"temperatures must be positive, got {start} and {end}.")
    return start * (end / start) ** min(max(progress, 0.0), 1.0)
