"""Looks at a run every so many steps: what they measure, write and decide."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from tqdm import tqdm

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.config import to_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.sampling import Sampler
from shiva_dit.models.sharded import is_sharded
from shiva_dit.provenance import data_digest
from shiva_dit.training.log import LOG_FILE, Log
from shiva_dit.training.looks.best import Best
from shiva_dit.training.looks.drawn import draw_curves
from shiva_dit.training.looks.material import Material
from shiva_dit.training.looks.measure import Measure, Pictures
from shiva_dit.training.looks.pace import Pace
from shiva_dit.training.looks.pictures import Drawing
from shiva_dit.training.looks.trackers import Tracker, flat
from shiva_dit.training.processes import Processes
from shiva_dit.training.student import Student
from shiva_dit.training.trained import Trained, learned_schedule

CURVES = "curves.png"
"""Within a run's folder."""
BINS = 8
"""Time bins by which ratios are told."""
FAILURES = (RuntimeError, ValueError, OSError, ArithmeticError, MemoryError)
"""What a look may fail by, and training goes on: no memory for its pictures, a full disk."""


class Looks:
    """Looks at a run. They draw nothing from its chance, and leave its weights as they are.

    Args:
        student: In training.
        sampler: How the pipeline takes its steps.
        material: What is looked at.
        processes: Those that train together.
        result: Gives what was trained so far, by its moving average.
        averaged: Within it the model has that.
        clock: Gives seconds.
    """

    def __init__(
        self,
        student: Student,
        sampler: Sampler,
        material: Material,
        processes: Processes,
        result: Callable[[], Trained],
        averaged: Callable[[], AbstractContextManager[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.watch = student.config, student.config.watch
        self.student, self.material = student, material
        self.processes, self.result, self.averaged = processes, result, averaged
        self.measure = Measure(
            student,
            sampler,
            material.training.unconditional() if self.watch.every else {},
            self.config.guidance,
            at_once=self.config.batch_size,
        )
        self.best = Best(self.config.out, self.watch.patience)
        self.pace = Pace(clock)
        self.last: dict[str, float] = {}
        """What the last look has measured."""
        self._tracker: Tracker | None = None
        self.drawing = Drawing(self.config, material, self.measure, sampler, self._say)
        # What one of these couldn't do, others would wait for.
        self._run_alike = is_sharded(student.model)

    @property
    def enough(self) -> bool:
        """Whether the run ends early."""
        return self.best.enough

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Within: the run goes on from a step."""
        self.pace.begin()
        if self.processes.is_first and self.watch.tracker is not None:
            settings = flat(to_dict(self.config))
            self._tracker = Tracker(self.watch.tracker, self.config.out, step, settings)
        try:
            yield
        finally:
            if self._tracker is not None:
                with self._forgiven("closing the tracker"):
                    self._tracker.close()
                self._tracker = None

    def after(self, line: dict[str, Any], log: Log | None) -> None:
        """A step is done: look if it is time to, and write the log's line.

        Args:
            line: The log's.
            log: The first process's.
        """
        self.pace.step()
        step, every = line["step"], self.watch.every
        due = every > 0 and (step % every == 0 or step == self.config.total_steps)
        if due:
            line |= self._look(step, line)
        if log is not None:
            log.write(line)
        with self._forgiven("the tracker"):
            if self._tracker is not None:
                self._tracker.log(line, step)
        if due and self.processes.is_first:
            self._show(step)
        if due:
            self.pace.look()

    def _look(self, step: int, line: dict[str, Any]) -> dict[str, Any]:
        """What a look adds to the log's line."""
        with self._as_saved():
            schedule = learned_schedule(self.config, self.student.adapter)
            found: dict[str, Any] = self._errors(schedule)
            made: list[Pictures] = []
            with self._forgiven("pictures", together=True):
                made = self.drawing.sample(schedule)
            with self._forgiven("pictures"):
                if self.processes.is_first:
                    self.drawing.draw(made, {**line, **found})
        self.last = dict(found)
        if found:
            self._judge(step, found.get("held_out_guided", found["held_out"]), line["stage"])
        steps = self.config.total_steps - step
        left = self.pace.left(steps, -(-steps // self.watch.every))
        return {**found, "ratios": by_time(schedule), "seconds_left": round(left, 1)}

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """Within: the model is what would be saved, and nobody draws from its chance."""
        modules = self.student.model, self.student.adapter, self.student.teacher
        modes = [module.training for module in modules]
        tokens = self.student.num_tokens
        with torch.random.fork_rng(), self.averaged():
            for module in modules:
                module.eval()
            try:
                yield
            finally:
                self.student.num_tokens = tokens
                for module, mode in zip(modules, modes, strict=True):
                    module.train(mode)

    def _errors(self, schedule: Schedule) -> dict[str, float]:
        """The held-out errors; none where one of the processes failed to measure its share."""
        sums = torch.zeros(3, dtype=torch.float64)
        with self._forgiven("the held-out error", together=True):
            held_out, times = self.material.held_out, self.watch.times
            sums[:2] = self.measure.errors(schedule, held_out, times, self.processes)
            sums[2] = 1.0
        sums = sums.to(self.student.device)
        self.processes.sum([sums])
        error, pair, done = sums.tolist()
        if done < self.processes.count:
            return {}
        if not math.isfinite(error + pair):
            self._say("the held-out error is not finite: it doesn't count.")
            return {}
        return {"held_out": error, **self._guided(pair)}

    def _guided(self, error: float) -> dict[str, float]:
        return {"held_out_guided": error} if self.student.calls.both_ways else {}

    def _judge(self, step: int, error: float, stage: str) -> None:
        """Keep the best adapter, where the run may be stopped for want of a better one."""
        wrote = True
        if self.best.is_better(error):
            wrote, what, adapter = False, "keeping the best adapter", None
            with self._forgiven(what, together=True):
                adapter = self.result().adapter
            with self._forgiven(what):
                if self.processes.is_first and adapter is not None:
                    adapter.save_pretrained(self.best.folder(step))
                wrote = adapter is not None
        if not self.processes.any(not wrote, self.student.device):
            self.best.add(step, error, counts=stage == "joint")

    def chosen(self, trained: Trained) -> ShivaAdapter:
        """What is saved of a run that has ended: its end, or the best that was seen of it."""
        best = self.best.adapter()
        if best is None:
            assert trained.adapter is not None
            return trained.adapter
        record = trained.adapter.training_record if trained.adapter is not None else {}
        best.training_record["early_stop"] = {
            "held_out": self.best.error,
            "patience": self.watch.patience,
            "steps_run": record.get("steps"),
            "stopped_early": self.enough,
        }
        return best

    def _show(self, step: int) -> None:
        """The curves, and what the tracker gets of pictures."""
        out = self.config.out
        with self._forgiven("the curves"):
            draw_curves(out / CURVES, out / LOG_FILE, self.config.keep_ratio)
        with self._forgiven("the tracker"):
            picture = self.drawing.file(step)
            if self._tracker is not None and self.drawing.shows and picture.is_file():
                self._tracker.picture(picture, step)

    # --- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        best, how = self.best.state_dict(), self._how()
        return {"best": best, "how": how, "seconds": self.pace.seconds, "last": self.last}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's; an older version's has none.

        Raises:
            ValueError: If the adapter that was the best is gone.
        """
        if state is None:
            return
        self.pace.seconds, self.last = float(state["seconds"]), state["last"]
        if state["how"] == self._how():  # errors of other samples can't be compared
            self.best.load_state_dict(state["best"])

    def saved(self) -> None:
        """A checkpoint has been written."""
        if self.processes.is_first:
            with self._forgiven("removing earlier best adapters"):
                self.best.saved()
        self.pace.rest()

    def _how(self) -> str:
        watch = self.watch
        return data_digest([watch.held_out, watch.held_out_share, watch.times])

    @contextmanager
    def _forgiven(self, what: str, *, together: bool = False) -> Iterator[None]:
        """Within: what fails is said, and training goes on.

        Args:
            what: Is done.
            together: By all processes: those that share weights end then.
        """
        try:
            yield
        except FAILURES as error:
            if together and self._run_alike:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._say(f"{what} failed ({reason}); training goes on.", always=True)

    def _say(self, what: str, *, always: bool = False) -> None:
        if always or self.processes.is_first:
            tqdm.write(f"looking at the run: {what}", file=sys.stderr)


def by_time(schedule: Schedule) -> list[list[float]]:
    """Keep ratios of each block in a few time bins, from t = 0 on.

    >>> by_time(Schedule.uniform(0.4, num_blocks=3))
    [[1.0, 0.4, 0.4]]
    """
    ratios = torch.tensor(schedule.ratios, dtype=torch.float64)
    parts = ratios.tensor_split(min(BINS, len(ratios)))
    return [[round(value, 4) for value in part.mean(0).tolist()] for part in parts]
