"""Scores of sets of pictures, at once of many sets drawn with replacement (bootstrap).

A set is a row of weights: how often each picture was drawn. The first row is the pictures
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.metrics import check_counts, moments

WITHIN = 1.96
"""Deviations of a normal law that hold 95%."""
ROWS = 2048
"""Of a matrix of kernels that is held at once."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

Kernel = Callable[[Tensor, Tensor], Tensor]
Measure = Callable[[Float[Tensor, "S N"]], Float[Tensor, " S"]]


def drawn(count: int, draws: int, *, seed: int = 0) -> Float[Tensor, "S N"]:
    """Weights of the pictures themselves, and of so many sets drawn from them.

    >>> drawn(3, 2).sum(1)
    tensor([3., 3., 3.], dtype=torch.float64)
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.ones(count, dtype=torch.float64)]
    for _ in range(draws):
        chosen = torch.randint(count, (count,), generator=generator)
        rows.append(torch.bincount(chosen, minlength=count).double())
    return torch.stack(rows)


def interval(values: Float[Tensor, " S"]) -> tuple[float, float] | None:
    """95% of what a score is, by how much it differs between sets drawn from the pictures.

    It lies about the pictures' own score: drawing with replacement adds to some scores by itself,
    as it does to Frechet's, and few sets are enough for a deviation.

    Returns:
        None of fewer than two sets.

    >>> interval(torch.tensor([5.0, 1.0, 2.0, 3.0]))
    (3.04, 6.96)
    """
    value, draws = float(values[0]), values[1:]
    if len(draws) < 2:
        return None
    off = WITHIN * float(draws.std())
    return value - off, value + off


def means(values: Float[Tensor, " N"]) -> Measure:
    """The mean of a score of each picture."""
    return lambda weights: weights @ values.double() / weights.sum(1)


def frechet(features: Float[Tensor, "N F"], reference: Float[Tensor, "M F"]) -> Measure:
    """Frechet distance, as `frechet_distance`, to a reference that is looked at once."""
    check_counts(features, reference)
    x = features.double()
    mean_y, cov_y = moments(reference)
    values, vectors = torch.linalg.eigh(cov_y)
    y = x @ (vectors * values.clamp_min(0).sqrt())  # (N, F), their products are x C y
    # Of N pictures in more than N dimensions, N x N holds all: the eigenvalues are the same.
    inner = y @ y.T if len(x) <= x.shape[1] else None

    def one(w: Float[Tensor, " N"]) -> Tensor:
        count = w.sum()
        mean = w @ x / count
        centred = x - mean
        trace = (w[:, None] * centred.square()).sum() / (count - 1)
        if inner is not None:
            rows = inner @ w / count
            middle = inner - rows - rows[:, None] + w @ rows / count
            root = w.sqrt()
            product = root[:, None] * middle * root / (count - 1)
        else:
            off = y - w @ y / count
            product = off.T @ (w[:, None] * off) / (count - 1)
        cross = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
        found = (mean - mean_y).square().sum() + trace + cov_y.trace() - 2.0 * cross
        return found.clamp_min(0.0)  # -1e-6 by rounding

    return lambda weights: torch.stack([one(w) for w in weights])


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel."""
    return (x @ y.T / x.shape[1] + 1.0).pow(3)


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's kernel, of features of length 1."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2.0 * x @ y.T
    return torch.exp(-squares / (2.0 * CMMD_SIGMA**2))


def kernel(features: Float[Tensor, "N F"], reference: Float[Tensor, "M F"]) -> Measure:
    """Kernel distance (KID), as `kernel_distance`: without bias, also of drawn sets.

    Pairs of a picture with itself are left out, however often it was drawn.
    """
    return _discrepancy(features, reference, cubic, biased=False)


def cmmd(features: Float[Tensor, "N F"], reference: Float[Tensor, "M F"]) -> Measure:
    """CMMD (Jayasumana et al. 2024) of CLIP's features of length 1, times 1,000 as published."""
    found = _discrepancy(features, reference, gaussian, biased=True)
    return lambda weights: CMMD_SCALE * found(weights)


def _discrepancy(
    features: Float[Tensor, "N F"], reference: Float[Tensor, "M F"], k: Kernel, *, biased: bool
) -> Measure:
    check_counts(features, reference)
    x, y = features.double(), reference.double()
    own = torch.cat([k(rows, rows).diagonal() for rows in x.split(ROWS)])  # (N,)

    def pairs(w: Float[Tensor, "S N"], rows: Tensor, itself: Tensor) -> Tensor:
        total = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        for start, part in _parts(rows):
            total += (w[:, start : start + len(part)] @ k(part, rows) * w).sum(1)
        count = w.sum(1)
        if biased:
            return total / count.square()
        squares = w.square()
        return (total - squares @ itself) / (count.square() - squares.sum(1))

    def measure(w: Float[Tensor, "S N"]) -> Tensor:
        across = torch.cat([k(part, y).mean(1) for _, part in _parts(x)])
        even = torch.ones(1, len(y), dtype=torch.float64, device=w.device)
        own_y = torch.cat([k(rows, rows).diagonal() for rows in y.split(ROWS)])
        return pairs(w, x, own) + pairs(even, y, own_y) - 2.0 * w @ across / w.sum(1)

    return measure


def _parts(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), ROWS):
        yield start, rows[start : start + ROWS]
