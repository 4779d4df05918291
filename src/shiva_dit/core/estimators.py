r"""How the inclusion score and the budget get a gradient from a hard selection (Eq. 7, 21-24).

The forward pass is the hard one: chosen tokens run, the others pass by. Every estimator is a set
of *gates*: points where a tensor goes through unchanged while the inclusion score pi receives
<gradient there, direction>. Gradients on to the scores and to k follow by autograd from
pi = sigmoid((k - r(s)) / (tau N)), so that Eq. 24 holds for every estimator.

====================  =======================================  ===========================
estimator             chosen token                             rejected token
====================  =======================================  ===========================
paper (Eq. 7)         <dL/d block input, x>                    -<dL/d output, x>
residual              <dL/d output, F>, F the block's update   <dL/d output, estimate of F>
                      (less what a rejected token gets instead, where it gets anything)
residual, KV gate     also <dL/dv, v> at the value projection
====================  =======================================  ===========================

The backbone's own gradient is that of the same forward without gates, whatever the estimator: a
gate hands it through, and what scores and inclusion are computed from is detached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.config import check_types
from shiva_dit.core.selection import best_tokens, gather_tokens, scatter_tokens

EstimatorKind = Literal["paper", "residual"]
RejectedUpdate = Literal["none", "mean", "ridge", "teacher", "teacher_ridge"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorConfig:
    """Which gradient the inclusion scores receive."""

    kind: EstimatorKind = "residual"
    """"paper": Eq. 7 literally, the skip included (reading R1). "residual": a gate on the
    block's update."""
    rejected: RejectedUpdate = "teacher"
    """"residual" only: what stands for the update that a rejected token did not get. "teacher":
    the update of the unpruned model, known wherever training distils. "ridge": a ridge regression
    fitted on the chosen tokens of the same sample. "teacher_ridge": the teacher's, corrected by a
    ridge regression of how far it is off on the chosen tokens. "mean": their mean update. "none":
    what it got anyway, nothing; then k shrinks regardless of merit."""
    kv_gate: bool = False
    """"residual" only: add what a chosen token gives to the others as a value in attention."""
    ridge: float = 1.0
    """Penalty of the ridge regressions, positive; for "ridge" flat between 0.3 and 10."""

    def __post_init__(self) -> None:
        if self.kind not in ("paper", "residual"):
            raise ValueError(f'estimator kind must be "paper" or "residual", got {self.kind!r}.')
        if self.rejected not in get_args(RejectedUpdate):
            raise ValueError(
                f"estimator rejected must be one of {', '.join(get_args(RejectedUpdate))}, "
                f"got {self.rejected!r}."
            )
        check_types(self)
        if not 0 < self.ridge < math.inf:
            raise ValueError(f"estimator ridge must be positive, got {self.ridge}.")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's updates must be at hand in every forward."""
        return self.kind == "residual" and self.rejected in ("teacher", "teacher_ridge")

    @property
    def needs_value_gate(self) -> bool:
        """Whether the outputs of the value projections must be gated."""
        return self.kind == "residual" and self.kv_gate


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, direction: Tensor, inclusion: Tensor) -> Tensor:
        ctx.save_for_backward(direction)
        ctx.inclusion_dtype = inclusion.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        (grad,) = grads
        (direction,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        slope = (grad.to(wide) * direction.to(wide)).sum(-1)  # (B, n)
        return grad, None, slope.to(ctx.inclusion_dtype)


def gate(
    value: Float[Tensor, "B n D"],
    direction: Float[Tensor, "B m D"],
    inclusion: Float[Tensor, "B n"],
) -> Float[Tensor, "B n D"]:
    """`value`, bit by bit, whose gradient also tells `inclusion` how useful `direction` is.

    Backward: `value` receives the gradient g unchanged, `inclusion` receives <g, direction> per
    token, accumulated in float32 or wider; `direction` receives nothing.

    Args:
        value: The tensor to pass on. Nothing else may consume the *returned* tensor's tokens for
            other purposes than the path that is judged: two paths' gradients would mix.
        direction: Per token, or one for all (m = 1).
        inclusion: Inclusion scores of the same tokens, float32 or wider.
    """
    return _Gate.apply(value, direction, inclusion)


def gate_input(
    x: Float[Tensor, "B N D"], inclusion: Float[Tensor, "B N"], chosen: Int[Tensor, "B k"]
) -> Float[Tensor, "B N D"]:
    r"""The paper's estimator (Eq. 7, 21-23), with the block's skip included (reading R1).

    .. math:: dL/d\pi_i = \langle dL/dx^{sel}_i, x_i \rangle \text{ if chosen, else }
              -\langle dL/dx^{rej}_i, x_i \rangle

    Since a scatter cuts the path of chosen tokens past the block, one gate before the split gives
    both rows exactly.

    Args:
        x: The block's input before the gather. Only the gather and the scatter may consume the
            result: feed the router and any cache `x.detach()` or `x` itself.
        inclusion: Inclusion scores of all tokens.
        chosen: Their top-k.
    """
    sign = torch.full_like(inclusion, -1.0).scatter(1, chosen, 1.0)
    return gate(x, x, sign * inclusion)


@torch.no_grad()
def selection_benefit(
    kind: RejectedUpdate,
    x: Float[Tensor, "B N D"],
    chosen: Int[Tensor, "B k"],
    output: Float[Tensor, "B N D"],
    *,
    instead: Float[Tensor, "B N D"] | None = None,
    ridge: float = 1.0,
    teacher: Float[Tensor, "B N D"] | None = None,
) -> Float[Tensor, "B N D"]:
    r"""By how much selection changes a token: its update F by the block, less what it gets if not.

    A token's output is :math:`\pi_i (x_i + F_i) + (1 - \pi_i)(x_i + u_i)`, so that its gate's
    direction is :math:`F_i - u_i`, chosen or not. The F of a rejected token isn't known: the block
    isn't run for it.

    Args:
        kind: What stands for it (see `EstimatorConfig.rejected`).
        x: All tokens before the block.
        chosen: Tokens that ran.
        output: All tokens after the block; only chosen ones are read.
        instead: u, zero by default.
        ridge: Penalty of the ridge regressions.
        teacher: The unpruned model's update at this block, for "teacher" and "teacher_ridge".

    Returns:
        The direction of every token's gate. No gradient flows through it.

    Raises:
        ValueError: If the teacher's update is asked for and not given.
    """
    update = gather_tokens(output, chosen) - gather_tokens(x, chosen)  # (B, k, D)
    if kind == "none":
        rest = torch.zeros_like(x) if instead is None else instead
        benefit = scatter_tokens(rest, chosen, update)
    elif kind == "mean":
        benefit = scatter_tokens(update.mean(1, keepdim=True).expand_as(x), chosen, update)
    elif kind == "ridge":
        benefit = _completed(x, chosen, update, ridge)
    elif teacher is None:
        raise ValueError(
            f'rejected="{kind}" needs the unpruned model\'s update of this block; run the '
            'teacher first, or use rejected="ridge".'
        )
    else:
        rest = teacher
        if kind == "teacher_ridge":
            rest = rest + _completed(x, chosen, update - gather_tokens(teacher, chosen), ridge)
        benefit = scatter_tokens(rest, chosen, update)
    return benefit if instead is None else benefit - instead


def _completed(
    x: Float[Tensor, "B N D"],
    chosen: Int[Tensor, "B k"],
    update: Float[Tensor, "B k D"],
    ridge: float,
) -> Float[Tensor, "B N D"]:
    """The update of the chosen tokens, and its ridge regression for the others, per sample.

    That is A (A_S' A_S + ridge I)^-1 A_S' F_S with A = [LayerNorm(x), 1]. With fewer chosen tokens
    than columns the k x k system of the dual form is solved instead.
    """
    with torch.autocast(x.device.type, enabled=False):
        num_tokens, k = x.shape[1], chosen.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        target = update.to(wide)
        is_rejected = torch.ones(x.shape[:2], device=x.device).scatter(1, chosen, 0.0)
        order = torch.cat([chosen, best_tokens(is_rejected, num_tokens)[:, : num_tokens - k]], 1)
        normed = F.layer_norm(gather_tokens(x, order).to(wide), x.shape[-1:])
        rows = torch.cat([normed, torch.ones_like(normed[..., :1])], dim=-1)  # (B, N, D + 1)
        seen, unseen = rows.split((k, num_tokens - k), dim=1)
        if k < rows.shape[-1]:
            gram, left, right = seen @ seen.mT, unseen @ seen.mT, target
        else:
            gram, left, right = seen.mT @ seen, unseen, seen.mT @ target
        gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor = torch.linalg.cholesky_ex(gram).L
        if left.shape[1] < right.shape[2]:  # fewer right-hand sides take less
            predicted = torch.cholesky_solve(left.mT, factor).mT @ right
        else:
            predicted = left @ torch.cholesky_solve(right, factor)
        return gather_tokens(torch.cat([target, predicted], dim=1), order.argsort(dim=1))
