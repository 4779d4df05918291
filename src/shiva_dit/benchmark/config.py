"""What a benchmark times, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from shiva_dit.config import check_types

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """What is timed, and how."""

    model: str
    """A name of `WORKLOADS`."""
    keep: tuple[float, ...] = (0.8, 0.6, 0.4)
    """Mean keep ratios in (0, 1): one arm each, besides the dense one and the adapter's own."""
    adapter: str | None = None
    """Folder or Hub id; an untrained one with equal ratios in all blocks but the first where none
    is given. Time does not depend on what was learned, but for the schedule."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; the model's own by default."""
    text_tokens: int | None = None
    """T; the pipelines' own by default."""
    batch: int = 1
    """Samples per forward. With guidance in one batch an image takes two."""
    steps: int = 28
    """Steps of a sampling: for images per second."""
    forwards: int | None = None
    """Forwards per time taken, spread evenly over t; by default as many as steps, on a CPU as many
    as it takes to meet each row of the tables."""
    multiple: int | None = None
    """k is a multiple of this; as `Schedule.for_tokens` sees fit by default."""
    segments: int | None = None
    """At most so many different rows of a schedule."""
    select_every: int | None = None
    """So many prunable blocks in a row share their first one's scores; the adapter's by default."""
    dtype: str = "bfloat16"
    """One of `DTYPES`."""
    mode: Literal["eager", "compiled", "graphs"] = "compiled"
    """All arms as they are, compiled block by block, or compiled and then replayed as CUDA graphs,
    the dense one too."""
    train: Literal["full", "lora"] | None = None
    """Time training steps that tune all weights or a LoRA of rank 16, instead of forwards."""
    beside: Literal["compile", "int8", "mag_cache"] | None = None
    """Time every arm without and with this: `torch.compile` (then `mode` is of the arms with it),
    int8 by torchao, or MagCache that skips every other step after the first fifth."""
    repeats: int = 15
    """Rounds; each times every arm once."""
    device: str = "cuda"
    """Where it runs."""

    def __post_init__(self) -> None:
        check_types(self)
        if not all(0.0 < keep < 1.0 for keep in self.keep):
            raise ValueError(f"keep ratios must lie in (0, 1), got {self.keep}: the share KEPT.")
        if not self.keep and self.adapter is None:
            raise ValueError("nothing to time: give a keep ratio or an adapter.")
        for name in ("batch", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("text_tokens", "forwards", "segments", "multiple", "select_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self._check_beside()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")

    def _check_beside(self) -> None:
        if self.beside is not None and self.train is not None:
            raise ValueError("beside times forwards and train steps: one of them at a time.")
        if self.beside == "compile" and self.mode == "eager":
            raise ValueError('beside="compile" needs a mode that compiles, got "eager".')
        if self.beside == "mag_cache" and self.mode != "eager":
            raise ValueError(
                'beside="mag_cache" needs mode="eager": diffusers keeps blocks under its cache out '
                f"of the compiler, got {self.mode!r}."
            )
