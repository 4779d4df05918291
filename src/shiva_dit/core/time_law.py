"""How a sampler spreads its steps over time: what a mean over time is weighed by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.keep_table import nearest_bin

NUM_SHARES = 64
"""Equal shares of the steps between the times that describe a law."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeLaw:
    """The density of a sampler's steps over t in [0, 1], 1 = pure noise.

    >>> TimeLaw().weights(4)
    (1.0, 1.0, 1.0, 1.0)
    >>> TimeLaw(name="three quarters in the upper half", times=(0.0, 0.5, 0.6, 0.8, 1.0)).weights(2)
    (0.5, 1.5)
    >>> TimeLaw(name="two steps", steps=(0.5, 1.0)).weights(4)
    (0.0, 0.0, 2.0, 2.0)
    """

    name: str = "uniform"
    """In words: whose steps they are."""
    times: tuple[float, ...] = ()
    """Rising times within [0, 1] that cut the steps into equal shares, the first and the last
    step's own included; between two of them steps lie evenly. Empty: evenly over [0, 1]."""
    steps: tuple[float, ...] = ()
    """Rising times of the very steps, where these are few and all that there will be: then there
    are no other times, and all count alike."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a law of time needs a name.")
        if self.steps:
            if self.times:
                raise ValueError("a law has the times of its steps, or of shares of them.")
            if not all(0.0 <= t <= 1.0 for t in self.steps):
                raise ValueError(f"a law's steps must lie in [0, 1], got {self.steps}.")
            if not all(low < high for low, high in pairwise(self.steps)):
                raise ValueError(f"a law's steps must rise, got {self.steps}.")
        if not self.times:
            return
        if len(self.times) < 2:
            raise ValueError("a law of time needs at least two times, or none for an even one.")
        if self.times[0] < 0.0 or self.times[-1] > 1.0:
            raise ValueError(f"a law's times must lie in [0, 1], got {self.times}.")
        if not all(low <= high for low, high in pairwise(self.times)):
            raise ValueError(f"a law's times must rise, got {self.times}.")

    @classmethod
    def of_steps(cls, name: str, steps: Sequence[float]) -> TimeLaw:
        """The law that many steps of a sampler follow.

        Args:
            name: In words.
            steps: Their times in [0, 1], at least two.

        >>> TimeLaw.of_steps("even", [1.0, 0.75, 0.5, 0.25, 0.0]).weights(2)
        (1.0, 1.0)
        """
        ordered = sorted(steps)
        last = len(ordered) - 1
        times = []
        for cut in range(NUM_SHARES + 1):
            place = cut / NUM_SHARES * last
            low = min(int(place), last - 1)
            step = ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])
            times.append(round(step, 5))
        return cls(name=name, times=tuple(times))

    def at(self, quantiles: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The steps' times at quantiles in [0, 1], where these are named; else the quantiles.

        >>> TimeLaw(name="two steps", steps=(0.5, 1.0)).at(torch.tensor([0.1, 0.4, 0.6]))
        tensor([0.5000, 0.5000, 1.0000])
        """
        if not self.steps:
            return quantiles
        places = (quantiles * len(self.steps)).long().clamp(max=len(self.steps) - 1)
        return torch.tensor(self.steps, device=quantiles.device)[places]

    def weights(self, num_bins: int) -> tuple[float, ...]:
        """How often steps fall into each of so many equal bins of [0, 1], against evenly.

        Returns:
            One weight of at least 0 per bin, from t = 0 on; their mean is 1.
        """
        if self.steps:
            bins = [nearest_bin(t, num_bins) for t in self.steps]
            return tuple(bins.count(b) * num_bins / len(bins) for b in range(num_bins))
        if not self.times:
            return (1.0,) * num_bins
        weights = [0.0] * num_bins
        share = num_bins / (len(self.times) - 1)
        for low, high in pairwise(self.times):
            first = min(int(low * num_bins), num_bins - 1)
            last = max(first, min(math.ceil(high * num_bins), num_bins) - 1)
            for bin_ in range(first, last + 1):
                inside = min(high, (bin_ + 1) / num_bins) - max(low, bin_ / num_bins)
                weights[bin_] += share * (inside / (high - low) if high > low else 1.0)
        return tuple(weights)


UNIFORM = TimeLaw()
"""Steps that lie evenly over [0, 1]."""
