"""A backbone's training killed at some moments, each followed by its continuation (`killed.py`).

Run as `python -m tests.killed_base FOLDER`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from shiva_dit.demo import train_base as module
from shiva_dit.demo.digits import DigitsTask
from shiva_dit.demo.judge import JudgeTraining
from shiva_dit.demo.train_base import BaseTraining, train_base
from shiva_dit.training.checkpoint import latest_checkpoint
from tests import conftest
from tests.faults import Steps, listing
from tests.killed import in_a_child

KILLS = 8
CONFIG = BaseTraining(
    steps=5,
    batch_size=2,
    warmup_steps=2,
    checkpoint_every=2,
    judge=JudgeTraining(steps=2, batch_size=4),
)


def training(out: Path, *, resume: bool, kill_at: int = -1, count: Path | None = None) -> None:
    """A training that is killed at an event, or counts its events."""
    steps = Steps(out, kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.MonkeyPatch.context() as patch:
        steps.install(patch)
        patch.setattr(module, "denoising_loss", steps.wrap(module.denoising_loss))
        train_base(DigitsTask(), CONFIG, out, resume=resume)
    if count is not None:
        count.write_text(str(steps.count))


def of_run(out: Path) -> dict[str, Any]:
    """All that a run leaves, without what differs from run to run."""
    found: dict[str, Any] = dict(listing(out))
    record = json.loads(found.pop("digits-base.json"))
    for name in ("backbone_cpu_s", "judge_cpu_s", "provenance"):
        assert record.pop(name)
    return found | record


def main(folder: Path) -> None:
    assert conftest.THREADS  # that settings are those of all tests
    count, whole = folder / "count", folder / "whole"
    assert in_a_child(lambda: training(whole, resume=False, count=count)) == 0
    wanted, total = of_run(whole), int(count.read_text())
    assert sorted(n for n in wanted if "." in n) == [
        "digits-backbone.safetensors",
        "digits-judge.safetensors",
    ]
    report = {"kills": 0, "before_the_first_checkpoint": 0, "after_it": 0, "with_weights": 0}
    draw = random.Random(0)
    moments = [int(total * (index + draw.random()) / KILLS) for index in range(KILLS)]
    for moment in (*moments, total - 1):
        out = folder / f"killed-at-{moment:03d}"
        work = lambda out=out, moment=moment: training(out, resume=False, kill_at=moment)  # noqa: E731
        assert in_a_child(work) == -signal.SIGKILL, moment
        found = latest_checkpoint(out / "checkpoints")
        report["before_the_first_checkpoint" if found is None else "after_it"] += 1
        report["with_weights"] += (out / "digits-backbone.safetensors").exists()
        report["kills"] += 1
        done = (out / "digits-base.json").exists()
        again = in_a_child(lambda out=out: training(out, resume=False))
        # What has a checkpoint, or is done, is never begun again.
        assert again == (2 if found or done else 0), moment
        if found:
            assert in_a_child(lambda out=out: training(out, resume=True)) == 0, moment
        assert of_run(out) == wanted, moment
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
