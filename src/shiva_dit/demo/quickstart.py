"""The first real run: train an adapter and its controls on real digits, sample, judge, show."""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from shiva_dit.config import load_recipe, to_dict
from shiva_dit.demo.base import ASSETS, load_backbone, load_judge
from shiva_dit.demo.contest import (
    CONTROLS,
    NAMES,
    Outcome,
    QuickstartConfig,
    run_task,
    sample_and_judge,
    start_worker,
)
from shiva_dit.demo.digits import DigitsTask
from shiva_dit.demo.picture import draw_quickstart
from shiva_dit.demo.scoring import NUM_STEPS, distance_between, frechet_floor
from shiva_dit.metrics import psnr
from shiva_dit.provenance import provenance, write_json
from shiva_dit.report import plain_table
from shiva_dit.training.recipe import TrainConfig


class Quickstart:
    """Runs all methods of a quickstart, several at a time, each in a process of its own."""

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config
        self.task = DigitsTask()
        self.judge = load_judge(self.task)
        self.outcomes: dict[str, list[Outcome]] = {}

    @property
    def methods(self) -> list[str]:
        """Keys of `NAMES` that this run covers, in the table's order."""
        if self.config.all_controls:
            return list(NAMES)
        return ["dense", "random", "random_tuned", "shiva"]

    def run(self) -> dict[str, Any]:
        """Train, sample and judge; returns the record.

        Tiny models gain little from a second thread: two processes of one thread each get more
        done than one process of two.
        """
        config = self.config
        # The longest first, so that the processes end together.
        order = sorted(self.methods, key=lambda m: (m != "shiva", m not in CONTROLS))
        order = [method for method in order if method != "fewer_steps"]
        tasks = [(method, seed) for seed in config.seeds for method in order]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            config.workers, context, initializer=start_worker, initargs=(context.RLock(),)
        ) as pool:
            found = dict(zip(tasks, pool.map(run_task, [(config, *t) for t in tasks]), strict=True))
        for method in self.methods:
            if method != "fewer_steps":
                self.outcomes[method] = [found[method, seed] for seed in config.seeds]
        if "fewer_steps" in self.methods:
            self.outcomes["fewer_steps"] = [self._fewer_steps(seed) for seed in config.seeds]
        return self.record()

    def _fewer_steps(self, seed: int) -> Outcome:
        """The unpruned model with as many steps as our FLOPs allow."""
        share = self._mean_flops("shiva") / self._mean_flops("dense")
        num_steps = max(1, round(NUM_STEPS * share))
        return sample_and_judge(
            self.config, "fewer_steps", seed, self.task, load_backbone(self.task), None, num_steps
        )

    def _mean_flops(self, method: str) -> float:
        return statistics.fmean(o.flops for o in self.outcomes[method])

    def record(self) -> dict[str, Any]:
        """Everything that was measured, as plain data."""
        rows = [self._row(method) for method in self.methods]
        return {
            "what": f"quickstart-keep{round(100 * self.config.keep_ratio)}",
            "config": to_dict(self.config),
            "keep_ratio_executed": self.outcomes["shiva"][0].keep_ratio,
            "frechet_floor": frechet_floor(self.task, self.judge, self.config.count),
            "rows": rows,
            "provenance": provenance(),
        }

    def draw(self, path: Path) -> None:
        """Write the picture: rows of the first seed's images, and the kept tokens."""
        maps = self.outcomes["shiva"][0].maps
        assert maps is not None
        rows = {}
        for method in self.methods:
            first = self.outcomes[method][0]
            share = first.flops / self.outcomes["dense"][0].flops
            caption = (
                f"{share:.0%} of the FLOPs, {first.score.correct:.0%} right, "
                f"distance {first.score.frechet:.1f}"
            )
            rows[NAMES[method]] = (first.images[:10], caption)
        keep = self.config.keep_ratio
        title = f"Real digits as training data; {keep:.0%} of the tokens kept in blocks 2 to 6"
        draw_quickstart(path, rows, maps, title)

    def _row(self, method: str) -> dict[str, Any]:
        outcomes = self.outcomes[method]
        row: dict[str, Any] = {"method": method, "name": NAMES[method]}
        measured = {
            "correct": [o.score.correct for o in outcomes],
            "frechet": [o.score.frechet for o in outcomes],
            "flops": [o.flops for o in outcomes],
            "train_cpu_s": [o.train_s for o in outcomes],
            "sample_cpu_s": [o.score.cpu_s for o in outcomes],
        }
        if method != "dense":
            pairs = list(zip(outcomes, self.outcomes["dense"], strict=True))
            measured["psnr"] = [psnr(ours.images, dense.images) for ours, dense in pairs]
            measured["frechet_to_dense"] = [
                distance_between(self.judge, ours.images, dense.images) for ours, dense in pairs
            ]
        for name, values in measured.items():
            row[name] = statistics.fmean(values)
            row[f"{name}_by_seed"] = values
        return row


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
    overrides: Sequence[str] = (),
) -> str:
    """Run a quickstart and write its picture and record.

    Args:
        keep_ratio: Mean share of tokens kept, in (0, 1).
        seeds: Seeds, at least one.
        all_controls: Whether all controls are run.
        count: Images that are judged, per method and seed.
        workers: Methods that run at a time.
        out: Folder for `quickstart.png` and `quickstart.json`.
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
    out.mkdir(parents=True, exist_ok=True)  # what can fail must not fail after the work
    start = time.perf_counter()
    run = Quickstart(config)
    record = run.run()
    record["wall_s"] = time.perf_counter() - start
    write_json(out / "quickstart.json", record)
    picture = out / "quickstart.png"
    run.draw(picture)
    return (
        f"\n{plain_table(record)}\n\nPicture: {picture}\nRecord:  {out / 'quickstart.json'}\n"
        f"Took {record['wall_s']:.0f} s."
    )
