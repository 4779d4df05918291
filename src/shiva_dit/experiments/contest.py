"""Contestants with one seed: trained once, then each sampled and judged."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.contestants import (
    MIN_COUNT,
    Contestant,
    Diverged,
    Job,
    Outcome,
    Settings,
)
from shiva_dit.experiments.frontier.executed import counted
from shiva_dit.experiments.held_out import HeldOut, held_out
from shiva_dit.experiments.kept import keep, put_trained_on
from shiva_dit.experiments.maps import kept_maps
from shiva_dit.experiments.scoring import (
    Sampler,
    sample,
    sampler_times,
    score,
)
from shiva_dit.methods.blocks import BlockReducer
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_flops
from shiva_dit.models.reducing import Reduction
from shiva_dit.models.spec import grid_of
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trained import Trained
from shiva_dit.training.trainer import Trainer

CHUNK = 100
"""Images per call of the pipeline."""
LARGEST = 1e6
"""Pictures lie about [-1, 1]; a judge's features of larger ones than this overflow."""


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
        trainer = Trainer(config, job.settings.backbone(task), task, task.sampler(config.num_steps))
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
    if isinstance(attachment, Reduction) and "steps" in attachment.reducer.needs:
        found = HeldOut()  # single predictions are none of a run
    found = found or held_out(task, settings.backbone(task), backbone, selects)
    if not (float(images.abs().max()) < LARGEST and math.isfinite(found.error or 0.0)):
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
    """True FLOPs of one image without guidance: every sampler step with its own tokens.

    Where they differ from picture to picture, it is the mean of the first few.
    """
    size = task.num_tokens, task.captions.max_words
    if attachment is None:
        return float(num_steps * model_flops(backbone, *size).dense())
    if isinstance(attachment, Reduction) and isinstance(attachment.reducer, BlockReducer):
        with counted(backbone) as executed:
            sample(task, backbone, MIN_COUNT, seed=0, num_steps=num_steps, sampler=sampler)
        return sum(executed) / MIN_COUNT
    if isinstance(attachment, Reduction):
        grid = grid_of(backbone, task.held_out_images)
        return float(attachment.run_flops(*grid, task.captions.max_words, num_steps))
    run = tuple(sampler_times(num_steps, sampler))
    table = attachment.counts.table(task.num_tokens, run)
    return float(sum(pruned_flops(attachment, *size, table.row(t)) for t in run))


def noise_seed(seed: int) -> int:
    """Sampling noise of a seed: apart from the training's, the same for all contestants."""
    return 1000 * (seed + 1)
