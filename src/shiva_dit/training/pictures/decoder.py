"""Pictures of latents, by the VAE of a saved pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, DiffusionPipeline
from jaxtyping import Float
from torch import Tensor


class Decoder:
    """A VAE that is on the device only while it decodes.

    Args:
        vae: As it was loaded.
        device: Where it runs.
    """

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.vae, self.device = vae.eval().requires_grad_(False), device

    @classmethod
    def saved(cls, pipeline: str | Path, device: torch.device) -> Decoder | None:
        """That of a saved pipeline; None if it has none.

        Args:
            pipeline: A folder, or a Hub id.
            device: Where it runs.
        """
        index: Any = DiffusionPipeline.load_config(pipeline)
        if (index.get("vae") or [None])[0] is None:
            return None
        return cls(AutoModel.from_pretrained(str(pipeline), subfolder="vae"), device)

    @torch.no_grad()
    def __call__(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Pictures in [-1, 1]."""
        config = self.vae.config
        shift = config.get("shift_factor") or 0.0
        self.vae.to(self.device)
        try:
            scaled = latents.to(self.device, self.vae.dtype) / config.scaling_factor + shift
            return self.vae.decode(scaled, return_dict=False)[0].float().cpu()
        finally:
            self.vae.to("cpu")
