"""Pictures of latents, by the VAE of a saved pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from shiva_dit.training.pictures.pipelines import Served, served


class Decoder:
    """A VAE that is on the device only while it decodes.

    Args:
        how: What is known of its pipeline.
        vae: As it was loaded.
        device: Where it runs.
    """

    def __init__(self, how: Served, vae: Any, device: torch.device) -> None:
        self.how = how
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
        how = served(str(index.get("_class_name")))
        return cls(how, AutoModel.from_pretrained(str(pipeline), subfolder="vae"), device)

    @torch.no_grad()
    def __call__(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Pictures in [-1, 1]."""
        self.vae.to(self.device)
        try:
            there = latents.to(self.device, self.vae.dtype)
            return self.how.to_pixels(self.vae, there).float().cpu()
        finally:
            self.vae.to("cpu")
