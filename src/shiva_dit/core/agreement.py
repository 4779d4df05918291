"""How well two lists of numbers agree."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float | None:
    """Rank correlation in [-1, 1]; equal values share their mean rank.

    Returns:
        None for fewer than three values, or where all of one side are equal.

    >>> import torch
    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 9.0]))
    1.0
    """
    if len(x) < 3:
        return None
    a, b = (_ranks(values) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a.square().sum() * b.square().sum()))
    return float((a * b).sum()) / norm if norm else None


def _ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts - 1) / 2
    return middle.double()[inverse]


def sign_agreement(said: Float[Tensor, " n"], true: Float[Tensor, " n"]) -> float | None:
    """Share of equal signs among values that are both not 0, in [0, 1]; None if there are none."""
    both = (said != 0) & (true != 0)
    if not bool(both.any()):
        return None
    return float((said[both].sign() == true[both].sign()).double().mean())
