"""The k best of each row in one launch. Its twin is `select_top_k` in `core/selection.py`.

Functions that Triton or torch's tracing reads are marked `no_type_check`: run-time type checks
would wrap them, and know no symbolic sizes.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.library import wrap_triton

from shiva_dit.kernels.operators import operator, rows_together


@triton.jit
@no_type_check
def _keys(scores: tl.tensor, at: tl.tensor, num_tokens: tl.tensor) -> tl.tensor:
    """Scores as int32 in the same order; past the end -2^31, which no score becomes."""
    inside = at < num_tokens
    score = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)  # -0.0 equals 0.0
    # Of negative numbers the larger has the smaller magnitude.
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = tl.where(score != score, 0x7FFFFFFF, keys)  # torch sorts NaN above all numbers
    return tl.where(inside, keys, -0x80000000)


@triton.jit
@no_type_check
def _count_from(
    scores: tl.tensor,
    keys: tl.tensor,
    bound: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
) -> tl.tensor:
    """How many keys are at least `bound`. Of a single tile they stay in registers."""
    if SINGLE:
        count = tl.sum((keys >= bound).to(tl.int32))
    else:
        count = tl.full((), 0, tl.int32)
        for start in range(0, num_tokens, BLOCK):
            tile = _keys(scores, start + tl.arange(0, BLOCK), num_tokens)
            count += tl.sum((tile >= bound).to(tl.int32))
    return count


@triton.jit
@no_type_check
def _select_kernel(
    scores: tl.tensor,
    indices: tl.tensor,
    places: tl.tensor,
    stride: tl.tensor,
    num_tokens: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
) -> None:
    """One program per sample: the k-th largest key bit by bit, then places by prefix sums."""
    sample = tl.program_id(0).to(tl.int64)
    scores += sample * stride
    indices += sample * k
    places += sample * num_tokens
    lane = tl.arange(0, BLOCK)
    keys = _keys(scores, lane, num_tokens)
    # The largest bound that k keys reach. Flipping the sign of -2^31 gives 0, and each further
    # bit is added; the count of the last bound that was too high is that of the keys above.
    bound = tl.full((), -0x80000000, tl.int32)
    num_above = tl.full((), 0, tl.int32)
    for step in range(32):
        higher = bound ^ (tl.full((), 1, tl.int32) << (31 - step))
        count = _count_from(scores, keys, higher, num_tokens, BLOCK, SINGLE)
        bound = tl.where(count >= k, higher, bound)
        num_above = tl.where(count >= k, num_above, count)
    num_ties = k - num_above  # the first of those that equal the bound
    above_before = tl.full((), 0, tl.int32)
    equal_before = tl.full((), 0, tl.int32)
    for start in range(0, num_tokens, BLOCK):
        at = start + lane
        if not SINGLE:
            keys = _keys(scores, at, num_tokens)
        above = keys > bound
        equal = keys == bound
        # Two counts in one scan, 16 bits each: a tile has at most 2^14 tokens.
        both = above.to(tl.int32) * 65536 + equal.to(tl.int32)
        seen = tl.cumsum(both, 0) - both
        ties = equal_before + (seen & 65535)
        place = above_before + (seen >> 16) + tl.minimum(ties, num_ties)
        chosen = above | (equal & (ties < num_ties))
        tl.store(indices + place, at.to(tl.int64), mask=chosen)
        tl.store(places + at, tl.where(chosen, place, -1), mask=at < num_tokens)
        total = tl.sum(both)
        above_before += total >> 16
        equal_before += total & 65535


@no_type_check
def _selected(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    batch, num_tokens = scores.shape
    indices = scores.new_empty((batch, k), dtype=torch.int64)
    return indices, scores.new_empty((batch, num_tokens), dtype=torch.int32)


@operator("select_top_k", _selected)
@no_type_check
def _select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    indices, places = _selected(scores, k)
    batch, num_tokens = scores.shape
    # By comparisons: where N is symbolic they bound it, and don't fix it.
    block, num_warps = 16384, 16
    if num_tokens <= 1024:
        block, num_warps = 1024, 4
    elif num_tokens <= 4096:
        block, num_warps = 4096, 8
    single = bool(num_tokens <= block)
    wrap_triton(_select_kernel)[(batch,)](
        scores,
        indices,
        places,
        scores.stride(0),
        num_tokens,
        k,
        BLOCK=block,
        SINGLE=single,
        num_warps=num_warps,
    )
    return indices, places


def select_top_k(
    scores: Float[Tensor, "B N"], k: int
) -> tuple[Int[Tensor, "B k"], Int32[Tensor, "B N"]]:
    """Indices of the k best in ascending order, and of every token its place among them.

    Args:
        scores: In single or half precision. Among equals the first win.
        k: In [1, N].

    Returns:
        Indices in [0, N), and places in [0, k), -1 for the tokens that are not chosen.

    Raises:
        ValueError: If k lies outside [1, N], or the scores are in double precision.
    """
    num_tokens = scores.shape[1]
    if not 1 <= k <= num_tokens:
        raise ValueError(f"k must lie in [1, N] = [1, {num_tokens}], got {k}.")
    if scores.dtype == torch.float64:
        raise ValueError(
            "the kernel compares scores in single precision, got float64: pass scores.float(), "
            "or use core.selection.select_top_k."
        )
    return _select(rows_together(scores), k)
