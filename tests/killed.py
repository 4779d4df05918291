"""Trainings killed at some of thirty moments, each followed by its continuation.

A moment is a number of events: steps at the file system and batches read, from the first to the
last of an undisturbed training. Run as `python -m tests.killed FOLDER FIRST`, which kills at every
fifth moment from a FIRST below five (`test_wholeness.py`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import SD3Transformer2DModel

from shiva_dit.models.counted import model_flops
from shiva_dit.training.checkpoint import latest_checkpoint
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.run import train
from tests import conftest, tiny
from tests.faults import Steps, listing
from tests.test_training import TinyData, recipe

KILLS = 30
PARTS = 5
"""Calls that together kill at all moments."""


def config(out: Path) -> TrainConfig:
    return recipe(out, backbone="lora", lora_rank=2, checkpoint_every=2)


def model() -> SD3Transformer2DModel:
    return tiny.sd3(num_layers=2)


def in_a_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process, or minus the signal that killed it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 3
        try:
            work()
            status = 0
        except ValueError:
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def training(out: Path, *, kill_at: int = -1, count: Path | None = None) -> None:
    """A training that is killed at an event, or counts its events."""
    steps = Steps(out, kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.MonkeyPatch.context() as patch:
        steps.install(patch)
        data = TinyData()
        patch.setattr(data, "batch", steps.wrap(data.batch))
        train(config(out), model(), data, resume=False)
    if count is not None:
        count.write_text(str(steps.count))


def go_on(out: Path, index: int) -> None:
    """As a user would: by --resume, or without, and as the error then says."""

    def again(resume: bool) -> int:
        return in_a_child(lambda: void(train(config(out), model(), TinyData(), resume=resume)))

    status = 2 if index % 2 == 0 else again(False)
    if status == 2:
        status = again(True)
    assert status == 0, out


def void(_: object) -> None:
    return None


def of_run(out: Path) -> dict[str, bytes]:
    """All that a run leaves, without what names its folder or its versions."""
    found = listing(out)
    lines = found.pop("log.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("run.json", "recipe.toml", "result.json"):
        assert found.pop(name)
    config = json.loads(found.pop("adapter/config.json"))
    for key in ("digest", "training"):
        del config[key]
    found["config"] = json.dumps(config).encode()
    states = [found.pop(name) for name in sorted(found) if name.endswith("state.json")]
    assert len(states) == 2
    return found


def main(folder: Path, first: int) -> None:
    assert conftest.THREADS  # that settings are those of all tests
    model_flops(model(), 1, tiny.TEXT_TOKENS)  # counted once, not again by each child
    count = folder / "count"
    assert in_a_child(lambda: training(folder / "whole", count=count)) == 0
    wanted = of_run(folder / "whole")
    total = int(count.read_text())
    report = {"kills": 0, "events": total, "before_the_first_checkpoint": 0, "after_it": 0}
    # One from each of thirty equal parts of the way.
    draw = random.Random(0)
    moments = [int(total * (index + draw.random()) / KILLS) for index in range(KILLS)]
    for index in range(first, KILLS, PARTS):
        moment = moments[index]
        out = folder / f"killed-at-{moment:03d}-{index}"
        status = in_a_child(lambda out=out, moment=moment: training(out, kill_at=moment))
        assert status == -signal.SIGKILL, (moment, status)
        found = latest_checkpoint(out / "checkpoints")
        report["before_the_first_checkpoint" if found is None else "after_it"] += 1
        report["kills"] += 1
        go_on(out, index)
        assert of_run(out) == wanted, moment
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
