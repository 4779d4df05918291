"""Contestants with one seed: train once, then sample and judge each."""

from __future__ import annotations

import dataclasses
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shiva_dit.config import check_types, from_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.demo.base import ASSETS, load_backbone, load_judge, usable_device
from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.held_out import HeldOut, held_out
from shiva_dit.experiments.kept import keep, put_trained_on
from shiva_dit.experiments.maps import kept_maps
from shiva_dit.experiments.scoring import (
    NUM_STEPS,
    UNNAMED,
    Sampler,
    Score,
    sample,
    sampler_times,
    score,
)
from shiva_dit.models.attach import Attachment
from shiva_dit.models.counted import model_flops
from shiva_dit.models.reducing import Reduction
from shiva_dit.models.spec import grid_of
from shiva_dit.signals import Stopped, stop
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import Trained, Trainer

CHUNK = 100
"""Images per call of the pipeline."""
MIN_COUNT = 20
LARGEST = 1e6
"""Pictures lie about [-1, 1]; a judge's features of larger ones than this overflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is equal for all contestants."""

    task: str = "digits"
    """Name of the demo task."""
    count: int = 300
    """Images that are judged, per contestant and seed."""
    num_steps: int = NUM_STEPS
    """Sampler steps."""
    sampler: Sampler = "euler"
    """How they are made."""
    guidance: float = 1.0
    """Guidance scale; 1 is none."""
    device: str = "cpu"
    """Where models are trained and run; judged is on the CPU."""
    base: Path | None = None
    """Folder of the task's backbone and judge (`shiva-dit train-base`); None for the shipped."""

    def __post_init__(self) -> None:
        check_types(self)
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


def start_worker(lock: Any) -> None:
    """Set up a process that runs contestants; the lock keeps progress bars apart.

    A terminal sends Ctrl-C to all processes: the one that gave out the work answers it, and ends
    these by SIGTERM, which takes their temporary files along. They end, too, when it is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # each process would repeat the libraries' notices


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def compete_in_worker(job: Job) -> list[Outcome | Diverged]:
    """As `compete`; a signal ends the process, which else would begin the next job.

    Between jobs it ends at once and says nothing: there is nothing to undo.
    """
    try:
        signal.signal(signal.SIGTERM, stop)
        return compete(job)
    except Stopped as stopped:
        os._exit(128 + stopped.number)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def compete(job: Job) -> list[Outcome | Diverged]:
    """Train once if there is anything to train, then sample and judge each contestant."""
    task = load_task(job.settings.task)
    recipe = job.contestants[0].recipe
    held: dict[float | None, HeldOut] = {}
    if recipe is None:
        return [_run(job, task, contestant, None, held) for contestant in job.contestants]
    trained, seconds = _train(job, task, recipe)
    if isinstance(trained, Diverged):
        return [trained for _ in job.contestants]
    kept = None
    if job.keep is not None and not recipe.trains_nothing:
        kept = keep(trained, recipe, job.keep)
    outcomes = [_run(job, task, contestant, trained, held) for contestant in job.contestants]
    return [
        outcome
        if isinstance(outcome, Diverged)
        else dataclasses.replace(outcome, train_s=seconds, kept=kept)
        for outcome in outcomes
    ]


def _run(
    job: Job,
    task: DemoTask,
    contestant: Contestant,
    trained: Trained | None,
    held: dict[float | None, HeldOut],
) -> Outcome | Diverged:
    """One contestant on a backbone of its own; errors held out are measured once for each ratio."""
    backbone = job.settings.backbone(task)
    attachment = schedule = None
    if trained is not None:
        schedule = trained.schedule
        if contestant.run_at is not None:
            schedule = trained.at(contestant.run_at)
        # Random tokens differ from the noise that pictures start from.
        attachment = put_trained_on(trained, schedule, backbone, seed=noise_seed(job.seed) + 500)
    try:
        found = held.get(contestant.run_at)
        outcome = _judged(job.settings, contestant, job.seed, task, backbone, attachment, found)
    except FloatingPointError as error:
        return Diverged(step=None, reason=str(error))
    held[contestant.run_at] = outcome.held_out
    return dataclasses.replace(outcome, schedule=schedule if attachment else None)


def _train(job: Job, task: DemoTask, recipe: TrainConfig) -> tuple[Trained | Diverged, float]:
    """What was trained, or why not, and its CPU seconds."""
    label = _label("train", job.contestants[0].name, job.seed)
    with tempfile.TemporaryDirectory() as out:
        config = dataclasses.replace(recipe, task=task.name, seed=job.seed, out=Path(out))
        trainer = Trainer(config, job.settings.backbone(task), task, task.scheduler())
        if config.trains_nothing:
            trained = trainer.result()
            trainer.close()
            return trained, 0.0
        start = time.process_time()
        try:
            trained = trainer.run(description=label, position=_place(), saves_on_signals=False)
        except FloatingPointError as error:
            # What the trainer advises is for a run with a folder of its own.
            return Diverged(step=trainer.step, reason=str(error).partition(" at step ")[0]), 0.0
        seconds = time.process_time() - start
        trainer.close()
    return trained, seconds


def _judged(
    settings: Settings,
    contestant: Contestant,
    seed: int,
    task: DemoTask,
    backbone: Any,
    attachment: Attachment | Reduction | None,
    found: HeldOut | None,
) -> Outcome:
    """Sample and judge; the noise is the same for all contestants of a seed."""
    num_steps = contestant.num_steps or settings.num_steps
    sampler = contestant.sampler or settings.sampler
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
            sampler=sampler,
            guidance=settings.guidance,
        )
        parts.append(images)
        seconds += cpu_s
    images = torch.cat(parts)
    selects = attachment if isinstance(attachment, Attachment) else None
    found = found or held_out(task, settings.backbone(task), backbone, selects)
    if not (float(images.abs().max()) < LARGEST and math.isfinite(found.error)):
        raise FloatingPointError("its pictures, or its predictions, are not finite")
    keep_ratio, maps = 1.0, None
    if isinstance(attachment, Reduction):
        keep_ratio = attachment.reducer.count(task.num_tokens) / task.num_tokens
    if selects is not None:
        run = tuple(sampler_times(num_steps, sampler))
        keep_ratio = selects.counts.table(task.num_tokens, run).mean_keep_ratio
        if contestant.draws_maps:
            maps = kept_maps(
                task,
                selects,
                10,
                seed=noise_seed(seed),
                num_steps=num_steps,
                sampler=sampler,
            )
    return Outcome(
        score=score(task, settings.judge(task), images),
        held_out=found,
        flops=flops_per_image(task, backbone, attachment, num_steps, sampler),
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
    task: DemoTask,
    backbone: Any,
    attachment: Attachment | Reduction | None,
    num_steps: int,
    sampler: Sampler = "euler",
) -> float:
    """True FLOPs of one image without guidance: every sampler step with its own tokens."""
    size = task.num_tokens, task.captions.max_words
    if attachment is None:
        return float(num_steps * model_flops(backbone, *size).dense())
    if isinstance(attachment, Reduction):
        grid = grid_of(backbone, task.held_out_images)
        return float(num_steps * attachment.flops(*grid, task.captions.max_words))
    run = tuple(sampler_times(num_steps, sampler))
    table = attachment.counts.table(task.num_tokens, run)
    return float(sum(attachment.flops(*size, table.row(t)) for t in run))


def noise_seed(seed: int) -> int:
    """Sampling noise of a seed: apart from the training's, the same for all contestants."""
    return 1000 * (seed + 1)
