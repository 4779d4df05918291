"""Comparisons by recipe: many ways to train and run one backbone, with seeds, resumable."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from shiva_dit.config import check_types, from_dict, merged, to_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.contest import Contestant, Outcome, Settings
from shiva_dit.experiments.held_out import HeldOut
from shiva_dit.experiments.measures import row
from shiva_dit.experiments.pool import run_jobs
from shiva_dit.experiments.scoring import Score, floors
from shiva_dit.ownership import owned
from shiva_dit.provenance import (
    load_tensors,
    provenance,
    read_as,
    read_json,
    write_atomically,
    write_json,
)
from shiva_dit.training.recipe import TrainConfig

PLAIN = ("flops", "sample_s", "train_s", "keep_ratio", "parameters")
"""Numbers of an `Outcome` that a run's file holds as they are."""
RUN_BY = ("run_at", "num_steps")
"""What decides how a trained `Contestant` is run; None where nothing is said."""
UNPRUNED = "unpruned"
"""Key of the model as it ships: it is always among the contestants."""


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
        if UNPRUNED in self.arms:
            raise ValueError(f"{UNPRUNED!r} is always there: give the arm another key.")

    def contestants(self) -> dict[str, Contestant]:
        """All arms, the unpruned model first.

        Raises:
            ValueError: If an arm has no name or its recipe is wrong.
        """
        made = {UNPRUNED: Contestant(name="unpruned")}
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
                name=arm.name, recipe=recipe, run_at=arm.run_at, num_steps=arm.num_steps
            )
        return made


def run_comparison(comparison: Comparison, out: Path, *, workers: int) -> dict[str, Any]:
    """Run what is not done yet, and write the record.

    Args:
        comparison: What to run.
        out: Folder for one JSON file and one file of images per arm and seed, and `record.json`.
            Arms that it holds already are not run again.
        workers: Arms at a time, each in a process of one thread.

    Returns:
        The record.

    Raises:
        ValueError: If the folder holds an arm that was run with other settings, or another process
            is at work in it.
    """
    contestants = comparison.contestants()
    with owned(out):
        return _run(comparison, contestants, out, workers)


def _run(
    comparison: Comparison, contestants: Mapping[str, Contestant], out: Path, workers: int
) -> dict[str, Any]:
    start = time.perf_counter()
    keys = [(key, seed) for seed in comparison.seeds for key in contestants]
    todo = []
    for key, seed in keys:
        if not _is_done(out, comparison.settings, contestants[key], key, seed):
            todo.append((key, seed))
    jobs = [(comparison.settings, contestants[key], seed) for key, seed in todo]
    bar = tqdm(total=len(keys), initial=len(keys) - len(todo), desc=comparison.what, unit="run")
    with bar:
        for (key, seed), outcome in zip(todo, run_jobs(jobs, workers), strict=True):
            _save(out, comparison.settings, contestants[key], key, seed, outcome)
            bar.update()
    record = _record(comparison, contestants, out)
    record["wall_s"] = time.perf_counter() - start
    record["runs_of_this_call"] = len(todo)
    write_json(out / "record.json", record)
    return record


def _record(
    comparison: Comparison, contestants: Mapping[str, Contestant], out: Path
) -> dict[str, Any]:
    task = load_task(comparison.settings.task)
    judge = comparison.settings.judge(task)
    outcomes = {key: [_load(out, key, seed) for seed in comparison.seeds] for key in contestants}
    rows = []
    for key, contestant in contestants.items():
        twins = None if key == UNPRUNED else outcomes[UNPRUNED]
        made = row(key, contestant.name, outcomes[key], twins, judge)
        if contestant.recipe is not None:
            if not contestant.recipe.trains_nothing:
                made["steps"] = contestant.recipe.total_steps
            if contestant.recipe.method != "dense":
                made["keep_ratio_asked"] = contestant.run_at or contestant.recipe.keep_ratio
            made["parameters"] = outcomes[key][0].parameters
        schedules = [o.schedule for o in outcomes[key] if o.schedule is not None]
        if schedules and contestant.recipe is not None and contestant.recipe.learns_policy:
            made["schedules"] = [
                [[round(ratio, 4) for ratio in bin_] for bin_ in s.ratios] for s in schedules
            ]
        rows.append(made)
    return {
        "what": comparison.what,
        "about": comparison.about,
        "config": to_dict(comparison),
        "floor": dataclasses.asdict(floors(task, judge, comparison.settings.count)),
        "rows": rows,
        "runs_at": _where_run(comparison, contestants, out),
        "provenance": provenance(),
    }


def _where_run(
    comparison: Comparison, contestants: Mapping[str, Contestant], out: Path
) -> list[Any]:
    """The code that the runs were made with: one entry unless the comparison was resumed."""
    found = []
    for key in contestants:
        for seed in comparison.seeds:
            plain = read_json(out / f"{key}-{seed}.json")
            code = {name: plain["provenance"][name] for name in ("commit", "dirty")}
            if code not in found:
                found.append(code)
    return found


def _is_done(out: Path, settings: Settings, contestant: Contestant, key: str, seed: int) -> bool:
    """Whether a run is there; settings that it was saved without count as their defaults."""
    path = out / f"{key}-{seed}.json"
    if not path.is_file():
        return False
    with read_as("run of a comparison", path):
        run = read_json(path)["run"]
        recipe = run["recipe"] and from_dict(TrainConfig, run["recipe"], str(path))
        same = recipe == contestant.recipe and run["seed"] == seed
        same = same and all(run.get(name) == getattr(contestant, name) for name in RUN_BY)
        same = same and from_dict(Settings, run["settings"], str(path)) == settings
    if not same:
        raise ValueError(
            f"{path} was made with other settings: remove it to run that arm again, or use "
            "another folder (--out)."
        )
    return True


def _save(
    out: Path, settings: Settings, contestant: Contestant, key: str, seed: int, outcome: Outcome
) -> None:
    """The images first: a run whose JSON is there is whole."""
    path = out / f"{key}-{seed}.safetensors"
    write_atomically(path, lambda file: save_file({"images": outcome.images}, file))
    plain = {
        "run": {
            "settings": to_dict(settings),
            "recipe": None if contestant.recipe is None else to_dict(contestant.recipe),
            **{name: getattr(contestant, name) for name in RUN_BY},
            "seed": seed,
        },
        "provenance": provenance(),
        "score": dataclasses.asdict(outcome.score),
        "held_out": dataclasses.asdict(outcome.held_out),
        "schedule": None if outcome.schedule is None else outcome.schedule.to_json(),
        **{name: getattr(outcome, name) for name in PLAIN},
    }
    write_json(path.with_suffix(".json"), plain)


def _load(out: Path, key: str, seed: int) -> Outcome:
    path = out / f"{key}-{seed}.json"
    plain = read_json(path)
    with read_as("run of a comparison", path):
        del plain["run"], plain["provenance"]
        schedule = plain.pop("schedule")
        return Outcome(
            score=Score(**plain.pop("score")),
            held_out=HeldOut(**plain.pop("held_out")),
            schedule=None if schedule is None else Schedule.from_json(schedule),
            images=load_tensors(path.with_suffix(".safetensors"))["images"],
            **plain,
        )
