"""Contestants with one seed: trained once, then each sampled and judged."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shiva_dit.experiments.contestants import SHOWN, Contestant, Diverged, Job, Outcome, Settings
from shiva_dit.experiments.held_out import HeldOut
from shiva_dit.experiments.kept import keep, put_trained_on
from shiva_dit.experiments.maps import kept_maps, kept_shares
from shiva_dit.experiments.scoring import noise_seed
from shiva_dit.experiments.subjects import On, Subject, subject_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.reducing import Reduction
from shiva_dit.training.checkpoint import latest_checkpoint
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trained import Trained
from shiva_dit.training.trainer import Trainer

UNDER_WAY = "-under-way"
"""What the folder of a training is called by while it isn't done, after the arm's name."""
LARGEST = 1e6
"""Pictures lie about [-1, 1]; a judge's features of larger ones than this overflow."""


def compete(job: Job) -> list[Outcome | Diverged]:
    """Train once if there is anything to train, then sample and judge each contestant."""
    subject = subject_of(job.settings)
    recipe = job.contestants[0].recipe
    held: dict[float | None, HeldOut] = {}
    if recipe is None:
        return [_run(job, subject, contestant, None, held) for contestant in job.contestants]
    trained, seconds = _train(job, subject, recipe)
    if isinstance(trained, Diverged):
        return [trained for _ in job.contestants]
    kept = None
    if job.keep is not None and not recipe.trains_nothing:
        kept = keep(trained, recipe, job.keep)
    outcomes = [_run(job, subject, contestant, trained, held) for contestant in job.contestants]
    return [
        outcome
        if isinstance(outcome, Diverged)
        else dataclasses.replace(outcome, train_s=seconds, kept=kept)
        for outcome in outcomes
    ]


def _run(
    job: Job,
    subject: Subject,
    contestant: Contestant,
    trained: Trained | None,
    held: dict[float | None, HeldOut],
) -> Outcome | Diverged:
    """One contestant on a backbone of its own; errors held out are measured once for each ratio."""
    backbone = subject.backbone()
    on = schedule = None
    if trained is not None:
        schedule = trained.schedule
        if contestant.run_at is not None:
            schedule = trained.at(contestant.run_at)
        # Random tokens differ from the noise that pictures start from.
        on = put_trained_on(trained, schedule, backbone, seed=noise_seed(job.seed) + 500)
    try:
        found = held.get(contestant.run_at)
        outcome = _judged(job.settings, contestant, job.seed, subject, backbone, on, found)
    except FloatingPointError as error:
        return Diverged(step=None, reason=str(error))
    held[contestant.run_at] = outcome.held_out
    return dataclasses.replace(outcome, schedule=schedule if on else None)


def _train(job: Job, subject: Subject, recipe: TrainConfig) -> tuple[Trained | Diverged, float]:
    """What was trained, or why not, and its CPU seconds.

    A training that was cut off goes on from its last checkpoint; its seconds are then those of the
    steps of this call, for all.
    """
    label = _label("train", job.contestants[0].name, job.seed)
    data = subject.data
    with _run_folder(job) as out:
        config = dataclasses.replace(recipe, task=job.settings.task, seed=job.seed, out=out)
        trainer = Trainer(config, subject.backbone(), data, subject.sampler(config.num_steps))
        if config.trains_nothing:
            trained = trainer.result()
            trainer.close()
            return trained, 0.0
        if latest_checkpoint(trainer.checkpoints) is not None:
            trainer.resume()
        start, first = time.process_time(), trainer.step
        try:
            trained = trainer.run(description=label, position=_place(), saves_on_signals=False)
        except FloatingPointError as error:
            # What the trainer advises is for a run with a folder of its own.
            return Diverged(step=trainer.step, reason=str(error).partition(" at step ")[0]), 0.0
        seconds = time.process_time() - start
        trainer.close()
    return trained, seconds * config.total_steps / max(1, config.total_steps - first)


@contextmanager
def _run_folder(job: Job) -> Iterator[Path]:
    """A folder for checkpoints; where trainings are kept, one that is cut off leaves it there."""
    if job.keep is None:
        with tempfile.TemporaryDirectory() as out:
            yield Path(out)
        return
    folder = job.keep.with_name(f"{job.keep.name}{UNDER_WAY}")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _judged(
    settings: Settings,
    contestant: Contestant,
    seed: int,
    subject: Subject,
    backbone: Any,
    on: On,
    found: HeldOut | None,
) -> Outcome:
    """Sample and judge; the noise is the same for all contestants of a seed."""
    num_steps = contestant.num_steps or settings.num_steps
    sampler = contestant.sampler or settings.sampler
    parts, shares, seconds = [], [], 0.0
    starts = range(0, settings.count, settings.batch)
    label = _label("sample", contestant.name, seed)
    for start in tqdm(
        starts, desc=label, unit=f"x{settings.batch}", position=_place(), leave=False
    ):
        count = min(settings.batch, settings.count - start)
        with kept_shares(backbone, count) if start < SHOWN else nullcontext() as kept:
            images, cpu_s = subject.sample(
                backbone,
                count,
                seed=seed,
                start=start,
                num_steps=num_steps,
                sampler=sampler,
                guidance=settings.guidance,
            )
        if kept is not None and kept.shares is not None:
            shares.append(kept.shares)
        parts.append(images)
        seconds += cpu_s
    images = torch.cat(parts)
    if isinstance(on, Reduction) and "steps" in on.reducer.needs:
        found = HeldOut()  # single predictions are none of a run
    found = found or subject.held_out(backbone, on)
    if not (float(images.abs().max()) < LARGEST and math.isfinite(found.error or 0.0)):
        raise FloatingPointError("its pictures, or its predictions, are not finite")
    maps = None
    if isinstance(on, Attachment) and contestant.draws_maps and subject.task is not None:
        maps = kept_maps(
            subject.task,
            on,
            10,
            seed=noise_seed(seed),
            num_steps=num_steps,
            sampler=sampler,
        )
    flops, keep_ratio = subject.cost(backbone, on, num_steps, sampler, settings.guidance)
    return Outcome(
        score=subject.score(images),
        held_out=found,
        flops=flops,
        images=images,
        sample_s=seconds,
        keep_ratio=keep_ratio,
        parameters=0 if on is None else on.num_parameters,
        maps=maps,
        shares=torch.cat(shares)[:SHOWN] if shares else None,
    )


def _label(what: str, name: str, seed: int) -> str:
    return f"{what:6} {name}, seed {seed}"


def _place() -> int:
    """Line of this process's progress bar."""
    identity = multiprocessing.current_process()._identity
    return (identity[0] - 1) if identity else 0
