"""Encoded pictures as training data: read ahead by threads, while a step runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from shiva_dit.provenance import data_digest
from shiva_dit.training.data import Batch
from shiva_dit.training.looks.material import Decode
from shiva_dit.training.pictures.about import ABOUT, AGAIN, LATENTS, TEXT, About, Sample
from shiva_dit.training.pictures.encoders import signature
from shiva_dit.training.pictures.pipelines import Sides, served
from shiva_dit.training.pictures.shards import Shards
from shiva_dit.training.pictures.sources import find

WORKERS = 2


@dataclass(frozen=True, slots=True)
class Read:
    """What a batch is made of."""

    latents: Tensor
    sides: Sides
    texts: dict[str, Tensor]
    """Of all captions of all samples, in order."""


class FolderData:
    """Training data that `encode_folder` wrote (`TrainingData`).

    Args:
        folder: Its `out`.
        workers: Threads that read ahead of what is asked for (`expect`).
        pinned: Whether batches are in pinned memory, for a GPU.

    Raises:
        ValueError: If it is no such folder, or not complete.
    """

    def __init__(self, folder: Path, workers: int = WORKERS, *, pinned: bool = False) -> None:
        if not (folder / ABOUT).is_file():
            raise ValueError(
                f"{folder} holds no encoded pictures ({ABOUT} is missing): make it by "
                "`shiva-dit encode`."
            )
        self.name = str(folder)
        self.about = about = About.read(folder)
        self.how = served(about.pipeline)
        self.latents, self.texts = (Shards(about.folder(folder, kind)) for kind in (LATENTS, TEXT))
        texts = {about.empty, *(key for sample in about.samples for key in sample.texts)}
        pictures = {sample.key for sample in about.samples}
        missing = sum(key not in self.latents for key in pictures)
        missing += sum(key not in self.texts for key in texts)
        if missing:
            raise ValueError(
                f"{folder} is not complete, {missing} of {len(pictures)} pictures and "
                f"{len(texts)} captions are missing: {AGAIN}, it goes on."
            )
        self._check_alike(folder)
        self._rows = [row for row, s in enumerate(about.samples) for _ in range(s.repeats)]
        self._several = any(len(sample.texts) > 1 for sample in about.samples)
        self._pinned = pinned
        empty = self.texts.read([about.empty], pinned=pinned)
        self._empty = {name: value[0] for name, value in empty.items()}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
        self._expected: dict[tuple[int, ...], Future[Read]] = {}
        self.decoder: Callable[[], Decode | None] = lambda: None
        """Gives what makes pictures of latents, where a pipeline that does is at hand."""

    def _check_alike(self, folder: Path) -> None:
        shapes: dict[tuple[int, int], object] = {}
        for sample in self.about.samples:
            kind = self.latents.kind(sample.key)
            if shapes.setdefault(sample.shape, kind) is not kind:
                raise ValueError(f"{folder}: {sample.name} has latents unlike the others: {AGAIN}.")
        if len(self.texts.kinds) > 1:
            raise ValueError(f"{folder} has captions of several kinds: encode into another folder.")

    def __len__(self) -> int:
        """Number of samples: of pictures, as often as they count."""
        return len(self._rows)

    def identity(self) -> str:
        """Digest of what was encoded (pictures, captions, size) and by what."""
        rows = [(s.key, s.shape, s.texts, s.repeats) for s in self.about.samples]
        return data_digest([self.about.encoders, rows])

    def keys(self) -> list[str]:
        """Of each sample, what its picture alone decides."""
        return [self._sample(index).key for index in range(len(self))]

    def titles(self) -> list[str]:
        """Of each sample, the picture's name."""
        return [self._sample(index).name for index in range(len(self))]

    def groups(self) -> list[int] | None:
        """Of each sample, the number of its shape; None if there is one. A batch has one."""
        shapes = sorted({sample.shape for sample in self.about.samples})
        if len(shapes) == 1:
            return None
        numbers = {shape: number for number, shape in enumerate(shapes)}
        return [numbers[self.about.samples[row].shape] for row in self._rows]

    def expect(self, indices: Int[Tensor, " B"]) -> None:
        """Begin to read a batch that will be asked for."""
        key = tuple(indices.tolist())
        if key not in self._expected:
            self._expected[key] = self._pool.submit(self._read, key)

    def forget(self) -> None:
        """Nothing that is expected will be asked for."""
        for future in self._expected.values():
            future.cancel()
        self._expected.clear()

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """The samples with these indices, latents in float32, captions in the 16 bits they have.

        Where pictures have several captions, one of each is drawn.

        Raises:
            ValueError: If a file is damaged, or the samples have several shapes.
        """
        key = tuple(indices.tolist())
        expected = self._expected.pop(key, None)
        read = self._read(key) if expected is None else expected.result()
        texts = read.texts
        if self._several:
            drawn, rows, start = torch.rand(len(key), generator=generator).tolist(), [], 0
            for index, u in zip(key, drawn, strict=True):
                count = len(self._sample(index).texts)
                rows.append(start + int(u * count))
                start += count
            texts = {name: value[rows] for name, value in texts.items()}
        how, sides = self.how, read.sides
        return Batch(
            latents=read.latents,
            conditioning=texts,
            arguments=lambda kept: how.arguments(kept, sides),
            picture=lambda latents: how.layout.picture(latents, *sides.latents),
        )

    def unconditional(self) -> dict[str, Tensor]:
        """The empty caption."""
        return self._empty

    def _read(self, indices: Sequence[int]) -> Read:
        samples = [self._sample(index) for index in indices]
        found = {sample.shape for sample in samples}
        if len(found) > 1:
            raise ValueError(
                f"one batch has pictures of {len(found)} shapes: take its indices from a `Feed`, "
                "or encode without --buckets."
            )
        keys = [key for sample in samples for key in sample.texts]
        texts = self.texts.read(keys, pinned=self._pinned)
        kept = self.latents.read([s.key for s in samples], pinned=self._pinned)[LATENTS]
        wide, high = samples[0].shape
        sides = Sides(pixels=(high, wide), latents=(kept.shape[2], kept.shape[3]))
        laid = self.how.layout.laid(kept)
        if laid.dtype == torch.float32 and laid.is_pinned() == self._pinned:
            return Read(laid, sides, texts)
        latents = torch.empty(laid.shape, dtype=torch.float32, pin_memory=self._pinned)
        return Read(latents.copy_(laid), sides, texts)

    def _sample(self, index: int) -> Sample:
        return self.about.samples[self._rows[index]]

    def changed_since(self) -> str | None:
        """What to say if the pictures' files aren't as they were when they were encoded."""
        source = Path(self.about.source)
        if not source.exists():
            return None  # moved, or on another machine
        if find(source, leave_out=Path(self.name)).signature() == self.about.files:
            return None
        return (
            f"{source} has changed since it was encoded into {self.name}: {AGAIN} to take that up."
        )

    def check_pipeline(self, source: str) -> None:
        """Raise if this was encoded by other encoders than a saved pipeline's.

        Raises:
            ValueError: Says which.
        """
        then = self.about.saved_as
        now = signature(source) if then else None
        if then is None or now is None:
            return
        other = sorted(name for name in {*then} & {*now} if then[name] != now[name])
        if other:
            raise ValueError(
                f"{self.name} was encoded by another pipeline than {source} ({', '.join(other)} "
                f"differ): encode it by that one, or train {self.about.model}."
            )

    def longest_side(self) -> int:
        """In pixels."""
        return max(math.ceil(max(sample.shape)) for sample in self.about.samples)
