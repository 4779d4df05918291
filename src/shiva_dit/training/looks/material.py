"""What a run is looked at by: samples that it never trains on, and prompts to draw."""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from shiva_dit.provenance import data_digest
from shiva_dit.training.data import Batch, TrainingData, data_name
from shiva_dit.training.settings import WatchConfig

Decode = Callable[[Float[Tensor, "B ..."]], Float[Tensor, "B c ... h w"]]
"""Latents to pictures in [-1, 1], (B, c, h, w), or to videos, (B, c, F, h, w)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """Prompts whose pictures have one shape."""

    titles: tuple[str, ...]
    batch: Batch
    """Their conditioning, and latents for the shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What looks need, and what is left to train on."""

    training: TrainingData
    """Without what is held back."""
    held_out: tuple[Batch, ...] = ()
    """Of one shape each."""
    shown: tuple[Shown, ...] = ()
    decode: Decode | None = None
    """Where pictures are not latents themselves."""


def material(config: WatchConfig, data: TrainingData) -> Material:
    """What a run is looked at by; nothing, and all data to train on, where it is not.

    Data that has samples beside those to train on says so by a method
    `watched(WatchConfig) -> Material`. Of other data a share is held back, each sample by its key
    where the data has a method `keys() -> list[str]`, or else by its number. A method `titles()`
    names samples, and `decoder()` gives what makes pictures of latents.

    Raises:
        ValueError: If nothing, or everything, would be held back.
    """
    if not config.every:
        return Material(training=data)
    own = getattr(data, "watched", None)
    if own is not None:
        return own(config)
    places = held_back(keys_of(data), config)
    if len(places) < config.held_out:
        tqdm.write(
            f"{len(places)} of {len(data)} samples are held back, so that the held-out error is "
            f"of these, not of watch.held_out = {config.held_out}.",
            file=sys.stderr,
        )
    chosen = sorted(places, key=lambda place: place_of(keys_of(data)[place]))[: config.held_out]
    decoder = getattr(data, "decoder", None)
    titles = getattr(data, "titles", lambda: [f"sample {row}" for row in range(len(data))])()
    several = getattr(data, "groups", lambda: None)() or [0] * len(data)
    rows: dict[int, list[int]] = defaultdict(list)
    shown: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(chosen):
        rows[several[row]].append(row)
        if number < config.prompts:
            shown[several[row]].append(row)

    def read(some: Sequence[int]) -> Batch:
        return data.batch(torch.tensor(some), torch.Generator().manual_seed(0))

    return Material(
        training=Remaining(data, sorted({*range(len(data))} - {*places})),
        held_out=tuple(read(some) for some in rows.values()),
        shown=tuple(
            Shown(titles=tuple(titles[row] for row in some), batch=read(some))
            for some in shown.values()
        ),
        decode=None if decoder is None or not shown else decoder(),
    )


def keys_of(data: TrainingData) -> list[str]:
    """What each sample is told from others by."""
    keys = getattr(data, "keys", None)
    return [str(row) for row in range(len(data))] if keys is None else keys()


def place_of(key: str) -> float:
    """Where in [0, 1) a sample stands, by its key alone."""
    digest = hashlib.sha256(f"held out: {key}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2.0**48


def held_back(keys: Sequence[str], config: WatchConfig) -> list[int]:
    """Which samples are never trained on: those whose place lies below the share.

    Raises:
        ValueError: If these are none, or all.
    """
    places = [place_of(key) for key in keys]
    found = [row for row, place in enumerate(places) if place < config.held_out_share]
    if not found:
        least = min(places)
        raise ValueError(
            f"watch.held_out_share = {config.held_out_share:g} holds back none of {len(keys)} "
            f"samples: set it to {least + 0.01:.2f} at least, or look at nothing by watch.every=0."
        )
    if len(found) == len(keys):
        raise ValueError(
            f"watch.held_out_share = {config.held_out_share:g} holds back all {len(keys)} samples: "
            "set it lower."
        )
    return found


class Remaining:
    """The samples of data that are not held back (`TrainingData`).

    Args:
        data: All of them.
        rows: Which remain.
    """

    def __init__(self, data: TrainingData, rows: Sequence[int]) -> None:
        self.data, self.rows = data, torch.tensor(rows)
        name = data_name(data)
        if name is not None:
            self.name = name
        if hasattr(data, "identity"):
            self.identity = self._identity
        if hasattr(data, "expect"):
            self.expect = self._expect

    def __len__(self) -> int:
        """Number of samples that remain."""
        return len(self.rows)

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """The samples with these numbers among the remaining ones."""
        return self.data.batch(self.rows[indices], generator)

    def unconditional(self) -> dict[str, Tensor]:
        """The data's."""
        return self.data.unconditional()

    def groups(self) -> list[int] | None:
        """Of each sample, the number of its group; None if there is one."""
        groups = getattr(self.data, "groups", lambda: None)()
        left = None if groups is None else [groups[row] for row in self.rows.tolist()]
        return None if left is None or len({*left}) == 1 else left

    def _identity(self) -> str:
        whole: Any = self.data
        return data_digest([whole.identity(), self.rows.tolist()])

    def _expect(self, indices: Int[Tensor, " B"]) -> None:
        whole: Any = self.data
        whole.expect(self.rows[indices])
