"""One contestant with one seed: train it, sample, judge."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import tempfile
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shiva_dit.core.schedule import Schedule
from shiva_dit.demo.base import ASSETS, load_backbone, load_judge, usable_device
from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.held_out import HeldOut, held_out
from shiva_dit.experiments.maps import kept_maps
from shiva_dit.experiments.scoring import NUM_STEPS, Score, sample, sampler_times, score
from shiva_dit.models.attach import Attachment, attach
from shiva_dit.models.backbone import TunedBackbone
from shiva_dit.models.families import model_spec
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import Trained, Trainer

CHUNK = 100
"""Images per call of the pipeline."""
MIN_COUNT = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is equal for all contestants."""

    task: str = "digits"
    """Name of the demo task."""
    count: int = 300
    """Images that are judged, per contestant and seed."""
    num_steps: int = NUM_STEPS
    """Sampler steps."""
    guidance: float = 1.0
    """Guidance scale; 1 is none."""
    device: str = "cpu"
    """Where models are trained and run; judged is on the CPU."""
    base: Path | None = None
    """Folder of the task's backbone and judge (`shiva-dit train-base`); None for the shipped."""

    def __post_init__(self) -> None:
        if self.count < MIN_COUNT:
            raise ValueError(
                f"count must be at least {MIN_COUNT} (a distance needs that many images), "
                f"got {self.count}."
            )
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")

    def backbone(self, task: DemoTask) -> Any:
        """The unpruned model, on its device.

        Raises:
            ValueError: If its weights are missing, or there is no such device here.
        """
        model: Any = load_backbone(task, self.base or ASSETS)
        return model.to(usable_device(self.device))

    def judge(self, task: DemoTask) -> Judge:
        """Who judges.

        Raises:
            ValueError: If its weights are missing.
        """
        return load_judge(task, self.base or ASSETS)


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
    draws_maps: bool = False
    """Whether the kept tokens of ten images are recorded while sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One contestant's result for one seed."""

    score: Score
    held_out: HeldOut
    flops: float
    """FLOPs per image, all sampler steps."""
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


def start_worker(lock: Any) -> None:
    """Set up a process that runs contestants; the lock keeps progress bars apart."""
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # each process would repeat the libraries' notices


def compete(job: tuple[Settings, Contestant, int]) -> Outcome:
    """One contestant with one seed: train it if it is trained, then sample and judge."""
    settings, contestant, seed = job
    task = load_task(settings.task)
    backbone = settings.backbone(task)
    recipe = contestant.recipe
    if recipe is None:
        return _judged(settings, contestant, seed, task, backbone, None)
    trained, seconds = _train(_Training(settings, recipe, seed, contestant.name))
    schedule = trained.schedule
    if contestant.run_at is not None:
        schedule = trained.at(contestant.run_at)
    if trained.backbone_weights:
        TunedBackbone(backbone, trained.backbone_weights, trained.lora)
    attachment = None
    if trained.selector is not None:
        attachment = attach(backbone, trained.selector, schedule, updates=trained.updates)
    outcome = _judged(settings, contestant, seed, task, backbone, attachment)
    return dataclasses.replace(outcome, train_s=seconds, schedule=schedule if attachment else None)


@dataclass(frozen=True, slots=True)
class _Training:
    settings: Settings
    recipe: TrainConfig
    seed: int
    name: str = field(compare=False)


@lru_cache(maxsize=1)
def _train(job: _Training) -> tuple[Trained, float]:
    """A trained recipe and its CPU seconds; the next contestant may run it at another ratio."""
    task = load_task(job.settings.task)
    label = _label("train", job.name, job.seed)
    with tempfile.TemporaryDirectory() as out:
        config = dataclasses.replace(job.recipe, task=task.name, seed=job.seed, out=Path(out))
        trainer = Trainer(config, job.settings.backbone(task), task, task.scheduler())
        start = time.process_time()
        if config.trains_nothing:
            trained, seconds = trainer.result(), 0.0
        else:
            trained = trainer.run(description=label, position=_place())
            seconds = time.process_time() - start
        trainer.close()
    return trained, seconds


def _judged(
    settings: Settings,
    contestant: Contestant,
    seed: int,
    task: DemoTask,
    backbone: Any,
    attachment: Attachment | None,
) -> Outcome:
    """Sample and judge; the noise is the same for all contestants of a seed."""
    num_steps = contestant.num_steps or settings.num_steps
    parts, seconds = [], 0.0
    starts = range(0, settings.count, CHUNK)
    label = _label("sample", contestant.name, seed)
    for part, start in enumerate(
        tqdm(starts, desc=label, unit=f"x{CHUNK}", position=_place(), leave=False)
    ):
        images, cpu_s = sample(
            task,
            backbone,
            min(CHUNK, settings.count - start),
            seed=noise_seed(seed) + part,
            start=start,
            num_steps=num_steps,
            guidance=settings.guidance,
        )
        parts.append(images)
        seconds += cpu_s
    images = torch.cat(parts)
    keep_ratio, maps = 1.0, None
    if attachment is not None:
        run = tuple(sampler_times(num_steps))
        keep_ratio = attachment.counts.table(task.num_tokens, run).mean_keep_ratio
        if contestant.draws_maps:
            maps = kept_maps(task, attachment, 10, seed=noise_seed(seed), num_steps=num_steps)
    return Outcome(
        score=score(task, settings.judge(task), images),
        held_out=held_out(task, settings.backbone(task), backbone, attachment),
        flops=flops_per_image(task, backbone, attachment, num_steps),
        images=images,
        sample_s=seconds,
        keep_ratio=keep_ratio,
        parameters=0 if attachment is None else attachment.num_parameters,
        maps=maps,
    )


def _label(what: str, name: str, seed: int) -> str:
    return f"{what:6} {name}, seed {seed}"


def _place() -> int:
    """Line of this process's progress bar."""
    identity = multiprocessing.current_process()._identity
    return (identity[0] - 1) if identity else 0


def flops_per_image(
    task: DemoTask, backbone: Any, attachment: Attachment | None, num_steps: int
) -> float:
    """True FLOPs of one image without guidance: every sampler step with its own tokens."""
    size = task.num_tokens, task.captions.max_words
    if attachment is None:
        return float(num_steps * model_spec(backbone).flops(backbone, *size).dense())
    run = tuple(sampler_times(num_steps))
    table = attachment.counts.table(task.num_tokens, run)
    return float(sum(attachment.flops(*size, table.row(t)) for t in run))


def noise_seed(seed: int) -> int:
    """Sampling noise of a seed: apart from the training's, the same for all contestants."""
    return 1000 * (seed + 1)
