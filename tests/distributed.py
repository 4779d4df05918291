"""Trains tiny models by several processes: see `test_processes.py`."""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shiva_dit.training.interrupt import TrainingInterrupted
from shiva_dit.training.looks.measure import Measure
from shiva_dit.training.processes import joined
from shiva_dit.training.run import train
from shiva_dit.training.settings import OptimizerConfig, TrajectoryConfig, WatchConfig
from shiva_dit.training.trainer import Trainer
from tests import tiny
from tests.test_training import TinyData, WatchedData, recipe


def full_in_the_second_look(error: Any) -> Any:
    """As `Measure._error`, of which a look has two in each of two processes."""
    calls: list[int] = []

    def found(self: Measure, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return error(self, *given)

    return found


def as_it_came(model: torch.nn.Module) -> None:
    """Raise unless a model is what `tiny.sd3` makes: in every tensor, flag, class and hook."""
    given = tiny.sd3()
    for (name, one), (_, other) in zip(
        model.named_parameters(), given.named_parameters(), strict=True
    ):
        assert type(one) is type(other)
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad
        assert one.grad is None
    for one, other in zip(model.buffers(), given.buffers(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.modules(), given.modules(), strict=True):
        assert type(one) is type(other)
        assert one.training == other.training
        assert vars(one).keys() == vars(other).keys()
        assert all(len(vars(one)[n]) == len(vars(other)[n]) for n in vars(one) if "_hooks" in n)
    assert list(model.state_dict()) == list(given.state_dict())
    assert torch.equal(tiny.run(model, tiny.inputs()), tiny.run(given, tiny.inputs()))


def said() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", default="lora")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--eight-bit", action="store_true")
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--signal-at", type=int, help="step after which rank 1 gets a SIGTERM")
    parser.add_argument("--kill-at", type=int, help="step after which rank 1 is killed")
    parser.add_argument("--bad-at", type=int, help="step in which rank 1 has a loss that is none")
    parser.add_argument("--patience", type=int, help="looks without a better error, of any")
    parser.add_argument("--look", action="store_true", help="at every second step")
    parser.add_argument("--no-memory", action="store_true", help="of rank 1 in the second look")
    parser.add_argument("--twice", action="store_true", help="the same model once more")
    return parser.parse_args()


def misbehave(options: argparse.Namespace) -> None:
    """Let rank 1 do what is asked for."""
    step = Trainer.train_step

    def stepped(self: Trainer) -> dict[str, float]:
        second = self.processes.rank == 1
        if second and self.step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if second and self.step == options.bad_at:
            with torch.no_grad():
                next(iter(self.student.adapter.router.parameters())).fill_(float("nan"))
        found = step(self)
        if second and self.step == options.signal_at:
            signal.raise_signal(signal.SIGTERM)
        return found

    Trainer.train_step = stepped  # type: ignore[method-assign]
    if options.no_memory:
        Measure._error = full_in_the_second_look(Measure._error)  # type: ignore[method-assign]


def main() -> None:
    """Train, and stop or die where that is asked for."""
    options = said()
    torch.set_num_threads(1)
    changes: dict[str, Any] = {}
    if options.guided:
        changes = {"guidance": (1.0, 7.0), "trajectories": TrajectoryConfig(count=3, steps=2)}
    looks = options.look or options.patience is not None
    if looks:
        watch = WatchConfig(every=2, held_out=3, times=3, steps=2)
        changes["watch"] = replace(watch, patience=options.patience or 0)
    config = recipe(
        options.out,
        backbone=options.backbone,
        warmup_steps=2,
        policy_steps=2,
        joint_steps=options.steps - 4,
        batch_size=4,
        micro_batches=options.micro_batches,
        checkpoint_every=3,
        shard=options.shard,
        optimizer=OptimizerConfig(
            router=1e-3, policy=1e-3, backbone=1e-3, warmup_steps=2, eight_bit=options.eight_bit
        ),
        **changes,
    )
    misbehave(options)
    with joined("cpu") as (processes, _):
        try:
            data = WatchedData() if looks else TinyData()
            model = tiny.sd3()
            for out in [config.out, config.out / "again"][: 1 + options.twice]:
                again = replace(config, out=out)
                train(again, model, data, resume=True, processes=processes)
                as_it_came(model)
        except TrainingInterrupted as stop:
            print(f"rank {processes.rank} stopped: {stop.checkpoint.name}", flush=True)
        except FloatingPointError as error:
            print(f"rank {processes.rank} says: {error}", flush=True)
            raise SystemExit(3) from None


if __name__ == "__main__":
    main()
