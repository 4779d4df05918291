"""The first real run: train an adapter and its controls on real digits, sample, judge, show."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shiva_dit.config import check_seeds, check_types, load_recipe, to_dict
from shiva_dit.demo.base import ASSETS, load_judge
from shiva_dit.demo.digits import DigitsTask
from shiva_dit.experiments.contest import compete
from shiva_dit.experiments.contestants import (
    Contestant,
    Diverged,
    Job,
    Outcome,
    Settings,
    reference,
)
from shiva_dit.experiments.measures import row
from shiva_dit.experiments.picture import draw_quickstart
from shiva_dit.experiments.pool import run_jobs
from shiva_dit.experiments.scoring import floors
from shiva_dit.experiments.served import Serving, run_served
from shiva_dit.ownership import owned
from shiva_dit.provenance import provenance, write_json
from shiva_dit.report.quickstart import plain_table
from shiva_dit.training.recipe import TrainConfig

NAMES: dict[str, str] = {
    "dense": "unpruned",
    "reference": reference(Settings()).name,
    "random": "random, no training",
    "shiva": "Shiva",
    "shiva_unipc": "Shiva, by UniPC",
    "random_tuned": "random + fine-tuning",
    "centre_tuned": "fixed centre map + fine-tuning",
    "fixed_map_tuned": "fixed learned map + fine-tuning",
    "norm_tuned": "feature norm + fine-tuning",
    "dense_tuned": "unpruned, fine-tuned",
    "dense_unipc": "unpruned, by UniPC",
    "fewer_steps": "unpruned, fewer steps",
    "fewer_steps_unipc": "unpruned, fewer steps, by UniPC",
}
FEW = ("dense", "reference", "random", "random_tuned", "shiva", "shiva_unipc", "fewer_steps_unipc")
"""What runs unless all controls are asked for."""
FEWER_STEPS = ("fewer_steps", "fewer_steps_unipc")
CONTROLS: dict[str, str] = {
    "random_tuned": "random",
    "centre_tuned": "centre",
    "fixed_map_tuned": "fixed_map",
    "norm_tuned": "norm",
    "dense_tuned": "dense",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """One run of `shiva-dit quickstart`."""

    keep_ratio: float = 0.4
    """Mean share of tokens kept in the pruned blocks, in (0, 1)."""
    seeds: tuple[int, ...] = (0,)
    """Each trains and samples everything once; the table then gives mean and spread."""
    all_controls: bool = False
    """Also: fixed maps, feature norm, the dense model fine-tuned, fewer steps."""
    count: int = 300
    """Images that are judged, per method and seed."""
    workers: int = 2
    """Methods that run at a time, each in a process of one thread."""
    recipe: TrainConfig = field(default_factory=TrainConfig)
    """How the adapter and the controls are trained."""

    def __post_init__(self) -> None:
        check_types(self)
        Settings(count=self.count)
        if not self.seeds:
            raise ValueError("seeds must be at least 1.")
        check_seeds(self.seeds)
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}.")
        if self.recipe.backbone == "frozen":
            raise ValueError(
                "the controls are compared after fine-tuning: a frozen backbone leaves them "
                'nothing to train. Use backbone = "full", "lora" or "dora".'
            )


class Quickstart:
    """Runs all methods of a quickstart, several at a time, each in a process of its own."""

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config
        self.task = DigitsTask()
        self.judge = load_judge(self.task)
        self.settings = Settings(count=config.count)
        self.outcomes: dict[str, list[Outcome]] = {}

    @property
    def methods(self) -> list[str]:
        """Keys of `NAMES` that this run covers, in the table's order."""
        return list(NAMES if self.config.all_controls else FEW)

    def run(self) -> dict[str, Any]:
        """Train, sample and judge; returns the record.

        Raises:
            FloatingPointError: If a method diverges.
        """
        config = self.config
        groups: dict[TrainConfig | None, list[str]] = {}
        for method in self.methods:
            if method not in FEWER_STEPS:
                groups.setdefault(self._recipe(method), []).append(method)
        # The longest first, so that the processes end together.
        order = sorted(groups.values(), key=lambda g: ("shiva" not in g, g[0] not in CONTROLS))
        keys = [(group, seed) for seed in config.seeds for group in order]
        jobs = [self._job(group, seed) for group, seed in keys]
        for (group, _), outcomes in zip(keys, run_jobs(jobs, config.workers), strict=True):
            self._take(group, outcomes)
        fewer = [method for method in self.methods if method in FEWER_STEPS]
        for seed in config.seeds:
            self._take(fewer, compete(self._job(fewer, seed)))
        return self.record()

    def _take(self, methods: Sequence[str], outcomes: Sequence[Outcome | Diverged]) -> None:
        for method, outcome in zip(methods, outcomes, strict=True):
            if isinstance(outcome, Diverged):
                at = "" if outcome.step is None else f" at step {outcome.step}"
                raise FloatingPointError(
                    f"{NAMES[method]} diverged{at}: {outcome.reason}. Lower the learning rates "
                    "(optimizer.*), or take another seed."
                )
            self.outcomes.setdefault(method, []).append(outcome)

    def _job(self, methods: Sequence[str], seed: int) -> Job:
        contestants = tuple(self._contestant(method) for method in methods)
        return Job(settings=self.settings, contestants=contestants, seed=seed)

    def _recipe(self, method: str) -> TrainConfig | None:
        config = self.config
        if method in ("dense", "reference", "dense_unipc", *FEWER_STEPS):
            return None
        recipe = dataclasses.replace(
            config.recipe, method=CONTROLS.get(method, "shiva"), keep_ratio=config.keep_ratio
        )
        if method == "random":
            recipe = dataclasses.replace(
                recipe, method="random", backbone="frozen", rejected="identity"
            )
        return recipe

    def _contestant(self, method: str) -> Contestant:
        if method == "reference":
            return reference(self.settings)
        return Contestant(
            name=NAMES[method],
            recipe=self._recipe(method),
            sampler="unipc" if method.endswith("unipc") else None,
            num_steps=self._fewer_steps() if method in FEWER_STEPS else None,
            draws_maps=method == "shiva",
        )

    def _fewer_steps(self) -> int:
        """As many steps of the unpruned model as our FLOPs allow."""
        share = self._mean_flops("shiva") / self._mean_flops("dense")
        return max(1, round(self.settings.num_steps * share))

    def _mean_flops(self, method: str) -> float:
        return statistics.fmean(o.flops for o in self.outcomes[method])

    def record(self) -> dict[str, Any]:
        """Everything that was measured, as plain data."""
        truth = self.outcomes["reference"]
        rows = [
            row(
                method,
                NAMES[method],
                self.outcomes[method],
                None if method == "reference" else truth,
                self.judge,
            )
            for method in self.methods
        ]
        return {
            "what": f"quickstart-keep{round(100 * self.config.keep_ratio)}",
            "config": to_dict(self.config),
            "sampler": self.settings.sampler,
            "keep_ratio_executed": self.outcomes["shiva"][0].keep_ratio,
            "frechet_floor": floors(self.task, self.judge, self.config.count).frechet,
            "rows": rows,
            "provenance": provenance(),
        }

    def draw(self, path: Path) -> None:
        """Write the picture: rows of the first seed's images, and the kept tokens."""
        maps = self.outcomes["shiva"][0].maps
        assert maps is not None
        rows = {}
        for method in self.methods:
            if method == "reference":
                continue
            first = self.outcomes[method][0]
            score = first.score
            assert score is not None
            share = first.flops / self.outcomes["dense"][0].flops
            caption = (
                f"{share:.0%} of the FLOPs, {score.right['all']:.0%} right, "
                f"distance {score.frechet:.1f}"
            )
            rows[NAMES[method]] = (first.images[:10], caption)
        keep = self.config.keep_ratio
        title = f"Real digits as training data; {keep:.0%} of the tokens kept in blocks 2 to 6"
        draw_quickstart(path, rows, maps, title)


OWN_KEYS = ("task", "out", "method", "seed", "keep_ratio")


def load_quickstart_recipe(overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe that ships with the package (`demo/assets/quickstart.toml`).

    Raises:
        ValueError: If an override is for what the quickstart sets by itself.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in OWN_KEYS:
            raise ValueError(
                f"the quickstart sets {key} by itself: use --keep, --seed and --out, or "
                "`shiva-dit train` for a run of your own."
            )
    return load_recipe(TrainConfig, ASSETS / "quickstart.toml", overrides)


def run_quickstart(
    *,
    keep_ratio: float,
    seeds: Sequence[int],
    all_controls: bool,
    count: int,
    workers: int,
    out: Path,
    serving: Serving,
    overrides: Sequence[str] = (),
) -> str:
    """Run a quickstart and write its pictures and records.

    Args:
        keep_ratio: Mean share of tokens kept, in (0, 1).
        seeds: Seeds, at least one.
        all_controls: Whether all controls are run.
        count: Images that are judged, per method and seed.
        workers: Methods that run at a time.
        out: Folder for `quickstart.png` and `quickstart.json`, `served.png` and `served.json`.
        serving: What the shipped adapter is shown at in the end.
        overrides: `key=value` for the recipe.

    Returns:
        The table and where things are, to print.
    """
    config = QuickstartConfig(
        keep_ratio=keep_ratio,
        seeds=tuple(seeds),
        all_controls=all_controls,
        count=count,
        workers=workers,
        recipe=dataclasses.replace(load_quickstart_recipe(overrides), keep_ratio=keep_ratio),
    )
    with owned(out):  # what can fail must not fail after the work
        start = time.perf_counter()
        run = Quickstart(config)
        record = run.run()
        record["wall_s"] = time.perf_counter() - start
        write_json(out / "quickstart.json", record)
        picture = out / "quickstart.png"
        run.draw(picture)
        shown = run_served(serving, out)
    return (
        f"\n{plain_table(record)}\n\nPicture: {picture}\nRecord:  {out / 'quickstart.json'}\n\n"
        f"{shown}\nTook {time.perf_counter() - start:.0f} s."
    )
