"""What a frontier is of: a model, ways to run it, and how they are sampled, timed and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shiva_dit.config import check_seeds, check_types, from_dict, to_dict
from shiva_dit.experiments.scoring import Sampler
from shiva_dit.methods.registry import METHODS
from shiva_dit.models.correction import HALF_LIFE

CacheKind = Literal["mag_cache", "first_block", "taylor_seer", "dbcache"]
SHIPPED = "shipped"
"""Stands for the adapter that ships for a demo task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A way to run the model, at one or more numbers of steps."""

    name: str
    """As tables show it."""
    series: str = ""
    """Its line in the plot; by default its name."""
    kind: str = ""
    """What it counts as where the best of another kind stands beside the best; by default its
    line."""
    steps: tuple[int, ...] = (4, 8, 12)
    """Sampler steps; each is a point."""
    sampler: Sampler = "unipc"
    """How they are made."""
    adapter: str | None = None
    """Folder of an adapter or of a control that `shiva-dit compare` kept, in which "{seed}" stands
    for the seed; "shipped" is a demo task's own."""
    run_at: float | None = None
    """Mean keep ratio to run an adapter at, where it isn't the one trained for."""
    method: str | None = None
    """A reducer of `methods/registry.py` that needs no training, such as "tomesd"."""
    keep_ratio: float = 0.5
    """Share of the tokens that it keeps."""
    whole_steps: int = 0
    """Steps of a run in which the unpruned model predicts as well (`shiva_dit.correct`)."""
    half_life: float = HALF_LIFE
    """How long what was off there is made good, as a share of the run."""
    cache: CacheKind | None = None
    """What reuses earlier steps: diffusers' "mag_cache", "first_block" and "taylor_seer", or
    cache-dit's "dbcache"."""
    threshold: float = 0.1
    """Its setting: the error that it allows; of "taylor_seer" the steps from one full computation
    to the next."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"{self.name}: steps must be at least 1, got {self.steps}.")
        if self.run_at is not None and self.adapter is None:
            raise ValueError(f"{self.name}: run_at is for an adapter.")
        if self.adapter is not None and self.method is not None:
            raise ValueError(f"{self.name}: an arm has an adapter or a method, not both.")
        self._check_whole_steps()
        if self.cache is not None and self.threshold <= 0:
            raise ValueError(f"{self.name}: threshold must be positive, got {self.threshold}.")
        if self.method is not None:
            self._check_method()

    def _check_whole_steps(self) -> None:
        if self.whole_steps < 0:
            raise ValueError(
                f"{self.name}: whole_steps must be at least 0, got {self.whole_steps}."
            )
        if self.whole_steps and (self.cache or not (self.adapter or self.method)):
            raise ValueError(
                f"{self.name}: whole_steps are for an adapter or a method, without a cache."
            )
        if not 0.0 < self.half_life < math.inf:
            raise ValueError(f"{self.name}: half_life must be positive, got {self.half_life}.")

    def _check_method(self) -> None:
        free = [n for n, found in METHODS.items() if not found.tunes]
        if self.method not in free:
            raise ValueError(
                f"{self.name}: {self.method!r} is no method without training: take one of "
                f"{', '.join(free)}, or the folder of a trained one as adapter."
            )

    @property
    def line(self) -> str:
        """Its line in the plot."""
        return self.series or self.name

    def runs_by(self) -> dict[str, Any]:
        """All that decides its pictures and times."""
        shown = ("name", "series", "kind", "steps")
        return {name: value for name, value in to_dict(self).items() if name not in shown}


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How the arms are timed, in turn."""

    batch: int = 4
    """Pictures per call."""
    repeats: int = 5
    """Rounds; 0 leaves times out."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    """Times are compared within a mode."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.batch < 1 or self.repeats < 0:
            raise ValueError("timing: batch must be at least 1 and repeats at least 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """One file of `recipes/frontier-*.toml`."""

    what: str
    """Names the record."""
    about: str
    """What is asked, in a sentence."""
    task: str | None = None
    """A demo task, or:"""
    pipeline: str | None = None
    """folder or Hub id of a pipeline of diffusers."""
    prompts: Path | None = None
    """Its prompts, one in a line."""
    size: tuple[int, int] | None = None
    """Height and width of its pictures in pixels; its own by default. A demo task's judge sees them
    scaled to its own."""
    lora: Path | None = None
    """A LoRA as diffusers loads it, a file or a folder, under all arms and the truth."""
    base: Path | None = None
    """Folder of the task's backbone and judge; None for the shipped."""
    device: str = "cpu"
    """Where it runs."""
    count: int = 100
    """Pictures per point and seed."""
    batch: int = 50
    """Pictures per call while they are judged: caches decide for a call's pictures together."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each has noise of its own, and weights where a folder names "{seed}"."""
    guidance: tuple[float, ...] = (1.0, 4.0)
    """Scales, each with a front of its own; 1 is none."""
    reference_steps: int = 48
    """UniPC steps of the unpruned model whose pictures are the truth."""
    reference: str = "unpruned"
    """Key of the arm that times are shares of: at its most steps."""
    timing: Timing = field(default_factory=Timing)
    """How it is timed."""
    arms: dict = field(default_factory=dict)  # type: ignore[type-arg]
    """By key: the fields of an `Arm`."""

    def __post_init__(self) -> None:
        check_types(self)
        if (self.task is None) == (self.pipeline is None):
            raise ValueError("a frontier is of a task or of a pipeline: give one of the two.")
        if (self.pipeline is None) != (self.prompts is None):
            raise ValueError("pipeline and prompts go together.")
        if self.count < 2 or self.batch < 1 or self.reference_steps < 1:
            raise ValueError("count must be at least 2, batch and reference_steps at least 1.")
        if self.pipeline is not None and self.timing.repeats and self.timing.batch > self.count:
            raise ValueError(
                f"timing.batch must be at most count, the number of prompts, got "
                f"{self.timing.batch} and {self.count}."
            )
        if not self.seeds or not self.guidance:
            raise ValueError("a frontier needs a seed and a guidance scale.")
        check_seeds(self.seeds)
        if min(self.guidance) < 1.0 or len(set(self.guidance)) < len(self.guidance):
            raise ValueError(f"guidance must be scales of at least 1, got {self.guidance}.")
        if self.reference not in self.arms:
            raise ValueError(
                f"there is no arm {self.reference!r}: times are shares of the arm that "
                "`reference` names."
            )
        self.made()

    def made(self) -> dict[str, Arm]:
        """All arms, by key.

        Raises:
            ValueError: If one is wrong.
        """
        arms = {key: from_dict(Arm, data, f"arms.{key}") for key, data in self.arms.items()}
        for key, arm in arms.items():
            if arm.adapter == SHIPPED and self.task is None:
                raise ValueError(f'arms.{key}: adapter = "{SHIPPED}" is for demo tasks.')
        return arms


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One arm at one number of steps."""

    key: str
    arm: Arm
    steps: int
    guidance: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.key}-{self.steps}-g{self.guidance:g}-{self.seed}"


REFERENCE = "reference"
"""Key of the truth."""


def points(frontier: Frontier) -> list[Point]:
    """All of them, the truth of each guidance and seed first."""
    arms = frontier.made()
    if REFERENCE in arms:
        raise ValueError(f"{REFERENCE!r} is always there: give the arm another key.")
    truth = Arm(name="truth", steps=(frontier.reference_steps,))
    return [
        Point(key=key, arm=arm, steps=steps, guidance=guidance, seed=seed)
        for guidance in frontier.guidance
        for seed in frontier.seeds
        for key, arm in {REFERENCE: truth, **arms}.items()
        for steps in arm.steps
    ]
