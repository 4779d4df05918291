"""Whether values differ by rounding alone: by that of a dtype, or of LoRAs fused and unfused."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

NARROW = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
"""What users and layerwise casting convert models to."""
FUSED = 0.8
"""Most that fusing and unfusing leave, as a share of the dtype's epsilon: 0.3 for one LoRA as large
as a third of the weight, 0.7 for two that are unfused in another order, thrice."""
FAINT = 0.05
"""So little, likewise, is too little to have a direction that could be told: some values are off by
one place, where a LoRA is large."""
DIRECTED = 1.35
"""How far the largest singular value of noise lies above its expectation at most (measured: 1.3 for
widths of 64, 1.1 for 1024). A LoRA of rank 32 that is 0.2% of a weight of width 1536, rounded to
bfloat16, is at 1.8, one of rank 1 at 5.5 or more."""


Path = tuple[torch.dtype, ...]
"""Dtypes that values went through, to come back: `model.half().float()`."""
PATHS: tuple[Path, ...] = ((), *permutations(NARROW, 1), *permutations(NARROW, 2))
"""Those that are told, the shortest first."""


def rounded(values: Tensor, path: Path) -> Tensor:
    """Values that went through these dtypes."""
    for dtype in path:
        values = values.to(dtype)
    return values


def paths_between(expected: Tensor, found: Tensor) -> list[Path]:
    """By which dtypes the expected values may have become these, exactly."""
    wide = found.float()
    ways = [(path, rounded(expected, path).to(found.dtype)) for path in PATHS]
    return [path for path, values in ways if torch.equal(values.float(), wide)]


def is_rounding(found: Tensor, expected: Tensor, coarse: float) -> bool:
    """Whether two differ as values do that LoRAs were added to and taken from.

    Rounding is small, and has no direction: what is left of a LoRA is a matrix of its rank.

    Args:
        found: Any shape.
        expected: Of the same.
        coarse: Epsilon of the coarsest dtype that either has had.
    """
    off = found.float() - expected.float()
    share = float(torch.linalg.vector_norm(off) / torch.linalg.vector_norm(expected.float()))
    if not share <= max(FUSED * coarse, 1e-5):  # nor NaN
        return False
    return share <= max(FAINT * coarse, 1e-5) or off.ndim < 2 or _direction(off) <= DIRECTED


def _direction(off: Tensor) -> float:
    """The largest singular value, in units of that of noise of the same norm.

    Rows and columns are first made alike, which no rank minds: where a weight is larger, its
    rounding is.
    """
    off = off.flatten(1)
    for dim in (1, 0, 1, 0):
        rms = off.square().mean(dim, keepdim=True).sqrt()
        off = off / torch.where(rms > 0, rms, 1.0)
    rows, columns = (int((off != 0).any(dim).sum()) for dim in (1, 0))
    start = torch.randn(off.shape[1], 4, generator=torch.Generator().manual_seed(0))
    vectors = start.to(off)
    for _ in range(12):
        vectors = torch.linalg.qr(off.T @ (off @ vectors)).Q
    largest = torch.linalg.vector_norm(off @ vectors, dim=0).max()
    expected = torch.linalg.vector_norm(off) * (rows**-0.5 + columns**-0.5)
    return float(largest / expected)
