"""Places, gather and scatter in one launch each. Their twins are in `core/selection.py`.

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

from shiva_dit.kernels.operators import operator, rows_together

# What Triton loads and stores on every device; other dtypes are copied as integers.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32}


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
    x, indices = rows_together(x), indices.contiguous()
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
    added = None if update is None else rows_together(update)
    return _scatter(rows_together(base), places.contiguous(), rows_together(updated), added)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program, about 4096 values of a token that is wide."""
    if width <= 64:
        return 64, 64
    return (16, 256) if width <= 256 else (8, 512)
