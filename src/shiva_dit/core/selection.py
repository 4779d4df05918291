"""Hard top-k selection: choose, gather, scatter (Eq. 3, 4, 32)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Share = Literal["either", "second"]
"""Which of two guidance halves decides what both keep."""


def keep_count(num_tokens: int, keep_ratio: float) -> int:
    """Tokens kept: k = floor(N r), at least 1, and N where r rounds to all tokens.

    Args:
        num_tokens: N, at least 1.
        keep_ratio: r in (0, 1]; from 1 - 1/(2N) on, all tokens are kept.

    Returns:
        k in [1, N].

    >>> keep_count(100, 0.29), keep_count(64, 1.0), keep_count(64, 0.001)
    (29, 64, 1)
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}.")
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}: it is the share KEPT.")
    if keep_ratio >= 1.0 - 0.5 / num_tokens:
        return num_tokens
    return max(1, int(num_tokens * keep_ratio + 1e-6))  # 100 * 0.29 is 28.999... in floats


def select_top_k(scores: Float[Tensor, "B N"], k: int) -> Int[Tensor, "B k"]:
    """Indices of the k best tokens in ascending order (Eq. 3); among equals the first win.

    Args:
        scores: Larger is better; finite.
        k: Tokens to keep, in [1, N].

    Returns:
        Indices in [0, N), strictly ascending in each row.

    Raises:
        ValueError: If k lies outside [1, N].

    >>> select_top_k(torch.tensor([[0.0, 2.0, 2.0, 2.0]]), 2)
    tensor([[1, 2]])
    """
    return best_tokens(scores, k).sort(dim=-1).values


def best_tokens(scores: Float[Tensor, "B N"], k: int) -> Int[Tensor, "B k"]:
    """The same tokens as `select_top_k`, the best first: a block doesn't ask for their order."""
    num_tokens = scores.shape[-1]
    if not 1 <= k <= num_tokens:
        raise ValueError(
            f"k must lie in [1, N] = [1, {num_tokens}], got {k}. "
            f"If k came from a schedule, build it with Schedule.for_tokens({num_tokens})."
        )
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


def share_between_halves(
    scores: Float[Tensor, "B N"], by: Share = "either"
) -> Float[Tensor, "B N"]:
    """Both guidance halves keep the same tokens: by the elementwise maximum (Eq. 32), or one's.

    Args:
        scores: The two halves one after the other; B is even.
        by: "either": what either half wants; "second": what the second one wants.

    Returns:
        The maximum of both halves, or the second, repeated.

    Raises:
        ValueError: If B is odd.

    >>> share_between_halves(torch.tensor([[1.0, 5.0], [4.0, 2.0]]))
    tensor([[4., 5.],
            [4., 5.]])
    """
    if scores.shape[0] % 2:
        raise ValueError(
            f"guidance halves need an even batch, got {scores.shape[0]} samples: the call is not "
            "a batched conditional and unconditional pass."
        )
    first, second = scores.chunk(2)
    return (torch.maximum(first, second) if by == "either" else second).repeat(2, 1)


def flat_rows(indices: Int[Tensor, "B k"], num_tokens: int) -> Int[Tensor, " B*k"]:
    """Row numbers of the chosen tokens in the (B * N, D) view.

    Whole rows by `index_select` and `index_copy` are several times faster than elementwise
    `gather` and `scatter` with an expanded index.
    """
    offsets = torch.arange(indices.shape[0], device=indices.device) * num_tokens
    return (indices + offsets[:, None]).flatten()


def gather_tokens(
    x: Shaped[Tensor, "B N D"], indices: Int[Tensor, "B k"]
) -> Shaped[Tensor, "B k D"]:
    """The chosen tokens of each sample, in the order of the indices.

    >>> gather_tokens(torch.arange(6.0).view(1, 3, 2), torch.tensor([[0, 2]]))
    tensor([[[0., 1.],
             [4., 5.]]])
    """
    batch, num_tokens, width = x.shape
    if batch == 1:
        return x.index_select(1, indices[0])
    rows = x.reshape(batch * num_tokens, width).index_select(0, flat_rows(indices, num_tokens))
    return rows.view(batch, indices.shape[1], width)


def scatter_tokens(
    base: Float[Tensor, "B N D"],
    indices: Int[Tensor, "B k"],
    updated: Float[Tensor, "B k D"],
) -> Float[Tensor, "B N D"]:
    """`base` with the chosen tokens replaced (Eq. 4): rejected tokens keep their value.

    Args:
        base: All tokens; not modified. Its dtype is the result's (safe under autocast).
        indices: The chosen tokens, distinct in each row.
        updated: Their new values.

    >>> scatter_tokens(torch.zeros(1, 3, 1), torch.tensor([[0, 2]]), torch.ones(1, 2, 1)).flatten()
    tensor([1., 0., 1.])
    """
    batch, num_tokens, width = base.shape
    updated = updated.to(base.dtype)
    copy = _Copied.apply if updated.requires_grad else torch.index_copy
    if batch == 1:
        return copy(base, 1, indices[0], updated)
    rows = updated.reshape(-1, width)
    flat = base.reshape(batch * num_tokens, width)
    return copy(flat, 0, flat_rows(indices, num_tokens), rows).view(batch, num_tokens, width)


class _Copied(torch.autograd.Function):
    """`index_copy`, which by itself keeps the new rows for backward: for their shape."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, dim: int, rows: Tensor, updated: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.dim = dim
        return base.index_copy(dim, rows, updated)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor]:
        (grad,), (rows,) = grads, ctx.saved_tensors
        rest = grad.index_fill(ctx.dim, rows, 0.0) if ctx.needs_input_grad[0] else None
        return rest, None, None, grad.index_select(ctx.dim, rows)
