"""Comparisons by recipe: many ways to train and run one backbone, with seeds, resumable."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shiva_dit.config import check_seeds, check_types, from_dict, merged, to_dict
from shiva_dit.experiments.contestants import (
    SHOWN,
    Contestant,
    Diverged,
    Job,
    Outcome,
    Settings,
    reference,
)
from shiva_dit.experiments.measures import row
from shiva_dit.experiments.outcomes import TRAINED, Runs
from shiva_dit.experiments.pool import run_jobs
from shiva_dit.experiments.scoring import Sampler
from shiva_dit.experiments.subjects import OwnSubject, Subject, subject_of
from shiva_dit.ownership import owned
from shiva_dit.provenance import provenance, write_json
from shiva_dit.training.recipe import TrainConfig

UNPRUNED = "unpruned"
"""Key of the model as it ships: it is always among the contestants."""
REFERENCE = "reference"
"""Key of what distances to the unpruned model are taken to: always there, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What an arm says beside its changes to the common recipe."""

    name: str
    """As tables show it."""
    series: str = ""
    """The line of a plot that it is on."""
    run_at: float | None = None
    """Mean keep ratio in (0, 1) to run at, where it isn't the one trained for."""
    num_steps: int | None = None
    """Sampler steps, where they are not the settings'."""
    sampler: Sampler | None = None
    """How they are made, where that is not the settings'."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.run_at is not None and not 0.0 < self.run_at < 1.0:
            raise ValueError(f"run_at must be a ratio in (0, 1), got {self.run_at}.")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One file of `recipes/compare-*.toml`."""

    what: str
    """Names the record."""
    about: str
    """What is asked, in a sentence."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is trained and sampled once per seed."""
    settings: Settings = field(default_factory=Settings)
    """What is equal for all arms."""
    recipe: dict = field(default_factory=dict)  # type: ignore[type-arg]
    """What the arms' recipes have in common (`TrainConfig`)."""
    arms: dict = field(default_factory=dict)  # type: ignore[type-arg]
    """By key: what each changes in the common recipe, and the fields of an `Arm`."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.seeds or not self.arms:
            raise ValueError("a comparison needs at least one seed and one arm.")
        check_seeds(self.seeds)
        for key in (UNPRUNED, REFERENCE):
            if key in self.arms:
                raise ValueError(f"{key!r} is always there: give the arm another key.")

    def contestants(self) -> dict[str, Contestant]:
        """All arms, the unpruned model and the reference first.

        Raises:
            ValueError: If an arm has no name or its recipe is wrong.
        """
        made = {UNPRUNED: Contestant(name="unpruned"), REFERENCE: reference(self.settings)}
        own = {field.name for field in dataclasses.fields(Arm)}
        for key, data in self.arms.items():
            where = f"arms.{key}"
            if not isinstance(data, dict):
                raise ValueError(f"{where}: expected a table with a name, got {data!r}.")
            arm = from_dict(Arm, {k: v for k, v in data.items() if k in own}, where)
            changes = {k: v for k, v in data.items() if k not in own}
            recipe = from_dict(TrainConfig, merged(self.recipe, changes), where)
            if arm.run_at is not None and not recipe.learns_policy:
                raise ValueError(f"{where}: run_at needs a learned schedule to move.")
            made[key] = Contestant(
                name=arm.name,
                recipe=recipe,
                run_at=arm.run_at,
                num_steps=arm.num_steps,
                sampler=arm.sampler,
            )
        return made


def run_comparison(
    comparison: Comparison, out: Path, *, workers: int, retry_failed: bool = False
) -> dict[str, Any]:
    """Run what is not done yet, and write the record.

    An arm that diverges is recorded as failed, with the step and the reason, and the others go on.

    Args:
        comparison: What to run.
        out: Folder for one JSON file and one file of images per arm and seed, what each recipe and
            seed trained (`trained/<arm>-<seed>`, see `kept.put_on`), `record.json`, and of a model
            of one's own the pictures (`pictures/<arm>`). Arms that it holds already are not run
            again; a training that was cut off goes on from its last checkpoint.
        workers: Recipes at a time, each in a process of one thread.
        retry_failed: Whether arms that are recorded as failed are run again.

    Returns:
        The record.

    Raises:
        ValueError: If the folder holds an arm that was run with other settings, or another process
            is at work in it.
    """
    contestants = comparison.contestants()
    subject = subject_of(comparison.settings)
    with owned(out):
        return _run(comparison, subject, contestants, out, workers, retry_failed)


def _run(
    comparison: Comparison,
    subject: Subject,
    contestants: Mapping[str, Contestant],
    out: Path,
    workers: int,
    retry_failed: bool,
) -> dict[str, Any]:
    start = time.perf_counter()
    runs = Runs(out, comparison.settings, subject.identity)
    todo = []
    for seed in comparison.seeds:
        for key, contestant in contestants.items():
            if not runs.has(contestant, key, seed, retry_failed):
                todo.append((key, seed))
    groups = _by_training(contestants, todo)
    jobs = [
        Job(
            settings=comparison.settings,
            contestants=tuple(contestants[key] for key in keys),
            seed=seed,
            keep=out / TRAINED / name,
        )
        for name, seed, keys in groups
    ]
    total = len(comparison.seeds) * len(contestants)
    bar = tqdm(total=total, initial=total - len(todo), desc=comparison.what, unit="run")
    with bar:
        for (name, seed, keys), outcomes in zip(groups, run_jobs(jobs, workers), strict=True):
            for key, outcome in zip(keys, outcomes, strict=True):
                runs.save(contestants[key], key, seed, outcome, name)
                bar.update()
    record = _record(comparison, subject, contestants, runs)
    record["wall_s"] = time.perf_counter() - start
    if isinstance(subject, OwnSubject):
        record["prompts"] = [prompt.text for prompt in subject.prompts[:SHOWN]]
        for key in contestants:
            runs.write_pictures(key, subject.prompts, comparison.seeds)
    record["runs_of_this_call"] = len(todo)
    write_json(out / "record.json", record)
    return record


def _by_training(
    contestants: Mapping[str, Contestant], todo: list[tuple[str, int]]
) -> list[tuple[str, int, list[str]]]:
    """Runs that share a training: its name (of the first arm with that recipe), seed, and arms."""
    first: dict[TrainConfig | None, str] = {}
    for key, contestant in contestants.items():
        first.setdefault(contestant.recipe, key)
    groups: dict[tuple[str, int], list[str]] = {}
    for key, seed in todo:
        groups.setdefault((first[contestants[key].recipe], seed), []).append(key)
    return [(f"{name}-{seed}", seed, keys) for (name, seed), keys in groups.items()]


def _record(
    comparison: Comparison, subject: Subject, contestants: Mapping[str, Contestant], runs: Runs
) -> dict[str, Any]:
    found = {key: {s: runs.load(key, s) for s in comparison.seeds} for key in contestants}
    truth = {s: o for s, o in found[REFERENCE].items() if isinstance(o, Outcome)}
    rows = []
    for key, contestant in contestants.items():
        outcomes = {s: o for s, o in found[key].items() if isinstance(o, Outcome)}
        twins = None if key == REFERENCE else [truth[seed] for seed in outcomes]
        made = row(key, contestant.name, list(outcomes.values()), twins, subject.judge)
        made |= _arm(contestant, list(outcomes.values()))
        failed = {s: o for s, o in found[key].items() if isinstance(o, Diverged)}
        if failed:
            made["failed"] = [{"seed": s, **dataclasses.asdict(o)} for s, o in failed.items()]
        kept = [runs.kept(key, seed) for seed in outcomes]
        if any(kept):
            made["kept_by_seed"] = kept
        rows.append(made)
    floor = subject.floors(comparison.settings.count)
    return {
        "what": comparison.what,
        "about": comparison.about,
        "config": to_dict(comparison),
        **({} if floor is None else {"floor": dataclasses.asdict(floor)}),
        "rows": rows,
        "runs_at": runs.made_by([(key, seed) for key in contestants for seed in comparison.seeds]),
        "provenance": provenance(),
    }


def _arm(contestant: Contestant, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a row says of how an arm was trained."""
    recipe, made = contestant.recipe, {}
    if recipe is None or not outcomes:
        return {}
    if not recipe.trains_nothing:
        made["steps"] = recipe.total_steps
    if recipe.method != "dense":
        made["keep_ratio_asked"] = contestant.run_at or recipe.keep_ratio
    made["parameters"] = outcomes[0].parameters
    if recipe.learns_policy:
        made["schedules"] = [
            [[round(ratio, 4) for ratio in bin_] for bin_ in outcome.schedule.ratios]
            for outcome in outcomes
            if outcome.schedule is not None
        ]
    return made
