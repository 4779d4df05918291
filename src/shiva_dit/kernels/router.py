"""The router's scores in one pass over the tokens. The twin is `token_scores`."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor
from torch.library import wrap_triton

from shiva_dit.kernels.operators import INTERPRETED, operator

MAX_HIDDEN = 256
"""The largest d': a program holds all of a token's hidden units."""


@triton.jit
@no_type_check
def _read(
    h: tl.tensor,
    read: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """SiLU, norm and score of hidden units, (ROWS, HIDDEN), that are 0 past the last one."""
    unit = tl.arange(0, HIDDEN)
    real = unit < hidden
    h = h * tl.sigmoid(h)
    centre = h - (tl.sum(h, 1) / hidden)[:, None]
    centre = tl.where(real[None, :], centre, 0.0)
    deviation = tl.rsqrt(tl.sum(centre * centre, 1) / hidden + eps)
    weight = tl.load(read + unit, mask=real, other=0.0).to(tl.float32)
    return tl.sum(centre * deviation[:, None] * weight[None, :], 1)


@triton.jit
@no_type_check
def _score_kernel(
    x: tl.tensor,
    shift_of_sample: tl.tensor,
    weight: tl.tensor,
    read: tl.tensor,
    scores: tl.tensor,
    stride_sample: tl.tensor,
    stride_token: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    NORMALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> None:
    r"""Scores of a tile of tokens.

    The norm's statistics and the product are taken in the same pass, of tokens less a shift c,
    the mean of their first features:

        W (x - mu) / sigma = (W (x - c) - (mu - c) W 1) / sigma

    From the first n of D features, (c - mu)^2 <= sigma^2 D / n: however large the mean is against
    the deviation, at most a few deviations cancel.
    """
    dtype = x.dtype.element_ty
    operand = tl.float32 if WIDEN else dtype
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    sample = row // num_tokens
    tokens = x + sample * stride_sample + (row - sample * num_tokens) * stride_token
    column = tl.arange(0, BLOCK)
    unit = tl.arange(0, HIDDEN)
    real = unit < hidden
    product = tl.zeros((ROWS, HIDDEN), tl.float32)
    if NORMALIZE:
        begin = inside[:, None] & (column < width)[None, :]
        first = tl.load(tokens[:, None] + column[None, :], mask=begin, other=0.0).to(tl.float32)
        shift = tl.sum(first, 1) / tl.minimum(width, BLOCK)
        total = tl.zeros((ROWS,), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        weights = tl.zeros((HIDDEN,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + column
        known = at < width
        valid = inside[:, None] & known[None, :]
        tile = tl.load(tokens[:, None] + at[None, :], mask=valid, other=0.0)  # (ROWS, BLOCK)
        within = known[:, None] & real[None, :]
        matrix = tl.load(weight + at[:, None] + unit[None, :] * width, mask=within, other=0.0)
        matrix = matrix.to(dtype).to(operand)  # (BLOCK, HIDDEN)
        if NORMALIZE:
            centred = tl.where(known[None, :], tile.to(tl.float32) - shift[:, None], 0.0)
            total += tl.sum(centred, 1)
            squares += tl.sum(centred * centred, 1)
            weights += tl.sum(matrix.to(tl.float32), 0)
            if dtype == tl.float16:
                # Not normalised yet, tokens may lie outside the range of float16.
                size = tl.maximum(tl.max(tl.abs(centred), 1), 1e-30)[:, None]
                product += size * tl.dot((centred / size).to(dtype), matrix)
            else:
                centred = centred.to(dtype).to(operand)
                product = tl.dot(centred, matrix, product, input_precision="ieee")
        else:
            product = tl.dot(tile.to(operand), matrix, product, input_precision="ieee")
    if NORMALIZE:
        mean = total / width
        variance = tl.maximum(squares / width - mean * mean, 0.0)
        product -= mean[:, None] * weights[None, :]
        product *= tl.rsqrt(variance + 1e-5)[:, None]  # F.layer_norm's eps
    mask = inside[:, None] & real[None, :]
    context = tl.load(
        shift_of_sample + sample[:, None] * hidden + unit[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    found = _read(product + context, read, hidden, eps, HIDDEN)
    tl.store(scores + row, found, mask=inside)


@no_type_check
def _scores_of(
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    read: Tensor,
    normalize: bool,
    eps: float,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1]), dtype=torch.float32)


@operator("router_scores", _scores_of)
@no_type_check
def _score(
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    read: Tensor,
    normalize: bool,
    eps: float,
) -> Tensor:
    batch, num_tokens, width = x.shape
    scores = x.new_empty((batch, num_tokens), dtype=torch.float32)
    hidden = weight.shape[0]
    num_rows = batch * num_tokens
    rows = 64 if num_rows > 16384 else 32  # enough programs for a whole device
    units = max(16, triton.next_power_of_2(hidden))  # tensor cores take 16 at least
    # A tile of weights has 8192 numbers at most: two stages of both operands fit 96 KiB.
    block = max(32, min(128, 8192 // units))
    wrap_triton(_score_kernel)[(triton.cdiv(num_rows, rows),)](
        x,
        shift,
        weight,
        read,
        scores,
        x.stride(0),
        x.stride(1),
        num_tokens,
        num_rows,
        width,
        hidden,
        eps,
        NORMALIZE=normalize,
        # The interpreter multiplies the bits of bfloat16; in float32 the products are the same.
        WIDEN=INTERPRETED and x.dtype == torch.bfloat16,
        ROWS=rows,
        BLOCK=block,
        HIDDEN=units,
        num_warps=4,
        num_stages=2,
    )
    return scores


def router_scores(
    x: Float[Tensor, "B N D"],
    shift: Float[Tensor, "B H"],
    weight: Float[Tensor, "H D"],
    read: Float[Tensor, " H"],
    *,
    normalize_inputs: bool,
    eps: float,
) -> Float32[Tensor, "B N"]:
    r"""Scores of all tokens (Eq. 9): norm, projection, SiLU, norm and score in one launch.

    .. math:: s_i = w^T \mathrm{LN}(\mathrm{SiLU}(P_x x_i + h))

    Args:
        x: Tokens in single or half precision; only the features need lie together.
        shift: The context term h, with the bias of P_x.
        weight: P_x. Rounded to the dtype of x; products are summed in float32.
        read: w, with the gain of LN.
        normalize_inputs: Layer-normalise x first, without parameters.
        eps: Of LN.

    Returns:
        Scores in float32. Unlike the torch code, the projection isn't rounded to the dtype of x.

    Raises:
        ValueError: If d' is larger than 256 or x in double precision.
    """
    if weight.shape[0] > MAX_HIDDEN:
        raise ValueError(
            f"the kernel takes up to {MAX_HIDDEN} hidden units, got {weight.shape[0]}: leave "
            '"router_scores" out of the kernels in use.'
        )
    if x.dtype == torch.float64:
        raise ValueError(
            "the kernel sums in single precision, got float64: pass x.float(), or leave "
            '"router_scores" out of the kernels in use.'
        )
    tokens = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return _score(
        tokens,
        shift.contiguous(),
        weight.contiguous(),
        read,
        normalize_inputs,
        eps,
    )
