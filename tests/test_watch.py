"""Looks at a run: they change nothing of it, say what is true of it, and may end it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image as images
import pytest
import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import shiva_dit
from shiva_dit.config import from_dict, load_recipe
from shiva_dit.models.sampling import Sampler
from shiva_dit.provenance import read_json
from shiva_dit.training.data import Batch, reseed
from shiva_dit.training.interrupt import TrainingInterrupted
from shiva_dit.training.log import read_log
from shiva_dit.training.looks import drawn
from shiva_dit.training.looks.best import Best
from shiva_dit.training.looks.looks import Looks, by_time
from shiva_dit.training.looks.material import Remaining, held_back, place_of
from shiva_dit.training.looks.measure import Measure, _Kept
from shiva_dit.training.looks.pace import Pace
from shiva_dit.training.looks.pictures import Drawing
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.recipe_file import to_toml, write_recipe
from shiva_dit.training.run import train
from shiva_dit.training.settings import OptimizerConfig, PolicyConfig, TrajectoryConfig, WatchConfig
from shiva_dit.training.trainer import Trainer
from tests import tiny
from tests.test_training import TinyData, WatchedData, recipe

RECIPES = Path(__file__).parents[1] / "recipes"
FAST = WatchConfig(every=2, held_out=3, times=2, prompts=2, steps=3)
SHARED = dataclasses.replace(FAST, held_out_share=0.3)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second to draw."""
    monkeypatch.setattr("shiva_dit.training.looks.looks.draw_curves", lambda *_: True)


def weights(out: Path) -> dict[str, Tensor]:
    adapter = shiva_dit.ShivaAdapter.from_pretrained(out / "adapter")
    return {**adapter.state_dict(), **adapter.backbone_weights}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[n]) for n, v in ours.items())


def looks_of(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(out / "log.jsonl") if "ratios" in line]


# --- what looks change, and what they say -----------------------------------------------------


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("backbone", ["full", "lora"])
def test_a_run_that_is_looked_at_ends_with_the_same_bits(tmp_path: Path, backbone: str) -> None:
    changes: dict[str, Any] = {"backbone": backbone}
    if backbone == "lora":
        trajectories = TrajectoryConfig(count=3, steps=2)
        changes |= {"guidance": (1.0, 7.0), "trajectories": trajectories}
    found = []
    for name, watch in (("plain", WatchConfig()), ("looked at", FAST)):
        config = recipe(tmp_path / name, watch=watch, **changes)
        train(config, tiny.sd3(), WatchedData(), resume=False)
        found.append(weights(config.out))
    assert equal(*found)
    assert [line["step"] for line in looks_of(tmp_path / "looked at")] == [2, 4, 6]
    assert not (tmp_path / "plain" / "watch").exists()
    for line in looks_of(tmp_path / "looked at"):
        assert line["held_out"] > 0
        assert ("held_out_guided" in line) == (backbone == "lora")
        assert line["seconds_left"] >= 0
        ratios = torch.tensor(line["ratios"])
        assert ratios.shape == (8, 4)
        assert bool((ratios[:, 0] == 1).all())
    assert looks_of(tmp_path / "looked at")[-1]["seconds_left"] == 0


@pytest.mark.usefixtures("no_curves")
def test_the_held_out_error_is_that_of_the_adapter_that_is_saved(tmp_path: Path) -> None:
    config = recipe(tmp_path, watch=FAST, policy=PolicyConfig(adaptive=True, num_bins=4))
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    train(config, tiny.sd3(), WatchedData(), resume=False, scheduler=sampler)
    said = looks_of(tmp_path)[-1]["held_out"]
    held_out = WatchedData().watched(FAST).held_out[0]
    model, dense = tiny.sd3(), tiny.sd3()
    adapter = shiva_dit.ShivaAdapter.from_pretrained(tmp_path / "adapter")
    shiva_dit.apply(model, adapter)
    law, errors = adapter.schedule.law, []
    for at, share in enumerate((0.25, 0.75)):
        place = share * (len(law.times) - 1)  # a whole number
        t = law.times[round(place)]
        noise = []
        for row in range(3):
            generator = torch.Generator()
            reseed(generator, 0, row, at)
            noise.append(torch.randn(held_out.latents[0].shape, generator=generator))
        noisy = (1 - t) * held_out.latents + t * torch.stack(noise)
        given = {
            "hidden_states": noisy,
            "timestep": torch.full((3,), 1000.0 * t),
            "return_dict": False,
            **held_out.conditioning,
        }
        with torch.no_grad():
            errors.append((model(**given)[0] - dense(**given)[0]).square().mean())
    # The schedule of a table for 64 tokens is the same; sums of float32 in another order.
    assert said == pytest.approx(float(sum(errors) / 2), rel=1e-4)
    cost = read_json(tmp_path / "result.json")["cost"]
    found = shiva_dit.summary(model, num_tokens=64, text_tokens=tiny.TEXT_TOKENS)
    assert cost["flops_dense"] == found.flops_dense
    assert cost["flops_pruned"] == found.flops_pruned
    assert cost["keep_ratio"] == found.keep_ratio
    assert cost["law"] in found.law


def test_pictures_show_what_the_models_make_and_which_tokens_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[drawn.Row] = []
    draw = drawn.draw_look

    def remember(path: Path, rows: list[drawn.Row], title: str) -> None:
        found[:] = rows
        draw(path, rows, title)

    monkeypatch.setattr("shiva_dit.training.looks.pictures.draw_look", remember)
    config = recipe(tmp_path, watch=FAST, backbone="frozen")
    trainer = Trainer(config, tiny.sd3(), WatchedData())
    trainer.material.shown[0].batch.latents.zero_()
    trainer.run(show_progress=False)
    trainer.close()
    assert [row.title for row in found] == ["prompt 0", "prompt 1", "prompt 2"]
    for row in found:
        assert row.kept is not None
        assert row.kept.shape == (3, 8, 8)
        # Each third is one step; the target is of all of them and the three blocks that are pruned.
        assert float(row.kept.mean()) == pytest.approx(0.5, abs=0.02)
        assert not torch.equal(row.dense, row.pruned)
    for step in (2, 4, 6):
        picture = images.imread(tmp_path / "watch" / f"step-{step:06d}.png")
        assert picture.shape[0] > 300
        assert picture.std() > 0.05
    assert images.imread(tmp_path / "curves.png").std() > 0.05
    # The unpruned model's, by the sampler's own steps: x + (t' - t) v.
    generator = torch.Generator()
    reseed(generator, 1, 0, 0)
    x = torch.randn(1, *trainer.material.shown[0].batch.latents.shape[1:], generator=generator)
    own = {n: v[:1] for n, v in trainer.material.shown[0].batch.conditioning.items()}
    model = tiny.sd3()
    for t in (1.0, 2 / 3, 1 / 3):
        given = {"timestep": torch.full((1,), 1000.0 * t), "return_dict": False, **own}
        with torch.no_grad():
            x = x - model(hidden_states=x, **given)[0] / 3
    dense = trainer.looks.drawing._dense[0].latents[:1]
    assert float((dense - x).abs().max()) <= 1e-4 * float(x.abs().max())


@pytest.mark.parametrize(
    ("steps", "parts"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (7, [3, 2, 2])]
)
def test_each_part_of_a_sampling_has_its_steps(
    tmp_path: Path, steps: int, parts: list[int]
) -> None:
    trainer = Trainer(recipe(tmp_path, watch=FAST), tiny.sd3(), WatchedData())
    kept = _Kept(trainer.student, trainer.material.shown[0].batch, steps)
    for _ in range(steps):
        with kept.recorded():
            pass
    trainer.close()
    assert kept.forwards == parts
    shares = kept.shares()
    assert shares is not None
    assert bool((shares == 1).all())  # none of the blocks was pruned


def test_steps_of_pictures_are_the_schedulers_own(tmp_path: Path) -> None:
    config = recipe(tmp_path, watch=dataclasses.replace(FAST, steps=4))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    trainer = Trainer(config, tiny.sd3(), WatchedData(), scheduler)
    steps = trainer.looks.measure.steps(trainer.material.shown[0].batch, 4)
    times = [t for t, _ in steps]
    scheduler.set_timesteps(4)
    assert times == pytest.approx([float(s) / 1000 for s in scheduler.timesteps])
    trainer.close()


# --- what is held back ------------------------------------------------------------------------


def test_what_is_held_back_is_never_trained_on(tmp_path: Path) -> None:
    class Counted(TinyData):
        def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
            self.seen = getattr(self, "seen", set()) | {*indices.tolist()}
            return super().batch(indices, generator)

        def identity(self) -> str:
            return "tiny"

    data = Counted()
    config = recipe(tmp_path, watch=SHARED, joint_steps=20)
    trainer = Trainer(config, tiny.sd3(), data)
    held = {*held_back([str(row) for row in range(12)], SHARED)}
    assert 0 < len(held) < 12
    assert {*data.seen} & held  # read for looks, once
    data.seen = set()
    for _ in range(20):
        trainer.train_step()
    assert data.seen == {*range(12)} - held
    trainer.close()
    other = Trainer(dataclasses.replace(config, watch=WatchConfig()), tiny.sd3(), data)
    assert other.origin["data"]["identity"] == "tiny"
    assert trainer.origin["data"]["identity"] != "tiny"  # so that no run goes on with the others
    other.close()


@given(st.lists(st.text(), unique=True, min_size=1), st.lists(st.text(), unique=True))
def test_adding_samples_moves_none(keys: list[str], more: list[str]) -> None:
    config = WatchConfig(held_out_share=0.4)

    def held(some: list[str]) -> set[str]:
        return {key for key in some if place_of(key) < 0.4}

    if held(keys) and held(keys) != {*keys}:
        assert {keys[row] for row in held_back(keys, config)} == held(keys)
    assert held([*keys, *more]) & {*keys} == held(keys)


def test_a_share_of_samples_is_held_back() -> None:
    keys = [f"{number:064x}" for number in range(4000)]
    found = held_back(keys, WatchConfig(held_out_share=0.1))
    assert abs(len(found) - 400) < 5 * math.sqrt(4000 * 0.1 * 0.9)  # five standard deviations
    with pytest.raises(ValueError, match=r"holds back none of 3 samples: set it to 0\.\d\d at"):
        held_back(["a", "b", "c"], WatchConfig(held_out_share=1e-6))
    with pytest.raises(ValueError, match="holds back all 1 samples: set it lower"):
        held_back(["a"], WatchConfig(held_out_share=0.999999))


def test_what_remains_keeps_shapes_and_reading_ahead() -> None:
    class Grouped(TinyData):
        def groups(self) -> list[int]:
            return [0] * 6 + [1] * 6

        def expect(self, indices: Tensor) -> None:
            self.asked = indices.tolist()

    data = Grouped()
    left = Remaining(data, [1, 3, 8])
    assert left.groups() == [0, 0, 1]
    assert Remaining(data, [1, 3]).groups() is None
    left.expect(torch.tensor([2, 0]))
    assert data.asked == [8, 1]
    ours = left.batch(torch.tensor([2]), torch.Generator().manual_seed(1))
    theirs = data.batch(torch.tensor([8]), torch.Generator().manual_seed(1))
    assert torch.equal(ours.latents, theirs.latents)
    assert not hasattr(Remaining(TinyData(), [1]), "expect")
    assert not hasattr(left, "identity")


# --- early stop -------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Looks find the errors that are given for their steps, and draw nothing, which takes long."""
    errors: dict[int, float] = {}
    step: list[int] = []
    after = Looks.after

    def noted(self: Looks, line: dict[str, Any], log: Any) -> None:
        step[:] = [line["step"]]
        after(self, line, log)

    monkeypatch.setattr(Looks, "after", noted)
    monkeypatch.setattr(Looks, "_show", lambda *_: None)
    monkeypatch.setattr(Drawing, "_showable", lambda *_: False)
    monkeypatch.setattr(Measure, "errors", lambda *_: torch.tensor([errors[step[0]], 0.0]).double())
    return errors.update


PATIENT = WatchConfig(every=2, held_out=2, times=1, prompts=0, patience=2)


def test_without_a_better_error_the_run_ends_and_the_best_is_saved(
    tmp_path: Path, scripted: Callable[[dict[int, float]], None]
) -> None:
    # In the first stages, up to step 4, patience isn't lost.
    scripted({2: 5.0, 4: 6.0, 6: 3.0, 8: 2.0, 10: 2.5, 12: 2.0, 14: 1.0})
    config = recipe(tmp_path / "whole", watch=PATIENT, joint_steps=30)
    train(config, tiny.sd3(), WatchedData(), resume=False)
    result = read_json(config.out / "result.json")
    assert (result["steps"], result["steps_of_adapter"], result["stopped_early"]) == (12, 8, True)
    assert result["best"] == {"step": 8, "error": 2.0}
    adapter = shiva_dit.ShivaAdapter.from_pretrained(config.out / "adapter")
    record = adapter.training_record
    assert record["steps"] == 8
    assert record["early_stop"] == {
        "held_out": 2.0,
        "patience": 2,
        "steps_run": 12,
        "stopped_early": True,
    }
    trainer = Trainer(config, tiny.sd3(), WatchedData())
    for _ in range(8):
        trainer.train_step()
    best = trainer.result().adapter
    trainer.close()
    assert best is not None
    assert equal(weights(config.out), {**best.state_dict(), **best.backbone_weights})
    # It goes on from there with more patience.
    more = dataclasses.replace(config, watch=dataclasses.replace(PATIENT, patience=3))
    scripted({16: 1.5, 18: 1.5, 20: 1.5})
    with pytest.raises(ValueError, match="holds a run already"):
        train(more, tiny.sd3(), WatchedData(), resume=False)
    train(more, tiny.sd3(), WatchedData(), resume=True)
    assert read_json(config.out / "result.json")["best"] == {"step": 14, "error": 1.0}


def test_the_best_is_told_of_where_it_is_saved_alone(
    tmp_path: Path, scripted: Callable[[dict[int, float]], None]
) -> None:
    scripted({2: 1.0, 4: 2.0, 6: 2.0})
    config = recipe(tmp_path, watch=dataclasses.replace(PATIENT, patience=9))
    with pytest.raises(TrainingInterrupted, match="step-00000004"):
        train(config, tiny.sd3(), WatchedData(interrupt_at=8), resume=False)
    none = dataclasses.replace(config, watch=dataclasses.replace(PATIENT, patience=0))
    train(none, tiny.sd3(), WatchedData(), resume=True)
    result = read_json(config.out / "result.json")
    assert result["steps_of_adapter"] == result["steps"] == config.total_steps
    assert not {"best", "stopped_early"} & set(result)


def test_patience_is_lost_only_where_there_is_some(tmp_path: Path) -> None:
    before, best = Best(tmp_path, 2), Best(tmp_path, 0)
    before.add(2, 1.0, counts=True)
    best.load_state_dict(before.state_dict())
    for step in (4, 6, 8):
        best.add(step, 2.0, counts=True)
    assert (best.step, best.since) == (2, 0)


@pytest.mark.parametrize("killed_at", [7, 9, 11])
def test_a_kill_changes_nothing_of_it(
    tmp_path: Path,
    scripted: Callable[[dict[int, float]], None],
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    """Also where the best is older than the last checkpoint, or came after it."""
    scripted({2: 5.0, 4: 3.0, 6: 4.0, 8: 2.0, 10: 2.5, 12: 2.5, 14: 1.0})
    config = recipe(tmp_path / "whole", watch=PATIENT, joint_steps=30, checkpoint_every=5)
    train(config, tiny.sd3(), WatchedData(), resume=False)
    parts = dataclasses.replace(config, out=tmp_path / "parts")
    step = Trainer.train_step

    def dies(self: Trainer) -> dict[str, float]:
        if self.step == killed_at:
            raise ZeroDivisionError
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(ZeroDivisionError):
        train(parts, tiny.sd3(), WatchedData(), resume=False)
    monkeypatch.setattr(Trainer, "train_step", step)
    train(parts, tiny.sd3(), WatchedData(), resume=True)
    assert equal(weights(config.out), weights(parts.out))
    for name in ("result.json",):
        whole, again = (read_json(one.out / name) for one in (config, parts))
        assert {**whole, "seconds": 0} == {**again, "seconds": 0}
    steps = [line["step"] for line in read_log(parts.out / "log.jsonl")]
    assert steps == list(range(1, 13))
    assert [p.name for p in sorted((parts.out / "best").iterdir())] == ["step-00000008"]


def test_a_best_adapter_that_is_gone_is_missed_at_once(
    tmp_path: Path, scripted: Callable[[dict[int, float]], None]
) -> None:
    scripted({2: 5.0, 4: 3.0, 6: 4.0, 8: 2.0, 10: 2.5, 12: 2.5})
    config = recipe(tmp_path, watch=PATIENT, joint_steps=30)
    train(config, tiny.sd3(), WatchedData(), resume=False)
    folder = tmp_path / "best" / "step-00000008"
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000008, the best adapter of this run, is gone"):
        train(config, tiny.sd3(), WatchedData(), resume=True)


def test_errors_of_other_samples_are_not_compared(
    tmp_path: Path, scripted: Callable[[dict[int, float]], None]
) -> None:
    scripted({2: 0.1, 4: 0.1, 6: 0.1})
    config = recipe(tmp_path, watch=dataclasses.replace(PATIENT, patience=9))
    train(config, tiny.sd3(), WatchedData(), resume=False)
    other = dataclasses.replace(config, watch=dataclasses.replace(PATIENT, held_out=3))
    trainer = Trainer(other, tiny.sd3(), WatchedData())
    trainer.resume()
    assert trainer.looks.best.step is None
    assert trainer.looks.best.error == math.inf
    trainer.close()


# --- what goes wrong --------------------------------------------------------------------------


def test_a_look_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("shiva_dit.training.looks.pictures.draw_look", full)
    monkeypatch.setattr("shiva_dit.training.looks.looks.draw_curves", full)
    monkeypatch.setattr(Measure, "_error", no_memory)
    config = recipe(tmp_path, watch=dataclasses.replace(FAST, patience=1))
    train(config, tiny.sd3(), WatchedData(), resume=False)
    lines = capsys.readouterr().err
    for what in ("pictures", "the curves", "the held-out error"):
        assert f"looking at the run: {what} failed (" in lines
    assert "out of memory); training goes on." in lines
    assert all("held_out" not in line for line in looks_of(tmp_path))
    plain = recipe(tmp_path / "plain")
    train(plain, tiny.sd3(), WatchedData(), resume=False)
    assert equal(weights(tmp_path), weights(plain.out))


@pytest.mark.parametrize(
    ("watch", "missing", "message"),
    [
        (FAST, "matplotlib", r"matplotlib is not installed, and watch.every needs it: pip install"),
        (WatchConfig(tracker="wandb"), "wandb", r"wandb is not installed, .*watch.tracker=none"),
    ],
)
def test_what_is_not_installed_is_said_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: WatchConfig,
    missing: str,
    message: str,
) -> None:
    find = "shiva_dit.training.looks.trackers.find_spec"
    monkeypatch.setattr(find, lambda name: None if name == missing else object())
    with pytest.raises(ValueError, match=message):
        train(recipe(tmp_path / "run", watch=watch), tiny.sd3(), TinyData(), resume=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": -1}, "watch every must be at least 0, got -1"),
        ({"held_out": 0}, "watch held_out must be at least 1, got 0"),
        ({"held_out_share": 1.0}, r"watch held_out_share must lie in \(0, 1\), got 1.0"),
        ({"steps": 0}, "watch steps must be at least 1, got 0"),
        ({"guidance": 0.5}, "watch guidance must be at least 1, got 0.5"),
        ({"patience": 3}, "watch.patience counts looks, and there are none: set watch.every"),
        ({"tracker": "mlflow"}, "tracker: expected one of 'tensorboard', 'wandb', got 'mlflow'"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(WatchConfig, change)


def test_looks_are_for_adapters_and_their_guidance(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='watch is for adapters, not for method = "random"'):
        recipe(tmp_path, watch=FAST, method="random")
    with pytest.raises(ValueError, match=r"watch.guidance is for recipes that train for guidance"):
        recipe(tmp_path, watch=dataclasses.replace(FAST, guidance=3.0))


def test_what_has_no_pictures_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = WatchedData()
    config = recipe(tmp_path, watch=FAST)
    Trainer(config, tiny.sd3(), data).close()
    assert (
        capsys.readouterr().err.count("there is no VAE: looks show the first three channels") == 1
    )
    half = Sampler(
        scheduler=FlowMatchEulerDiscreteScheduler(), config={"boundary_ratio": 0.5}, part="first"
    )
    Trainer(dataclasses.replace(config, expert="high"), tiny.sd3(), data, half).close()
    assert "makes a part of the steps alone: looks have no pictures" in capsys.readouterr().err


# --- trackers ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_curves")
def test_tensorboard_gets_scalars_and_pictures_also_after_a_kill(tmp_path: Path) -> None:
    watch = dataclasses.replace(FAST, tracker="tensorboard")
    config = recipe(tmp_path, watch=watch, checkpoint_every=3)
    for _ in range(2):  # the second time from a checkpoint
        train(config, tiny.sd3(), WatchedData(), resume=True)
        (tmp_path / "adapter" / "config.json").unlink()
        for path in sorted((tmp_path / "adapter").iterdir()):
            path.unlink()
        last = tmp_path / "checkpoints" / "step-00000006"
        for path in sorted(last.iterdir()):
            path.unlink()
        last.rmdir()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    scalars = {"loss", "distill", "keep", "held_out", "seconds_left"}
    assert scalars == {*events.Tags()["scalars"]}
    log = read_log(tmp_path / "log.jsonl")
    for name in ("loss", "held_out"):
        told = {event.step: event.value for event in events.Scalars(name)}
        said = {line["step"]: line[name] for line in log if name in line}
        assert told.keys() == said.keys()
        for step, value in said.items():
            assert told[step] == pytest.approx(value, rel=1e-6)
    assert [image.step for image in events.Images("watch")] == [2, 4, 6]


@pytest.mark.usefixtures("no_curves")
def test_wandb_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState._reset_state()  # as in a process of its own
    told: list[tuple[int, dict[str, Any]]] = []
    settings: dict[str, Any] = {}
    begun: dict[str, Any] = {}
    ended: list[bool] = []

    def init(**given: Any) -> Any:
        begun.update(given)

        def log(values: dict[str, Any], step: int) -> None:
            told.append((step, values))

        return SimpleNamespace(log=log, finish=lambda: ended.append(True))

    module: Any = SimpleNamespace(
        init=init,
        config=SimpleNamespace(update=lambda values, **_: settings.update(values)),
        Image=lambda pixels: pixels,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("shiva_dit.training.looks.trackers.find_spec", lambda name: object())
    config = recipe(tmp_path / "my-run", watch=dataclasses.replace(FAST, tracker="wandb"))
    train(config, tiny.sd3(), WatchedData(), resume=False)
    assert (begun["project"], begun["name"]) == ("shiva-dit", "my-run")
    assert settings["optimizer.router"] == 1e-2
    assert [step for step, values in told if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [step for step, values in told if "watch" in values] == [2, 4, 6]
    assert next(v for _, v in told if "watch" in v)["watch"][0].shape[-1] == 3
    assert ended == [True]


class WandbError(Exception):
    """What wandb raises; no `RuntimeError`."""


@pytest.mark.usefixtures("no_curves")
def test_a_tracker_that_fails_is_one_line_at_the_start_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise WandbError("no login")

    module: Any = SimpleNamespace(init=fails, Error=WandbError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("shiva_dit.training.looks.trackers.find_spec", lambda name: object())
    watch = WatchConfig(tracker="wandb")
    config = recipe(tmp_path / "first", watch=watch)
    with pytest.raises(
        ValueError, match=r"wandb can't be started \(WandbError: no login\): see to"
    ):
        train(config, tiny.sd3(), WatchedData(), resume=False)
    run = SimpleNamespace(log=fails, finish=fails)
    module.init, module.config = (lambda **_: run), SimpleNamespace(update=lambda *_, **__: None)
    config = recipe(tmp_path / "second", watch=watch)
    train(config, tiny.sd3(), WatchedData(), resume=False)
    told = "looking at the run: the tracker failed (RuntimeError: WandbError: no login)"
    assert told in capsys.readouterr().err


# --- time -------------------------------------------------------------------------------------


def test_time_left_is_by_steps_and_looks_not_by_pauses() -> None:
    now = 0.0
    pace = Pace(lambda: now)

    def passes(seconds: float) -> Iterator[None]:
        nonlocal now
        now += seconds
        yield

    for _ in range(9):
        next(passes(2.0))
        pace.step()
    next(passes(4.0))
    assert pace.left(100, 4) == 100 * 2.0 + 4 * 4.0  # within the first look
    next(passes(1.0))
    pace.look()
    next(passes(3.0))
    pace.rest()  # a save
    next(passes(2.0 + 3600.0))
    pace.step()  # a night
    assert pace.left(100, 4) == 100 * 2.0 + 4 * 5.0
    assert pace.seconds == 9 * 2.0 + 5.0 + 3.0 + 3602.0
    next(passes(1000.0))
    pace.begin()  # a session that goes on later
    next(passes(2.0))
    pace.step()
    assert pace.left(10, 0) == 20.0
    assert pace.seconds == 9 * 2.0 + 5.0 + 3.0 + 3602.0 + 2.0


def test_seconds_add_up_over_sessions(tmp_path: Path) -> None:
    config = recipe(tmp_path, checkpoint_every=3)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    trainer.looks.pace.seconds = 100.0
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    trainer.close()
    again = Trainer(config, tiny.sd3(), TinyData())
    again.resume()
    assert again.looks.pace.seconds >= 100.0
    again.close()


# --- the recipe -------------------------------------------------------------------------------


def training_recipes() -> list[Path]:
    found = []
    for path in sorted(RECIPES.glob("*.toml")):
        try:
            load_recipe(TrainConfig, path)
        except ValueError:  # of another command
            continue
        found.append(path)
    return found


@pytest.mark.parametrize("path", training_recipes(), ids=lambda path: path.stem)
def test_a_recipe_that_is_written_is_the_recipe(path: Path, tmp_path: Path) -> None:
    config = load_recipe(TrainConfig, path)
    write_recipe(config, tmp_path)
    assert load_recipe(TrainConfig, tmp_path / "recipe.toml") == config


def test_there_are_recipes() -> None:
    assert {"digits", "scenes", "sd35", "scenes-4steps"} <= {p.stem for p in training_recipes()}


configs = st.builds(
    TrainConfig,
    task=st.none() | st.sampled_from(["digits", "scenes"]),
    # A path of these letters is the same on every system.
    out=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\\"), min_size=1)
    .map(lambda name: Path("runs") / f"x{name}")
    .filter(lambda path: ".." not in str(path)),
    start=st.none() | st.just(Path('runs/"a\tb\x7f')),
    keep_ratio=st.floats(0.01, 0.99),
    guidance=st.none() | st.tuples(st.floats(1, 3), st.floats(3, 100)),
    policy=st.builds(PolicyConfig)
    | st.builds(PolicyConfig, adaptive=st.just(True), target_range=st.none() | st.just((0.3, 0.9))),
    optimizer=st.builds(OptimizerConfig, router=st.floats(0, 1000), ema=st.floats(0, 0.999)),
    watch=st.builds(
        WatchConfig,
        every=st.integers(1, 10**9),
        steps=st.none() | st.integers(1, 1000),
        tracker=st.none() | st.sampled_from(["tensorboard", "wandb"]),
    ),
)


@given(config=configs)
def test_any_recipe_round_trips(config: TrainConfig, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("recipe", numbered=True)
    write_recipe(config, folder)
    assert load_recipe(TrainConfig, folder / "recipe.toml") == config


def test_every_setting_stands_in_the_file(tmp_path: Path) -> None:
    write_recipe(TrainConfig(), tmp_path)
    text = (tmp_path / "recipe.toml").read_text()
    for field in dataclasses.fields(TrainConfig):
        assert f"\n{field.name} = " in text or f"\n[{field.name}]\n" in text
    assert 'guidance = "none"' in text
    assert to_toml({"a": [["x"], []], "b": True}) == 'a = [["x"], []]\nb = true\n'


def test_a_run_writes_its_recipe_which_trains_the_same_again(tmp_path: Path) -> None:
    config = recipe(tmp_path / "first")
    train(config, tiny.sd3(), TinyData(), resume=False)
    again = load_recipe(
        TrainConfig, tmp_path / "first" / "recipe.toml", [f"out={tmp_path / 'second'}"]
    )
    assert again.task is None  # of other data than a demo's
    train(again, tiny.sd3(), TinyData(), resume=False)
    assert equal(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_none_unsets_what_a_recipe_sets() -> None:
    config = load_recipe(TrainConfig, RECIPES / "scenes.toml", ["guidance=none"])
    assert config.guidance is None
    with pytest.raises(ValueError, match="keep_ratio: expected float, got 'none'"):
        load_recipe(TrainConfig, RECIPES / "scenes.toml", ["keep_ratio=none"])


# --- curves -----------------------------------------------------------------------------------


def test_curves_are_drawn_of_any_log(tmp_path: Path) -> None:
    log, curves = tmp_path / "log.jsonl", tmp_path / "curves.png"
    assert not drawn.draw_curves(curves, log)
    log.write_text('{"step": 1, "stage": "joint", "loss": 1.0, "keep": 0.5}\n{"step": 2, "st')
    assert drawn.draw_curves(curves, log, 0.4)
    assert images.imread(curves).shape[:2] == (770, 1210)
    assert len(read_log(log)) == 1
    first = curves.read_bytes()
    drawn.draw_curves(curves, log, 0.4)
    assert curves.read_bytes() == first


def test_ratios_are_means_over_bins_of_time() -> None:
    rows = tuple((1.0, (row + 1) / 16) for row in range(16))
    schedule = shiva_dit.Schedule(ratios=rows)
    found = by_time(schedule)
    assert len(found) == 8
    assert [row[1] for row in found] == [round((2 * n + 1.5) / 16, 4) for n in range(8)]
    assert json.dumps(found)
