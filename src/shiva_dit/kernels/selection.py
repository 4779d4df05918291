"""Top-k, gather and scatter in one launch each. Their twins are in `core/selection.py`.

Functions that Triton or torch's tracing reads are marked `no_type_check`: run-time type checks
would wrap them, and know no symbolic sizes.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32, Shaped
from torch import Tensor
from torch.library import wrap_triton

from shiva_dit.kernels.operators import operator

# What Triton loads and stores on every device; other dtypes are copied as integers.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32}


# --- top-k ----------------------------------------------------------------------------------


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
    return _select(_rows_together(scores), k)


# --- places ---------------------------------------------------------------------------------


@triton.jit
@no_type_check
def _places_kernel(
    indices: tl.tensor, places: tl.tensor, num_tokens: tl.tensor, k: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """One program per sample, so that a barrier separates filling from placing."""
    sample = tl.program_id(0).to(tl.int64)
    indices += sample * k
    places += sample * num_tokens
    lane = tl.arange(0, BLOCK)
    for start in range(0, num_tokens, BLOCK):
        tl.store(places + start + lane, -1, mask=start + lane < num_tokens)
    tl.debug_barrier()
    for start in range(0, k, BLOCK):
        place = start + lane
        index = tl.load(indices + place, mask=place < k, other=0)
        tl.store(places + index, place, mask=place < k)


@no_type_check
def _placed(indices: Tensor, num_tokens: int) -> Tensor:
    return indices.new_empty((indices.shape[0], num_tokens), dtype=torch.int32)


@operator("places_of", _placed)
@no_type_check
def _place(indices: Tensor, num_tokens: int) -> Tensor:
    places = _placed(indices, num_tokens)
    batch, k = indices.shape
    wrap_triton(_places_kernel)[(batch,)](indices, places, num_tokens, k, BLOCK=1024, num_warps=8)
    return places


def places_of(indices: Int[Tensor, "B k"], num_tokens: int) -> Int32[Tensor, "B N"]:
    """The inverse of a choice: of every token its place among the chosen ones, or -1.

    Args:
        indices: Distinct in each row, in [0, N), in any order.
        num_tokens: N.
    """
    return _place(indices.contiguous(), num_tokens)


# --- gather ---------------------------------------------------------------------------------


@triton.jit
@no_type_check
def _gather_kernel(
    x: tl.tensor,
    indices: tl.tensor,
    out: tl.tensor,
    stride_sample: tl.tensor,
    stride_token: tl.tensor,
    k: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    index = tl.load(indices + row, mask=inside, other=0).to(tl.int64)
    source = (row // k) * stride_sample + index * stride_token
    mask = inside[:, None] & (column < width)[None, :]
    values = tl.load(x + source[:, None] + column[None, :], mask=mask)
    tl.store(out + row[:, None] * width + column[None, :], values, mask=mask)


@no_type_check
def _gathered(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], indices.shape[1], x.shape[2]))


@operator("gather_tokens", _gathered)
@no_type_check
def _gather(x: Tensor, indices: Tensor) -> Tensor:
    out = _gathered(x, indices)
    batch, k, width = out.shape
    rows, block = _tile(width)
    wrap_triton(_gather_kernel)[(triton.cdiv(batch * k, rows), triton.cdiv(width, block))](
        x,
        indices,
        out,
        x.stride(0),
        x.stride(1),
        k,
        batch * k,
        width,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
    return out


def gather_tokens(
    x: Shaped[Tensor, "B N D"], indices: Int[Tensor, "B k"]
) -> Shaped[Tensor, "B k D"]:
    """The chosen tokens of each sample, in the order of the indices.

    Args:
        x: Of any dtype; only the features need lie together.
        indices: In [0, N): others read foreign memory.
    """
    x, indices = _rows_together(x), indices.contiguous()
    if x.dtype in _PLAIN:
        return _gather(x, indices)
    # As whole numbers of the same size, 8 bytes at most.
    whole = x.view(_WHOLE.get(x.dtype.itemsize, torch.int64))
    return _gather(whole, indices).view(x.dtype)


# --- scatter --------------------------------------------------------------------------------


@triton.jit
@no_type_check
def _scatter_kernel(
    base: tl.tensor,
    places: tl.tensor,
    updated: tl.tensor,
    update: tl.tensor,
    out: tl.tensor,
    base_sample: tl.tensor,
    base_token: tl.tensor,
    updated_sample: tl.tensor,
    updated_token: tl.tensor,
    update_sample: tl.tensor,
    update_token: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Every row is read from one of both sides and written once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    sample = row // num_tokens
    token = row - sample * num_tokens
    place = tl.load(places + row, mask=inside, other=-1).to(tl.int64)
    chosen = place >= 0
    columns = (column < width)[None, :]
    rejected = (inside & (place < 0))[:, None] & columns
    source = sample * updated_sample + place * updated_token
    new = tl.load(updated + source[:, None] + column[None, :], mask=chosen[:, None] & columns)
    source = sample * base_sample + token * base_token
    old = tl.load(base + source[:, None] + column[None, :], mask=rejected)
    if UPDATE:
        source = sample * update_sample + token * update_token
        old += tl.load(update + source[:, None] + column[None, :], mask=rejected)
    dtype = out.dtype.element_ty
    values = tl.where(chosen[:, None], new.to(dtype), old.to(dtype))
    target = out + row[:, None] * width + column[None, :]
    tl.store(target, values, mask=inside[:, None] & columns)


@no_type_check
def _scattered(base: Tensor, places: Tensor, updated: Tensor, update: Tensor | None) -> Tensor:
    return base.new_empty(base.shape)


@operator("scatter_tokens", _scattered)
@no_type_check
def _scatter(base: Tensor, places: Tensor, updated: Tensor, update: Tensor | None) -> Tensor:
    out = _scattered(base, places, updated, update)
    batch, num_tokens, width = base.shape
    added = base if update is None else update
    rows, block = _tile(width)
    num_rows = batch * num_tokens
    wrap_triton(_scatter_kernel)[(triton.cdiv(num_rows, rows), triton.cdiv(width, block))](
        base,
        places,
        updated,
        added,
        out,
        base.stride(0),
        base.stride(1),
        updated.stride(0),
        updated.stride(1),
        added.stride(0),
        added.stride(1),
        num_tokens,
        num_rows,
        width,
        UPDATE=update is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
    return out


def scatter_tokens(
    base: Float[Tensor, "B N D"],
    places: Int32[Tensor, "B N"],
    updated: Float[Tensor, "B k D"],
    update: Float[Tensor, "B N D"] | None = None,
) -> Float[Tensor, "B N D"]:
    """`base` with the chosen tokens replaced; rejected ones keep their value, or add `update`.

    Args:
        base: All tokens; not modified. Its dtype is the result's.
        places: Of every token its place among the chosen ones, or -1 (`places_of`).
        updated: The chosen tokens' new values.
        update: What is added to rejected tokens.
    """
    added = None if update is None else _rows_together(update)
    return _scatter(_rows_together(base), places.contiguous(), _rows_together(updated), added)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program, about 4096 values of a token that is wide."""
    if width <= 64:
        return 64, 64
    return (16, 256) if width <= 256 else (8, 512)


def _rows_together(x: Tensor) -> Tensor:
    """Slices of a larger tensor stay where they are; only the last axis must be dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
