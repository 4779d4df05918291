r"""Soft ranks and inclusion scores (Eq. 5, 6, 16-20, 30), with O(N) saved memory.

A soft rank compares each score with all others. The logistic function is a short sum of
exponentials, and a sum of exponentials over sorted scores is a prefix sum, so ranks and their
gradients take O(N log N) time instead of N x N comparisons:

.. math:: \sigma(-z) \approx \sum_m c_m e^{-a_m z}, \quad z \ge 0
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

RankMethod = Literal["exp_sum", "chunked"]

# Minimax fits of sigmoid(-z) on z >= 0, by number of terms: (a, c, largest error). The terms
# alternate and cancel: all digits matter, and the sums are taken in float64.
_TERMS: dict[int, tuple[tuple[float, ...], tuple[float, ...], float]] = {
    4: (
        (0.9994436116565601, 2.378804328659312, 2.440604483491462, 2.50131881021904),
        (0.9952057920978014, -45.6931100838779, 84.07804953836293, -38.88015367059584),
        1.91e-5,
    ),
    6: (
        (
            0.9999399602292715,
            2.0024254269060715,
            3.1810415981332505,
            3.6279963471812766,
            4.152634572074347,
            4.485394999394228,
        ),
        (
            0.9996313791724994,
            -1.0003820792838396,
            2.193381671830959,
            -2.8236749777003727,
            1.6604556534028194,
            -0.5294117110919877,
        ),
        2.77e-7,
    ),
    8: (
        (
            1.000000601245058,
            1.9989441590053523,
            3.0601893791538672,
            5.764753779512512,
            3.772285426102158,
            4.753827934821145,
            6.634308087467041,
            7.1661432160606156,
        ),
        (
            1.0000076028262923,
            -0.994608022522837,
            1.2095232615404459,
            -0.297566824249436,
            -1.0879208462188095,
            0.5690686006371465,
            0.14376109783883037,
            -0.04226487168839581,
        ),
        1.33e-8,
    ),
}


def soft_rank(
    scores: Float[Tensor, "B N"],
    tau: float,
    *,
    method: RankMethod = "exp_sum",
    num_terms: int = 6,
    chunk_size: int = 64,
) -> Float[Tensor, "B N"]:
    r"""Rank of each token, counted from the best and made smooth (Eq. 5).

    .. math:: r_i = 1 + \sum_{j \ne i} \sigma\big((s_j - s_i) / \tau\big)

    Args:
        scores: Router scores `s`, finite; larger is better. Standardise them first
            (`standardize`): at a spread far below `tau` all ranks collapse to (N + 1) / 2.
        tau: Temperature, positive, in units of the scores. As `tau -> 0`, `r` becomes the rank.
        method: "exp_sum", the sum of exponentials: error per pair 2.8e-7 with 6 terms, time
            O(N log N). "chunked", the exact comparisons in chunks of rows: time O(N^2).
        num_terms: Exponentials of "exp_sum": 4, 6 or 8 (errors 1.9e-5, 2.8e-7, 1.3e-8 per pair).
        chunk_size: Rows of "chunked" that are compared at once; memory is `B * chunk_size * N`.

    Returns:
        Ranks in [1, N], in the dtype of the scores. Each row sums to N (N + 1) / 2, whatever the
        scores. All methods save O(N) for backward and recompute the rest.

    Raises:
        ValueError: If `tau` is not positive or an option is unknown.

    >>> soft_rank(torch.tensor([[3.0, 1.0, 2.0]]), tau=0.01)
    tensor([[1., 3., 2.]])
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}.")
    if method == "exp_sum":
        if num_terms not in _TERMS:
            raise ValueError(f"num_terms must be one of {sorted(_TERMS)}, got {num_terms}.")
        return _ExpSumRank.apply(scores, tau, num_terms)
    if method == "chunked":
        return _ChunkedRank.apply(scores, tau, chunk_size)
    raise ValueError(f'method must be "exp_sum" or "chunked", got {method!r}.')


def inclusion_scores(
    ranks: Float[Tensor, "B N"], k: Float[Tensor, ""] | float, tau: float
) -> Float[Tensor, "B N"]:
    r"""How surely each token is among the best k (Eq. 6, normalised as in Eq. 30).

    .. math:: \pi_i = \sigma\big((k - r_i) / (\tau N)\big)

    Args:
        ranks: Soft ranks in [1, N].
        k: Tokens kept, continuous (N times the keep ratio); a tensor if it is learned (Eq. 24).
        tau: Temperature, positive, as a share of N.

    Returns:
        Inclusion scores in (0, 1).

    >>> inclusion_scores(torch.tensor([[1.0, 3.0, 2.0]]), 2.0, 0.1).round(decimals=2)
    tensor([[0.9700, 0.0300, 0.5000]])
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}.")
    return torch.sigmoid((k - ranks) / (tau * ranks.shape[-1]))


def standardize(scores: Float[Tensor, "B N"], eps: float = 1e-6) -> Float[Tensor, "B N"]:
    """Scores with mean 0 and standard deviation 1 in each sample, in float32 or wider.

    Soft ranks compare differences with a temperature: standardised, the temperature means the
    same thing for every router, and the scores cannot collapse. All-equal scores become zeros.

    Args:
        scores: Any scale.
        eps: Added to the variance.

    Returns:
        Standardised scores; the order is unchanged.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    centred = wide - wide.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()


class _ExpSumRank(torch.autograd.Function):
    """Prefix and suffix sums over sorted scores, one pair per exponential.

    With L = a s / tau in descending order, the sum over j <= i of e^(-a (s_j - s_i) / tau) is
    exp(logcumsumexp(-L)_i + L_i), and likewise from the other end. Both include j = i, where their
    terms cancel. The backward pass is the same pair of sums with weights: since

        dL/ds_i = (1 / tau) sum_j w_ij (G_j - G_i),   w = -d sigma(-z) / dz, symmetric,

    G may be shifted by a constant, hence made positive, hence taken into the exponent.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: float, num_terms: int) -> Tensor:
        ordered, order = scores.double().sort(dim=-1, descending=True)
        ctx.save_for_backward(ordered, order)
        ctx.tau, ctx.num_terms = tau, num_terms
        rates, weights = _rates_and_weights(num_terms, scores.device)
        before, after = _decayed_sums(rates * ordered / tau)  # (M, B, N) each
        place = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=torch.float64)
        ranks = place + (weights * (after - before)).sum(0)  # (B, N)
        return torch.empty_like(ranks).scatter_(-1, order, ranks).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        (grad,) = grads
        ordered, order = ctx.saved_tensors
        rates, weights = _rates_and_weights(ctx.num_terms, grad.device)
        slopes = rates * weights
        exponents = rates * ordered / ctx.tau  # (M, B, N)
        upstream = grad.double().gather(-1, order)
        low, high = upstream.aminmax(dim=-1, keepdim=True)
        # Shifted into [spread, 2 spread]: positive, and no larger than its own differences need.
        spread = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
        shifted = upstream - low + spread
        total = sum(_decayed_sums(exponents))
        weighted = sum(_decayed_sums(exponents, shifted.log()))
        flow = (slopes * (weighted - shifted * total)).sum(0) / ctx.tau  # (B, N)
        flow = torch.where(high == low, 0.0, flow)  # exactly 0: all ranks together never move
        result = torch.empty_like(flow).scatter_(-1, order, flow)
        return result.to(grad.dtype), None, None


def _rates_and_weights(num_terms: int, device: torch.device) -> tuple[Tensor, Tensor]:
    a, c, _ = _TERMS[num_terms]
    both = torch.tensor((a, c), dtype=torch.float64, device=device).view(2, num_terms, 1, 1)
    return both[0], both[1]


def _decayed_sums(
    exponents: Float[Tensor, "M B N"], log_weights: Float[Tensor, "B N"] | None = None
) -> tuple[Float[Tensor, "M B N"], Float[Tensor, "M B N"]]:
    """Sums of w_j e^-|L_j - L_i| over j <= i and over j >= i, for descending L."""
    forward, backward = -exponents, exponents
    if log_weights is not None:
        forward, backward = forward + log_weights, backward + log_weights
    before = (forward.logcumsumexp(-1) + exponents).exp()
    after = (backward.flip(-1).logcumsumexp(-1).flip(-1) - exponents).exp()
    return before, after


class _ChunkedRank(torch.autograd.Function):
    """All comparisons, a chunk of rows at a time, recomputed in backward (Eq. 17-19)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: float, chunk_size: int) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.tau, ctx.chunk_size = tau, chunk_size
        # The diagonal adds sigma(0) = 1/2, hence 1/2 instead of 1.
        rows = [
            ((scores[:, None, :] - part[:, :, None]) / tau).sigmoid().sum(-1) + 0.5
            for part in scores.split(chunk_size, dim=1)
        ]
        return torch.cat(rows, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (scores,) = ctx.saved_tensors
        parts = zip(
            scores.split(ctx.chunk_size, dim=1), grad.split(ctx.chunk_size, dim=1), strict=True
        )
        rows = []
        for part, upstream in parts:
            p = ((scores[:, None, :] - part[:, :, None]) / ctx.tau).sigmoid()
            flow = (p * (1.0 - p)) * (grad[:, None, :] - upstream[:, :, None])  # (B, C, N)
            rows.append(flow.sum(-1) / ctx.tau)
        return torch.cat(rows, dim=1), None, None
