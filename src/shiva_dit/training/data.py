"""What a trainer reads: samples in latent space with the conditioning of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Clean latents and what the model is conditioned on."""

    latents: Float[Tensor, "B C H W"]
    """Clean samples x0, scaled as the model expects them."""
    conditioning: dict[str, Tensor]
    """Keyword arguments of the model's forward, batch first (text embeddings and the like)."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in self.conditioning.items()}
        return Batch(latents=self.latents.to(device), conditioning=moved)


@runtime_checkable
class TrainingData(Protocol):
    """A finite set of samples; random augmentation draws from the generator it is given."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """The samples with these indices, augmented."""
        ...

    def unconditional(self) -> dict[str, Tensor]:
        """Conditioning of "no caption", without a batch dimension (for caption dropout)."""
        ...


def drop_captions(
    batch: Batch, unconditional: dict[str, Tensor], p: float, generator: torch.Generator
) -> Batch:
    """Replace the conditioning of each sample by "no caption" with probability p.

    Args:
        batch: The samples.
        unconditional: The replacement, one tensor per argument, without a batch dimension.
        p: Probability in [0, 1].
        generator: Source of the draws.
    """
    dropped = torch.rand(len(batch.latents), generator=generator) < p  # (B,)
    conditioning = {
        name: torch.where(
            dropped.view(-1, *[1] * (value.ndim - 1)).to(value.device),
            unconditional[name].to(value),
            value,
        )
        for name, value in batch.conditioning.items()
    }
    return Batch(latents=batch.latents, conditioning=conditioning)


class ShuffledIndices:
    """Endless epochs of shuffled indices, whose position can be saved and restored to the bit.

    Args:
        length: Number of samples.
        seed: Of the shuffling; each epoch has its own order.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError("the data set is empty: nothing to train on.")
        self.length, self.seed = length, seed
        self.position = 0

    def take(self, count: int) -> Int[Tensor, " B"]:
        """The next `count` indices, over as many epochs as that needs."""
        picked: list[Tensor] = []
        while count > 0:
            epoch, start = divmod(self.position, self.length)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.length, generator=generator)[start : start + count]
            picked.append(order)
            self.position += len(order)
            count -= len(order)
        return torch.cat(picked)
