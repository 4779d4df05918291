"""Clean frames in training: the first ones of every video are given as they are, at time 0."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.models.spec import ModelSpec
from shiva_dit.training.data import Batch


class CleanFrames:
    """How many frames a model is given clean, and what becomes of a batch's noisy samples then.

    Args:
        model: The transformer.
        spec: Its spec.
        count: Frames of the latents, at least 1: the first ones.

    Raises:
        ValueError: If the class takes one time for all tokens of a sample.
    """

    def __init__(self, model: Any, spec: ModelSpec, count: int) -> None:
        if spec.token_times == "one":
            raise ValueError(
                f"{type(model).__name__} takes one time for all frames of a sample, so that none "
                "can be clean among noisy ones: leave clean_frames out."
            )
        self.model, self.spec, self.count = model, spec, count

    def num_tokens(self, batch: Batch) -> int:
        """How many tokens of a sample are clean."""
        return self.count * self._by_frame(batch)[1]

    def held(self, noisy: Float[Tensor, "P ..."], batch: Batch) -> Float[Tensor, "P ..."]:
        """Noisy samples, B or both passes' 2 B, with the batch's own clean frames."""
        axis, size = self._where(batch)
        clean = batch.latents.narrow(axis, 0, size).to(noisy)
        return torch.cat([clean, noisy.narrow(axis, size, noisy.shape[axis] - size)], dim=axis)

    def others(self, values: Float[Tensor, "P ..."], batch: Batch) -> Float[Tensor, "P ..."]:
        """What is of the noisy frames, of values laid out as the latents."""
        axis, size = self._where(batch)
        return values.narrow(axis, size, values.shape[axis] - size)

    def times(self, t: Float[Tensor, " P"], batch: Batch) -> dict[str, Any]:
        """The arguments that tell the model its times: t, and 0 for clean frames.

        Args:
            t: Of each sample, in [0, 1].
            batch: The samples.
        """
        frames, each = self._by_frame(batch)
        spec, of_sample = self.spec, self.spec.timestep_at(t)
        by_frame = t[:, None].repeat(1, frames)
        by_frame[:, : self.count] = 0.0
        return spec.times_by_frame(spec.timestep_at(by_frame), each, of_sample)

    def _where(self, batch: Batch) -> tuple[int, int]:
        """The axis of the latents along which clean ones come first, and how many."""
        if batch.latents.ndim == 3:
            return 1, self.num_tokens(batch)
        self._by_frame(batch)
        return self.spec.frame_axis, self.count

    def _by_frame(self, batch: Batch) -> tuple[int, int]:
        """Frames of the latents, and tokens of each.

        Raises:
            ValueError: If these aren't videos, or none of their frames would be noisy.
        """
        latents, known = batch.latents, {**batch.conditioning, **batch.shared}
        frames = latents.shape[self.spec.frame_axis] if latents.ndim == 5 else 0
        if latents.ndim == 3:
            frames = known.get("num_frames", 0)
        tokens = self.spec.tokens(self.model, latents)
        if not frames or tokens % frames:
            raise ValueError(
                "clean_frames is for videos whose tokens are each of one frame: latents (B, C, F, "
                "H, W), or packed rows with num_frames among what all samples share; got "
                f"{tuple(latents.shape)}."
            )
        if self.count >= frames:
            raise ValueError(
                f"clean_frames = {self.count} of videos of {frames} frames leaves none to learn "
                "from."
            )
        return frames, tokens // frames
