"""Training one of two transformers that share the steps of a pipeline: its part of the times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.adapter.parts import Expert
from shiva_dit.core.budget import logit_normal
from shiva_dit.core.time_law import TimeLaw
from shiva_dit.models.sampling import Sampler

PARTS: dict[Expert, Literal["first", "second"]] = {"high": "first", "low": "second"}
"""Of a pipeline's transformers (`Sampler.part`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeShare:
    """The times t in [low, high] that a transformer is asked at."""

    low: float = 0.0
    high: float = 1.0

    def at(self, quantiles: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Evenly spread over the share.

        Args:
            quantiles: In [0, 1].

        >>> TimeShare(low=0.5).at(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.5000, 0.7500, 1.0000])
        """
        return self.low + (self.high - self.low) * quantiles

    def of_law(self, law: TimeLaw, quantiles: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The law's few steps, where it names them; else evenly spread over the share."""
        return law.at(quantiles) if law.steps else self.at(quantiles)

    def logit_normal(self, quantiles: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """By the logit-normal law, of which these are the quantiles within the share.

        >>> TimeShare(low=0.5).logit_normal(torch.tensor([0.0, 0.5]))
        tensor([0.5000, 0.6625])
        """
        ends = torch.logit(torch.tensor([self.low, self.high], dtype=torch.float64))
        low, high = torch.special.ndtr(ends).tolist()
        return self.within(logit_normal(low + (high - low) * quantiles))

    def within(self, times: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The nearest times of the share."""
        return times.clamp(self.low, self.high)


WHOLE = TimeShare()


def share_of(expert: Expert | None, sampler: Sampler) -> TimeShare:
    """The times that a recipe's transformer is trained at.

    Args:
        expert: The recipe's.
        sampler: How its pipeline takes its steps.

    Raises:
        ValueError: If one doesn't fit the other.
    """
    boundary = sampler.config.get("boundary_ratio")
    one_of_two = sampler.part != "all" and boundary is not None
    if expert is None:
        if one_of_two:
            raise ValueError(
                "the pipeline has two transformers, each for a part of the steps: set expert = "
                '"high" for its transformer, which takes the noisy ones, or "low" for '
                "transformer_2."
            )
        return WHOLE
    if not one_of_two or sampler.scheduler is None:
        raise ValueError(
            f'expert = "{expert}" is for a pipeline of two transformers and a boundary_ratio (Wan '
            "2.2): leave it out, or name such a pipeline (--pipeline; scheduler=Sampler.of(pipe, "
            "model))."
        )
    if sampler.part != PARTS[expert]:
        raise ValueError(
            f'expert = "{expert}", but the model is the {sampler.part} of the pipeline\'s '
            "transformers: pass the other one, or set the other expert."
        )
    low, high = sampler.bounds
    return TimeShare(low=low, high=min(high, 1.0))


def recorded(expert: Expert | None, sampler: Sampler) -> dict[str, Any]:
    """What the adapter's record says of it (`AdapterModule.trained_expert`)."""
    if expert is None:
        return {}
    return {"expert": {"name": expert, "boundary_ratio": float(sampler.config["boundary_ratio"])}}
