"""The judge: a small network that says what a generated picture shows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from shiva_dit.config import check_types


class Judge(nn.Module, ABC):
    """Says what pictures show, from features in which distances between sets are taken."""

    head: nn.Module
    """From features to logits."""

    @abstractmethod
    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features of images in [-1, 1]; values outside are clipped, as a viewer would."""

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of images in [-1, 1]."""
        return self.head(self.features(images))


class TrainedJudge(Judge):
    """A small convolutional classifier that is trained beside a backbone.

    Args:
        channels: Image channels.
        num_logits: Outputs; what they mean is the task's.
        feature_dim: Width of the features in which distances between sets of images are taken.
    """

    def __init__(self, channels: int, num_logits: int, feature_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.SiLU(),
            nn.Flatten(),
            nn.LazyLinear(feature_dim),
            nn.SiLU(),
        )
        self.head = nn.Linear(feature_dim, num_logits)

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Those of the last layer but one."""
        return self.body(images.float().clamp(-1, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeTraining:
    """How a judge is trained."""

    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak rate; cosine decay to 0."""
    noise: float = 0.15
    """Largest standard deviation of the noise added to images, in image units; each image draws
    its own below it. A judge must see digits, not grain."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge {name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 < self.learning_rate < 1.0:
            raise ValueError(f"judge learning_rate must lie in (0, 1), got {self.learning_rate}.")
        if self.noise < 0:
            raise ValueError(f"judge noise must be at least 0, got {self.noise}.")


def train_judge(
    judge: Judge,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    config: JudgeTraining,
    generator: torch.Generator,
) -> None:
    """Train a judge in place on real images with noise.

    Args:
        judge: What is trained, on its device.
        draw: Gives so many images and labels.
        loss_of: The loss of logits and labels.
        config: The recipe.
        generator: Source of images and noise.
    """
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    judge.train()
    device = next(judge.parameters()).device
    for _ in tqdm(range(config.steps), desc="judge", unit="step"):
        images, labels = draw(config.batch_size, generator)
        grain = config.noise * torch.rand(len(images), 1, 1, 1, generator=generator)
        images = images + grain * torch.randn(images.shape, generator=generator)
        loss = loss_of(judge(images.to(device)), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay.step()
    judge.eval()


def shift(
    images: Float[Tensor, "B C H W"], generator: torch.Generator, pixels: int = 1
) -> Float[Tensor, "B C H W"]:
    """Each image moved by up to `pixels` in both directions, borders repeated."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [pixels] * 4, mode="replicate")
    offsets = torch.randint(2 * pixels + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack(
        [
            image[:, dy : dy + height, dx : dx + width]
            for image, (dy, dx) in zip(padded, offsets, strict=True)
        ]
    )
