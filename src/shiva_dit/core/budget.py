"""How many tokens may be spent, and how training is kept to it (Eq. 12, 13, 15, 25-28)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.config import check_types


def stratified(
    num_strata: int, generator: torch.Generator, *, device: torch.device | None = None
) -> Float[Tensor, " S"]:
    r"""One uniform draw from each of S equal strata of [0, 1] (Eq. 15, 25-28).

    .. math:: u_i = (i + \epsilon_i) / S, \quad \epsilon_i \sim U(0, 1)

    The draws are independent inside their strata, which removes the between-strata part of the
    variance of any average over them: for a quantity that is linear in u the variance falls by
    about S squared against independent draws.

    Args:
        num_strata: S, at least 1. Across ranks and micro-batches: the size of the global batch.
        generator: Source of the jitter.
        device: Where the result lives; the generator's own device by default.

    Returns:
        Increasing values in [0, 1], one per stratum.

    >>> u = stratified(4, torch.Generator().manual_seed(0))
    >>> (u * 4).floor().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if num_strata < 1:
        raise ValueError(f"num_strata must be at least 1, got {num_strata}.")
    jitter = torch.rand(num_strata, generator=generator, device=generator.device)
    draws = (torch.arange(num_strata, device=generator.device) + jitter) / num_strata
    return draws.to(device or generator.device)


def stratified_ratios(
    num_groups: int, low: float, high: float, generator: torch.Generator
) -> Float[Tensor, " K"]:
    """One keep ratio from each of K disjoint intervals that cover [low, high] (router warm-up).

    Args:
        num_groups: K, at least 1: the groups into which the batch is cut.
        low: Smallest keep ratio, in (0, 1].
        high: Largest keep ratio, in [low, 1].
        generator: Source of the jitter.

    Returns:
        Keep ratios in [low, high], one per group, in random order.
    """
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"keep ratios need 0 < low <= high <= 1, got low={low}, high={high}.")
    draws = low + (high - low) * stratified(num_groups, generator)
    order = torch.randperm(num_groups, generator=generator, device=generator.device)
    return draws[order]


def logit_normal(
    quantiles: Float[Tensor, ...], mean: float = 0.0, std: float = 1.0
) -> Float[Tensor, ...]:
    """Quantiles of the logit-normal law: uniform strata in, logit-normal strata out.

    Args:
        quantiles: Values in [0, 1].
        mean: Mean of the logit.
        std: Standard deviation of the logit, positive.

    Returns:
        Times in (0, 1), increasing in the quantiles.

    >>> logit_normal(torch.tensor([0.5]))
    tensor([0.5000])
    """
    inner = quantiles.double().clamp(1e-7, 1.0 - 1e-7)
    return torch.sigmoid(mean + std * torch.special.ndtri(inner)).to(quantiles.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """How hard training pulls the mean keep ratio to its target (Eq. 12, 13)."""

    weight: float = 5.0
    """lambda of Eq. 13, positive. The steady error is |dL_task/dr| / (2 lambda)."""
    momentum: float = 0.2
    """beta of Eq. 12, in (0, 1]: the share of the current value in the running mean."""
    integral: float = 0.0
    """Gain of the integral term per step, at least 0; 0 is the paper. 0.003 removes the steady
    error of a task gradient of about 0.1."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"budget weight must be positive, got {self.weight}.")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"budget momentum must lie in (0, 1], got {self.momentum}.")
        if not 0 <= self.integral < math.inf:
            raise ValueError(f"budget integral gain must be at least 0, got {self.integral}.")


class BudgetController:
    r"""Pulls the mean keep ratio to the target (Eq. 12, 13), with an optional integral term.

    .. math:: \mu \leftarrow \beta r + (1 - \beta)\mu, \qquad
              L = \lambda\, r\, \mathrm{sg}[2(\mu - R)] + r\, \mathrm{sg}[d]

    where d grows by `integral * (mu - R)` at each step and is 0 in the paper.

    Args:
        target: R, the mean keep ratio asked for, in (0, 1].
        config: Weight, momentum and integral gain.
    """

    def __init__(self, target: float, config: BudgetConfig | None = None) -> None:
        if not 0.0 < target <= 1.0:
            raise ValueError(f"target keep ratio must lie in (0, 1], got {target}.")
        self.target = target
        self.config = config or BudgetConfig()
        self.mean = target
        self.dual = 0.0

    def loss(self, mean_keep_ratio: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Budget loss of this step; updates the running mean first (Eq. 12), then uses it (Eq. 13).

        Args:
            mean_keep_ratio: The *executed* mean ratio, in (0, 1], differentiable in the policy.
                Take it over a fixed grid of t, weighed by the density of the sampler's steps
                (`shiva_dit.training.plan.Planner`), not over the batch: the batch's sampling noise
                would act as a hidden penalty on Var(r).

        Returns:
            A scalar whose gradient is `2 lambda (mu - R) + d` times that of the mean.
        """
        value = float(mean_keep_ratio.detach())
        if not math.isfinite(value):
            raise ValueError(f"the mean keep ratio must be finite, got {value}.")
        beta = self.config.momentum
        self.mean = beta * value + (1.0 - beta) * self.mean
        error = self.mean - self.target
        self.dual += self.config.integral * error
        return mean_keep_ratio * (self.config.weight * 2.0 * error + self.dual)

    def state_dict(self) -> dict[str, float]:
        """Running mean and integral, all that a resumed run needs."""
        return {"mean": self.mean, "dual": self.dual}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` gave."""
        self.mean, self.dual = float(state["mean"]), float(state["dual"])
