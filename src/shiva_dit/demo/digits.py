"""The digits task: scikit-learn's 1,797 real handwritten digits, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jaxtyping import Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from shiva_dit.demo.captions import CaptionEncoder
from shiva_dit.demo.judge import Judge
from shiva_dit.training.data import Batch

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_HELD_OUT = 500
MAX_WORDS = 4
"""Text tokens: words of the longest caption."""


class DigitsTask:
    """Real digits at 16x16, their captions, the backbone's architecture and the judge's.

    1,297 images train the backbone and the judge; 500 that neither saw are the reference of every
    distance. The split is stratified and always the same.
    """

    name = "digits"
    num_classes = len(NAMES)
    image_size = 16
    num_blocks = 6
    num_tokens = 64

    def __init__(self) -> None:
        data: Any = load_digits()
        # 0..16 to -1..1, and 8x8 to 16x16.
        images = torch.from_numpy(data.images).float()[:, None] / 8.0 - 1.0
        images = F.interpolate(images, size=self.image_size, mode="bilinear", align_corners=False)
        train, held_out = train_test_split(
            range(len(images)), test_size=NUM_HELD_OUT, stratify=data.target, random_state=0
        )
        labels = torch.from_numpy(data.target).long()
        self.images, self.labels = images[train], labels[train]
        self.held_out_images, self.held_out_labels = images[held_out], labels[held_out]
        self.captions = CaptionEncoder(("a", "handwritten", *NAMES), max_words=MAX_WORDS)

    def build_backbone(self) -> SD3Transformer2DModel:
        """An untrained backbone: 6 blocks of width 128, 64 tokens (patch 2), in pixel space.

        diffusers leaves the modulations and the output layer at their random start; training from
        scratch wants them at zero (adaLN-zero).
        """
        model: Any = SD3Transformer2DModel(
            sample_size=self.image_size,
            patch_size=2,
            in_channels=1,
            out_channels=1,
            num_layers=self.num_blocks,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=self.captions.embed_dim,
            caption_projection_dim=128,
            pooled_projection_dim=self.captions.pooled_dim,
            pos_embed_max_size=self.image_size // 2,
        )
        zeroed: list[nn.Module] = [model.proj_out, model.norm_out.linear]
        for block in model.transformer_blocks:
            zeroed += [block.norm1.linear, block.norm1_context.linear]
        for layer in zeroed:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        return model

    def build_judge(self) -> Judge:
        """An untrained judge, its lazy layer materialised."""
        judge = Judge(1, self.num_classes).eval()
        judge(self.held_out_images[:1])
        return judge

    def pipeline(self, backbone: nn.Module) -> Any:
        """The stock SD3 pipeline around a backbone; `output_type="latent"` gives images.

        There is no autoencoder and no text model: pass `prompt_embeds` from `conditioning`.
        """
        text = [part + i for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
        nothing: dict[str, Any] = dict.fromkeys(["vae", *text])
        pipe = StableDiffusion3Pipeline(
            transformer=backbone,  # type: ignore[arg-type]
            scheduler=FlowMatchEulerDiscreteScheduler(),
            **nothing,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def caption(self, label: int) -> str:
        """Caption of a class: "a handwritten seven"."""
        return f"a handwritten {NAMES[label]}"

    def conditioning(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions to what the backbone's forward takes."""
        embeds, pooled = self.captions(captions)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    # --- TrainingData -----------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of training images."""
        return len(self.images)

    @cached_property
    def _class_conditioning(self) -> dict[str, Tensor]:
        return self.conditioning([self.caption(label) for label in range(self.num_classes)])

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """Training images by index, as they are, with their captions."""
        del generator
        labels = self.labels[indices]
        conditioning = {name: value[labels] for name, value in self._class_conditioning.items()}
        return Batch(latents=self.images[indices], conditioning=conditioning)

    def unconditional(self) -> dict[str, Tensor]:
        """Conditioning of the empty caption."""
        return {name: value[0] for name, value in self.conditioning([""]).items()}


def balanced_labels(count: int) -> Int[Tensor, " N"]:
    """Labels 0, 1, ..., 9, 0, 1, ...: every digit equally often."""
    return torch.arange(count) % len(NAMES)
