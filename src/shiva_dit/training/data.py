"""What a trainer reads: samples in latent space with the conditioning of the model."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.models.spec import REFERENCES
from shiva_dit.training.route import Route


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Clean latents and what the model is conditioned on."""

    latents: Float[Tensor, "B ..."]
    """Clean samples x0, scaled and laid out as the model takes them: (B, C, H, W), packed rows
    (B, N, C), videos (B, C, F, H, W)."""
    conditioning: dict[str, Tensor]
    """Keyword arguments of the model's forward, batch first (text embeddings and the like); and
    `BESIDE`, further channels that the model reads after those of the noisy latents, or
    `REFERENCES`, packed rows of pictures to go by, which it reads after theirs."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """Further ones that are the same for all samples: position ids, rotary tables, sizes."""
    arguments: Callable[[dict[str, Tensor]], dict[str, Any]] | None = None
    """Makes the forward's arguments of the conditioning, where these are not the same."""
    picture: Callable[[Tensor], Tensor] | None = None
    """Makes (B, C, H, W) of latents, where these have another layout."""
    route: Route | None = None
    """Where these samples are a model's own: the states on the way to them (`Trajectories`)."""

    @property
    def num_references(self) -> int:
        """Image tokens of references."""
        rows = self.conditioning.get(REFERENCES)
        return 0 if rows is None else rows.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""

        def there(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=value.is_pinned())

        moved = {name: there(value) for name, value in self.conditioning.items()}
        shared = send_to_device(dict(self.shared), device)
        route = None if self.route is None else self.route.to(device)
        latents = there(self.latents)
        return replace(self, latents=latents, conditioning=moved, shared=shared, route=route)

    def split(self, size: int) -> list[Batch]:
        """Parts of at most so many samples."""
        return [
            replace(
                self,
                latents=self.latents[start : start + size],
                conditioning={n: v[start : start + size] for n, v in self.conditioning.items()},
            )
            for start in range(0, len(self.latents), size)
        ]

    def given(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a forward of a model of this dtype is given beside latents and time."""
        items = self.conditioning.items()
        made = {n: v.to(dtype) if v.is_floating_point() else v for n, v in items}
        return {**(made if self.arguments is None else self.arguments(made)), **self.shared}

    def pictured(self, latents: Tensor) -> Tensor:
        """Latents laid out as these, as (B, C, H, W) where they are pictures."""
        return latents if self.picture is None else self.picture(latents)


@runtime_checkable
class TrainingData(Protocol):
    """A finite set of samples; random augmentation draws from the generator it is given.

    It may also have a method `identity() -> str`, a digest of its content: a run then goes on with
    the same data alone, and the adapter's record says what it was trained on. And a `name`, for
    the record. Data that can be read ahead, or whose samples can't all be in one batch, says so by
    the methods of a `Feed`; what it is looked at by while it is trained on, by those that
    `training.looks.material` asks for.
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
        unconditional: The replacement, one tensor per argument, without a batch dimension; what
            isn't there stays.
        p: Probability in [0, 1].
        generator: Source of the draws.
    """
    dropped = torch.rand(len(batch.latents), generator=generator) < p  # (B,)
    conditioning = {
        name: torch.where(
            dropped.view(-1, *[1] * (value.ndim - 1)).to(value.device),
            unconditional.get(name, value).to(value),
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
        self._epoch: tuple[int, Tensor] | None = None

    def take(self, count: int) -> Int[Tensor, " B"]:
        """The next `count` indices, over as many epochs as that needs."""
        picked: list[Tensor] = []
        while count > 0:
            epoch, start = divmod(self.position, self.length)
            order = self._order(epoch)[start : start + count]
            picked.append(order)
            self.position += len(order)
            count -= len(order)
        return torch.cat(picked)

    def _order(self, epoch: int) -> Int[Tensor, " S"]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(self.length, generator=generator)
        return self._epoch[1]


class GroupedIndices:
    """Endless shuffled indices of which each `take` is of one group, such as one shape.

    A group is taken as often as its share of the samples, and its samples in epochs of their own:
    the next of all samples in a shuffled order says whose turn it is. As `ShuffledIndices` it has a
    position; it goes on from there with the same `count`.

    Args:
        groups: Of each sample, the number of its group.
        seed: Of the shuffling.
    """

    def __init__(self, groups: Sequence[int], seed: int) -> None:
        self.groups, self.seed = torch.tensor(groups), seed
        self.members = [torch.nonzero(self.groups == g)[:, 0] for g in self.groups.unique()]
        self.position = 0
        self._restore(0, 1)

    def take(self, count: int) -> Int[Tensor, " B"]:
        """The next `count` indices.

        Raises:
            ValueError: If the position was reached with another count.
        """
        if self.position != self._reached:
            self._restore(self.position, count)
        number = int(self._number[self._leaders.take(1)])
        picked = self.members[number][self._within[number].take(count)]
        self.position = self._reached = self._reached + count
        return picked

    def _restore(self, position: int, count: int) -> None:
        """Stand where takes of `count` led to."""
        takes, rest = divmod(position, count)
        if rest:
            raise ValueError(
                f"{position} samples were not taken {count} at a time: go on with the batch_size "
                "and micro_batches that the run began with."
            )
        self._leaders = ShuffledIndices(len(self.groups), self.seed)
        self._within = [ShuffledIndices(len(own), self.seed) for own in self.members]
        self._number = torch.unique(self.groups, return_inverse=True)[1]
        if takes:
            led = self._number[self._leaders.take(takes)].bincount(minlength=len(self.members))
            for order, times in zip(self._within, led.tolist(), strict=True):
                order.position = times * count
        self._reached = position


class Feed:
    """Indices of what is trained on next, whose data begins to be read before it is asked for.

    Data that can be read ahead has a method `expect(indices)`. Data whose samples can't all be in
    one batch has a method `groups()`: the group of each sample, or None.

    Args:
        data: The samples.
        seed: Of the shuffling.
        reads: Whether the data of a take with this number is wanted here; all by default.
        ahead: How many takes are read ahead, and kept in memory.
    """

    def __init__(
        self,
        data: TrainingData,
        seed: int,
        reads: Callable[[int], bool] = lambda take: True,
        ahead: int = 6,
    ) -> None:
        groups = getattr(data, "groups", None)
        numbers = None if groups is None else groups()
        self._order = (
            ShuffledIndices(len(data), seed) if numbers is None else GroupedIndices(numbers, seed)
        )
        self._expect, self._reads = getattr(data, "expect", None), reads
        self._ahead = 0 if self._expect is None else ahead
        self._next: deque[Tensor] = deque()
        self._position = 0

    @property
    def position(self) -> int:
        """Number of samples that were taken."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self._position = self._order.position = value
        self._next.clear()

    def take(self, count: int) -> Int[Tensor, " B"]:
        """The next `count` indices."""
        if any(len(indices) != count for indices in self._next):
            self.position = self._position
        if len(self._next) <= self._ahead // 2:  # several at a time: to wake a thread takes a while
            while len(self._next) <= self._ahead:
                number = self._order.position // count
                self._next.append(self._order.take(count))
                if self._expect is not None and self._reads(number):
                    self._expect(self._next[-1])
        self._position += count
        return self._next.popleft()
