"""What a trainer reads: samples in latent space with the conditioning of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.training.route import Route


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Clean latents and what the model is conditioned on."""

    latents: Float[Tensor, "B ..."]
    """Clean samples x0, scaled and laid out as the model takes them: (B, C, H, W), packed rows
    (B, N, C), videos (B, C, F, H, W)."""
    conditioning: dict[str, Tensor]
    """Keyword arguments of the model's forward, batch first (text embeddings and the like)."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """Further ones that are the same for all samples: position ids, rotary tables, sizes."""
    route: Route | None = None
    """Where these samples are a model's own: the states on the way to them (`Trajectories`)."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in self.conditioning.items()}
        shared = send_to_device(dict(self.shared), device)
        route = None if self.route is None else self.route.to(device)
        latents = self.latents.to(device)
        return Batch(latents=latents, conditioning=moved, shared=shared, route=route)


@runtime_checkable
class TrainingData(Protocol):
    """A finite set of samples; random augmentation draws from the generator it is given.

    It may also have a method `identity() -> str`, a digest of its content: a run then goes on with
    the same data alone, and the adapter's record says what it was trained on. And a `name`, for
    the record.
    """

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """The samples with these indices, augmented."""
        ...

    def unconditional(self) -> dict[str, Tensor]:
        """Conditioning of "no caption", without a batch dimension (for caption dropout)."""
        ...


def repeated(batch: Batch, times: int, noise: Tensor) -> tuple[Batch, Tensor]:
    """All samples so many times, one after the other, and their noise."""
    if times == 1:
        return batch, noise

    def often(value: Tensor) -> Tensor:
        return value.repeat(times, *[1] * (value.ndim - 1))

    conditioning = {name: often(value) for name, value in batch.conditioning.items()}
    return replace(batch, latents=often(batch.latents), conditioning=conditioning), often(noise)


def data_name(data: TrainingData) -> str | None:
    """What the data is called, if it says so."""
    name = getattr(data, "name", None)
    return None if name is None else str(name)


def data_origin(data: TrainingData) -> dict[str, Any]:
    """What a record says of training data: name, number of samples, identity of the content."""
    identity = getattr(data, "identity", None)
    return {
        "name": data_name(data),
        "samples": len(data),
        "identity": "not given" if identity is None else identity(),
    }


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
    return replace(batch, conditioning=conditioning)


def reseed(generator: torch.Generator, *places: int) -> None:
    """Start a generator anew by a run's seed, a step and so on: on any process it draws the same.

    >>> generator = torch.Generator()
    >>> reseed(generator, 0, 12, 3)
    >>> first = torch.rand(1, generator=generator)
    >>> reseed(generator, 0, 12, 3)
    >>> bool(first == torch.rand(1, generator=generator))
    True
    """
    digest = hashlib.sha256(repr(places).encode()).digest()
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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
