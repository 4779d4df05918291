"""Who competes, in what, and what comes of it: plain data that goes from process to process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shiva_dit.config import check_types, from_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.experiments.held_out import HeldOut
from shiva_dit.experiments.scoring import NUM_STEPS, UNNAMED, Sampler, Score
from shiva_dit.training.recipe import TrainConfig

MIN_COUNT = 20
SHOWN = 8
"""Pictures whose kept tokens are recorded."""
CHUNK = 100
"""Pictures per call of a pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is equal for all contestants."""

    task: str | None = None
    """Name of the demo task, "digits" where no pipeline is named, or:"""
    pipeline: str | None = None
    """folder or Hub id of a pipeline of diffusers,"""
    data: Path | None = None
    """pictures that `shiva-dit encode` made by it, to train on,"""
    prompts: Path | None = None
    """and prompts to sample, one in a line."""
    size: tuple[int, int] | None = None
    """Height and width of its pictures in pixels; its own by default."""
    count: int = 300
    """Images that are judged, per contestant and seed."""
    num_steps: int = NUM_STEPS
    """Sampler steps."""
    sampler: Sampler = "euler"
    """How they are made."""
    batch: int = CHUNK
    """Pictures per call."""
    guidance: float = 1.0
    """Guidance scale; 1 is none."""
    device: str = "cpu"
    """Where models are trained and run; judged is on the CPU."""
    base: Path | None = None
    """Folder of the task's backbone and judge (`shiva-dit train-base`); None for the shipped."""

    def __post_init__(self) -> None:
        check_types(self)
        own = (self.pipeline, self.data, self.prompts)
        if self.task is not None and self.pipeline is not None:
            raise ValueError("settings are of a task or of a pipeline: give one of the two.")
        if any(given is None for given in own) != all(given is None for given in own):
            raise ValueError("settings.pipeline, settings.data and settings.prompts go together.")
        if self.task is None and self.pipeline is None:
            object.__setattr__(self, "task", "digits")
        if self.size is not None and self.task is not None:
            raise ValueError("settings.size is for a pipeline: a task has its own.")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}.")
        if self.task is None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}.")
        if self.task is not None and self.count < MIN_COUNT:
            raise ValueError(
                f"count must be at least {MIN_COUNT} (a distance needs that many images), "
                f"got {self.count}."
            )
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")


def saved_settings(data: Mapping[str, Any], where: str) -> Settings:
    """Settings as a record has them; older ones name no sampler: `UNNAMED` is meant."""
    return from_dict(Settings, {"sampler": UNNAMED, **data}, where)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A way to run the backbone."""

    name: str
    """As tables show it."""
    recipe: TrainConfig | None = None
    """How it is trained, if there is anything to train; None is the unpruned model as it ships."""
    run_at: float | None = None
    """Mean keep ratio in (0, 1) to run at, where it isn't the one trained for: the policy's anchor
    is moved there."""
    num_steps: int | None = None
    """Sampler steps, where they are not the settings'."""
    sampler: Sampler | None = None
    """How they are made, where that is not the settings'."""
    draws_maps: bool = False
    """Whether the kept tokens of ten images are recorded while sampling."""


def reference(settings: Settings) -> Contestant:
    """The unpruned model by UniPC with twice the steps: what distances to it are taken to.

    Its pictures from the settings' own steps are off by what the sampler leaves (36 dB with 12
    steps of Euler on the digits): taken to these, better samplers would look worse.
    """
    steps = 2 * settings.num_steps
    return Contestant(name=f"unpruned, {steps} steps of UniPC", num_steps=steps, sampler="unipc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One contestant's result for one seed."""

    score: Score | None
    """A judge's verdict; None where there is none."""
    held_out: HeldOut
    flops: float
    """FLOPs per image, all sampler steps; of a pipeline of one's own with guidance both halves."""
    images: Tensor
    """All that were judged."""
    sample_s: float
    """CPU seconds of sampling."""
    train_s: float = 0.0
    """CPU seconds of training, 0 for none."""
    keep_ratio: float = 1.0
    """Executed mean over the sampler's steps and the pruned blocks."""
    parameters: int | None = None
    """Parameters of the router and of what rejected tokens get; None in older records."""
    schedule: Schedule | None = None
    """Ratios by time bin and block."""
    maps: Tensor | None = None
    """Kept tokens of the first ten, (L, T, 10, N), where they are recorded."""
    shares: Tensor | None = None
    """How often each token of the first pictures was kept (`KeptShares`), (B, N)."""
    kept: dict[str, str] | None = None
    """SHA-256 of the files that hold what was trained, by name; None where nothing was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diverged:
    """A contestant that gave no result for one seed."""

    step: int | None
    """Of the training; None where it trained, and its pictures are not finite."""
    reason: str
    """In words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process does at a time."""

    settings: Settings
    contestants: tuple[Contestant, ...]
    """All of one recipe, which is trained once for all."""
    seed: int
    keep: Path | None = None
    """Folder for what is trained; None to keep nothing."""
