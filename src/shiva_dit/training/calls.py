"""How a model is called in training: noisy samples at their times, with captions and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.models.guidance import Pass
from shiva_dit.models.spec import ModelSpec
from shiva_dit.training.clean_frames import CleanFrames
from shiva_dit.training.data import Batch
from shiva_dit.training.guided import TOLD, both_ways
from shiva_dit.training.paths import NoisePath


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """The arguments of a model's forward."""

    spec: ModelSpec
    path: NoisePath
    dtype: torch.dtype
    """Of the model."""
    passes: Pass
    """How guided samples run; ALONE without guidance, and where the model is told its scale."""
    clean: CleanFrames | None = None
    """Frames of every video that are given as they are."""

    @property
    def both_ways(self) -> bool:
        """Whether each sample runs with and without its caption."""
        return self.passes is not Pass.ALONE

    def noised(self, batch: Batch, t: Float[Tensor, " B"], generator: torch.Generator) -> Batch:
        """The batch with what has noise beside its samples at the same times (`ModelSpec.noised`).

        Args:
            batch: Whose conditioning has it clean.
            t: Times in [0, 1].
            generator: Source of the noise.
        """
        made = {}
        for name in self.spec.noised:
            if name in batch.conditioning:
                clean = batch.conditioning[name]
                noise = torch.randn(clean.shape, generator=generator).to(clean)
                made[name] = self.path.noisy(clean, noise, t)
        return replace(batch, conditioning={**batch.conditioning, **made}) if made else batch

    def plain(self, noisy: Tensor, t: Float[Tensor, " B"], batch: Batch) -> dict[str, Any]:
        """Each sample once, with its caption, in the model's dtype."""
        if self.clean is None:
            times = self.spec.times(self.path.timestep(t))
        else:
            times, noisy = self.clean.times(t, batch), self.clean.held(noisy, batch)
        return {
            **times,
            "return_dict": False,
            **self.spec.arguments_of(noisy.to(self.dtype), batch.given(self.dtype)),
        }

    def guided(
        self,
        noisy: Float[Tensor, "B ..."],
        t: Float[Tensor, " B"],
        batch: Batch,
        scales: Float[Tensor, " B"] | None,
        empty: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """As a pipeline calls it with guidance: both ways in one batch, or told the scale.

        Args:
            noisy: The samples at their times.
            t: Those, in [0, 1].
            batch: Their captions.
            scales: Guidance scales; None without guidance.
            empty: Conditioning of "no caption", without a batch dimension.
        """
        if scales is None:
            return self.plain(noisy, t, batch)
        if self.both_ways:
            return self.plain(torch.cat([noisy] * 2), t.repeat(2), both_ways(batch, empty))
        return {**self.plain(noisy, t, batch), TOLD: self.spec.told_guidance * scales}
