"""A hard selection in training: the gates that carry gradients to scores and budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from shiva_dit.core.estimators import (
    EstimatorConfig,
    gate,
    gate_input,
    selection_benefit,
)
from shiva_dit.core.selection import best_tokens, gather_tokens
from shiva_dit.core.soft_rank import inclusion_scores, soft_rank, standardize


@dataclass(slots=True, kw_only=True)
class SelectionGates:
    """One block's selection in one training forward.

    The object outlives its forward until backward is done: a block that is recomputed (gradient
    checkpointing) finds the same noise and the same tokens here.
    """

    config: EstimatorConfig
    """Which estimator."""
    tau_rank: float
    """Temperature of the soft ranks, in standard deviations of the scores."""
    tau_select: float
    """Temperature of the inclusion scores, as a share of N."""
    soft_k: Float[Tensor, ""] | float
    """k before rounding: N times the keep ratio, with the policy's gradient where it learns."""
    noise_std: float = 0.0
    """Standard deviation of the noise on the standardised scores."""
    generator: torch.Generator | None = None
    """Source of that noise."""
    is_pair: bool = False
    """Whether the batch is two guidance halves that keep the same tokens: they share the noise."""
    teacher_update: Float[Tensor, "B N D"] | None = None
    """The unpruned model's update of this block, where the estimator asks for it."""
    noise: Float[Tensor, "B N"] | None = field(default=None, init=False)
    order: Int[Tensor, "B N"] | None = field(default=None, init=False)
    """All tokens, the best first."""
    chosen: Int[Tensor, "B k"] | None = field(default=None, init=False)
    inclusion: Float[Tensor, "B N"] | None = field(default=None, init=False)
    values_gated: int = field(default=0, init=False)

    def choose(self, scores: Float[Tensor, "B N"], k: int) -> Int[Tensor, "B k"]:
        """Top-k of the perturbed, standardised scores (Eq. 3, 30); `learn` follows."""
        scores = standardize(scores.detach())
        if self.noise is None:
            self.noise = self._draw(scores)
        if self.order is None:
            self.order = best_tokens(scores + self.noise, scores.shape[1])
        self.chosen = self.order[:, :k]
        self.values_gated = 0
        return self.chosen

    def learn(self, scores: Float[Tensor, "B N"]) -> None:
        """Inclusion scores, from the same scores with the same noise (Eq. 5, 6)."""
        assert self.noise is not None
        ranks = soft_rank(standardize(scores) + self.noise, self.tau_rank)
        self.inclusion = inclusion_scores(ranks, self.soft_k, self.tau_select)

    def scored(
        self,
        score: Callable[[Tensor, Any], Tensor],
        terms: tuple[Tensor, ...],
        scores: Float[Tensor, "B N"],
        x: Float[Tensor, "B N D"],
        before: Float[Tensor, "B k D"],
    ) -> Float[Tensor, "B N"]:
        """The scores with the gradient of `score(x, terms)`, which is computed anew in backward.

        Kept until then: the rejected tokens, and the chosen ones, which the block keeps as well.
        """
        assert self.order is not None
        return self._recomputed(score, terms, scores, self.order, x, before)

    @staticmethod
    def _recomputed(
        score: Callable[[Tensor, Any], Tensor],
        terms: tuple[Tensor, ...],
        scores: Float[Tensor, "B N"],
        order: Int[Tensor, "B N"],
        x: Float[Tensor, "B N D"],
        before: Float[Tensor, "B k D"],
    ) -> Float[Tensor, "B N"]:
        rest = gather_tokens(x.detach(), order[:, before.shape[1] :])
        parts = order, before.detach(), rest
        return _Recomputed.apply(score, type(terms), scores, *parts, *terms)

    def _draw(self, scores: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        if not self.noise_std:
            return torch.zeros_like(scores)
        if self.generator is None:
            raise ValueError("noise_std > 0 needs a generator to draw from.")
        halves = 2 if self.is_pair else 1
        shape = len(scores) // halves, scores.shape[1]
        draws = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return self.noise_std * draws.to(scores).repeat(halves, 1)

    @property
    def _chosen_inclusion(self) -> Float[Tensor, "B k"]:
        assert self.inclusion is not None
        assert self.chosen is not None
        return self.inclusion.gather(1, self.chosen)

    def enter(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """All tokens on their way to gather and scatter (gate of the "paper" estimator)."""
        if self.config.kind != "paper":
            return x
        assert self.inclusion is not None
        assert self.chosen is not None
        return gate_input(x, self.inclusion, self.chosen)

    def value(self, value: Float[Tensor, "B k D"]) -> Float[Tensor, "B k D"]:
        """Output of a value projection of the block (the KV gate of "residual")."""
        self.values_gated += 1
        return gate(value, value, self._chosen_inclusion)

    def leave(
        self,
        x: Float[Tensor, "B N D"],
        output: Float[Tensor, "B N D"],
        update: Float[Tensor, "B N D"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """All tokens after the scatter (gate of the "residual" estimator).

        Args:
            x: What `enter` returned.
            output: The block's output for chosen tokens, `x` plus `update` for the others.
            update: What rejected tokens got instead of the block (`RejectedUpdates`), if anything.

        Raises:
            RuntimeError: If a value gate was asked for and no value projection was seen.
        """
        if self.config.kind == "paper":
            return output
        assert self.chosen is not None
        assert self.inclusion is not None
        if self.config.needs_value_gate and not self.values_gated:
            raise RuntimeError(
                "the block ran without calling its value projection (fused projections?), so the "
                "KV gate saw nothing: unfuse them, or train with kv_gate=false."
            )
        benefit = selection_benefit(
            self.config.rejected,
            x.detach(),
            self.chosen,
            output.detach(),
            instead=None if update is None else update.detach(),
            ridge=self.config.ridge,
            teacher=self.teacher_update,
        )
        return gate(output, benefit.to(output.dtype), self.inclusion)


class _Recomputed(torch.autograd.Function):
    """Scores that are known already; backward computes them anew, for the terms' gradient."""

    @staticmethod
    def forward(ctx: Any, score: Any, kind: Any, scores: Tensor, *saved: Tensor) -> Tensor:
        ctx.score, ctx.kind = score, kind
        ctx.save_for_backward(*saved)
        device = scores.device.type
        ctx.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        return scores.view_as(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        order, chosen, rest, *terms = ctx.saved_tensors
        leaves = [term.detach().requires_grad_() for term in terms]
        with torch.enable_grad(), ctx.autocast:
            scores = ctx.score(torch.cat([chosen, rest], dim=1), ctx.kind(*leaves))
        found = torch.autograd.grad(scores, leaves, grads[0].gather(1, order))
        return (*[None] * 6, *found)
