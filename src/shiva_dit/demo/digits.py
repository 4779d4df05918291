"""The digits task: scikit-learn's 1,797 real handwritten digits, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from shiva_dit.demo.captions import CaptionEncoder
from shiva_dit.demo.judge import shift
from shiva_dit.demo.task import PATCH, DemoTask
from shiva_dit.training.data import Batch

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_HELD_OUT = 500
MAX_WORDS = 4
"""Text tokens: words of the longest caption."""
INK_LEVEL = -0.5
"""Brightness from which a pixel counts as ink; the background is -1."""


class DigitsTask(DemoTask):
    """Real digits at 16x16 and their captions.

    1,297 images train the backbone and the judge; 500 that neither saw are the reference of every
    distance. The split is stratified and always the same.
    """

    name = "digits"
    channels = 1
    feature_dim = 32
    image_size = 16

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

    def caption(self, label: int) -> str:
        """Caption of a class: "a handwritten seven"."""
        return f"a handwritten {NAMES[label]}"

    def __len__(self) -> int:
        """Number of training images."""
        return len(self.images)

    @cached_property
    def _class_conditioning(self) -> dict[str, Tensor]:
        return self.conditioning([self.caption(label) for label in range(len(NAMES))])

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """Training images by index, as they are, with their captions."""
        del generator
        labels = self.labels[indices]
        conditioning = {name: value[labels] for name, value in self._class_conditioning.items()}
        return Batch(latents=self.images[indices], conditioning=conditioning)

    def content(self) -> dict[str, Tensor]:
        """Images and labels."""
        return {"images": self.images, "labels": self.labels}

    def held_out_captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of held-out digits."""
        return [self.caption(label) for label in self.held_out_labels[list(indices)].tolist()]

    def prompts(self, start: int, count: int) -> tuple[list[str], Int[Tensor, " N"]]:
        """Captions of 0, 1, ..., 9, 0, 1, ... without end: every digit equally often."""
        labels = torch.arange(start, start + count) % len(NAMES)
        return [self.caption(label) for label in labels.tolist()], labels

    def real(self, count: int) -> tuple[Float[Tensor, "N 1 H W"], Int[Tensor, " N"]]:
        """Training digits, picked by chance but always the same."""
        picked = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count]
        return self.images[picked], self.labels[picked]

    def ink(self, indices: Sequence[int]) -> Bool[Tensor, "B N"]:
        """Tokens with a pixel of pen."""
        brightest = F.max_pool2d(self.held_out_images[list(indices)], PATCH)
        return brightest.flatten(1) >= INK_LEVEL

    # --- the judge --------------------------------------------------------------------------

    num_logits = len(NAMES)

    def judge_batch(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B 1 H W"], Int[Tensor, " B"]]:
        """Training digits, moved by up to a pixel."""
        picked = torch.randint(len(self.images), (count,), generator=generator)
        return shift(self.images[picked], generator), self.labels[picked]

    def judge_loss(
        self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """Cross entropy."""
        return F.cross_entropy(logits, labels, label_smoothing=0.05)

    def right(self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> dict[str, float]:
        """Share of digits that are read as asked."""
        return {"all": float((logits.argmax(1) == labels).double().mean())}
