"""Where samplings went on their way from noise to a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """The states that samplings went through."""

    states: Float[Tensor, "B n ..."]
    """From noise to the picture."""
    times: Float[Tensor, " n"]
    """When, from 1 down to 0."""
    guidance: Float[Tensor, " B"]
    """Their scales."""

    def to(self, device: torch.device) -> Route:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("states", "times", "guidance")}
        return replace(self, **moved)

    def at(self, t: Float[Tensor, " M"]) -> Float[Tensor, "M ..."]:
        """The states at these times, evenly between their neighbours.

        Args:
            t: In [0, 1]; M = B, or a multiple: first one time of each, then another of each.
        """
        rows = torch.arange(len(t), device=t.device) % len(self.states)
        later = torch.searchsorted(-self.times, -t).clamp(1, len(self.times) - 1)
        start, end = self.times[later - 1], self.times[later]
        share = ((start - t) / (start - end)).clamp(0.0, 1.0)
        share = share.view(-1, *[1] * (self.states.ndim - 2))
        return torch.lerp(self.states[rows, later - 1], self.states[rows, later], share)
