"""Adapters for a backbone that is sampled in few steps, trained at these steps' times alone."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import shiva_dit
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.cli import main
from shiva_dit.config import load_recipe
from shiva_dit.core.schedule import Schedule
from shiva_dit.core.time_law import TimeLaw
from shiva_dit.demo.base import load_backbone
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.maps import kept_maps
from shiva_dit.experiments.scoring import sampler_times
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.sampling import Sampler
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import PolicyConfig
from shiva_dit.training.trainer import Trainer
from tests import tiny
from tests.test_training import TinyData, recipe

ROOT = Path(__file__).parents[1]
STEPS = (0.25, 0.5, 0.75, 1.0)
EVENLY = Sampler(scheduler=FlowMatchEulerDiscreteScheduler(), asks_evenly=True)


def few(out: Path, **changes: Any) -> TrainConfig:
    plain: dict[str, Any] = {
        "time_sampling": "sampler",
        "num_steps": 4,
        "policy": PolicyConfig(adaptive=True, num_bins=5),
        "batch_size": 8,
        "micro_batches": 4,
    }
    return recipe(out, **{**plain, **changes})


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    made = Trainer(few(tmp_path), tiny.sd3(), TinyData(), EVENLY)
    # Ratios that differ by block and time.
    tiny.randomize(made.student.adapter.policy, seed=1, std=0.5)
    with torch.no_grad():
        parameters = made.optimization.parts["policy"].values()
        for mean, parameter in zip(made.optimization.average["policy"], parameters, strict=True):
            mean.copy_(parameter)
    return made


def shift(t: float) -> float:
    return 3 * t / (1 + 2 * t)


def test_the_demos_sampler_takes_these_steps() -> None:
    law = load_task("digits").sampler(4)
    model = tiny.sd3()
    spec = Trainer(few(Path("x")), model, TinyData(), EVENLY).student.attachment.spec
    assert law.times(spec, 64, 4) == pytest.approx(sampler_times(4), abs=1e-6)
    assert law.law_of(spec, 64, 4).steps == STEPS
    shifted = Sampler(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    times = shifted.law_of(spec, 64, 4).steps
    # diffusers shifts its even steps, and the last of them, 0.001, before that as well.
    low = shift(0.001)
    wanted = [shift(low + (1 - low) * place / 3) for place in range(4)]
    assert times == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("stage", ["warmup", "policy", "joint"])
def test_times_are_the_samplers_and_come_alike(trainer: Trainer, stage: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    seen: Counter[float] = Counter()
    for _ in range(50):
        for part in trainer.planner.step(stage, generator).parts:
            seen.update(part.t.tolist())
            if stage != "warmup":  # whose counts are for all times
                assert len(set(part.t.tolist())) == 1
    # Eight samples of four parts, one stratum for each step: not one more or less.
    assert seen == dict.fromkeys(STEPS, 100)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_fewer_or_more_parts_than_steps_see_all_times(tmp_path: Path, parts: int) -> None:
    config = few(tmp_path, micro_batches=parts)
    plans = Trainer(config, tiny.sd3(), TinyData(), EVENLY).planner
    generator = torch.Generator().manual_seed(0)
    seen = Counter(
        t
        for _ in range(200)
        for part in plans.step("joint", generator).parts
        for t in part.t.tolist()
    )
    assert set(seen) == set(STEPS)
    # 200 draws of parts: by five standard deviations of independent ones, which strata undercut.
    assert max(abs(n / 1600 - 0.25) for n in seen.values()) < 5 * (0.1875 / (200 * parts)) ** 0.5


def test_what_the_budget_counts_is_what_the_steps_execute(trainer: Trainer) -> None:
    planner, policy = trainer.planner, trainer.student.adapter.policy
    plan = planner.step("joint", torch.Generator().manual_seed(0))
    rows = {float(part.t[0]): part.counts for part in plan.parts}
    assert set(rows) == set(STEPS)
    assert len(set(rows.values())) > 1
    executed = [sum(rows[t][b] / 64 for b in policy.prunable_blocks) / 3 for t in STEPS]
    assert plan.mean_keep_ratio == pytest.approx(sum(executed) / 4, abs=1e-9)
    adapter = trainer.result().adapter
    assert adapter is not None
    schedule = adapter.schedule
    assert schedule.law.steps == STEPS
    at_steps = [schedule.ratios[b][1:] for b in (1, 2, 3, 4)]
    assert len(set(at_steps)) == 4
    assert sum(map(sum, at_steps)) / 12 == pytest.approx(0.5, abs=1e-6)
    table = schedule.for_steps(STEPS, 64)
    # Over 12 entries rounding misses by half a token at most.
    assert table.mean_keep_ratio_at(STEPS) == pytest.approx(0.5, abs=1 / (2 * 12 * 64))


def test_the_policy_learns_from_the_budget_at_the_steps_and_from_the_losses(
    trainer: Trainer,
) -> None:
    policy = trainer.student.adapter.policy
    parameters = dict(policy.named_parameters())
    plan = trainer.planner.step("joint", trainer.generator)
    plan.backward_policy()  # the budget alone
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters.values())
    alone = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    policy.zero_grad()
    plan = trainer.planner.step("joint", trainer.generator)
    for part in plan.parts:
        batch = trainer.data.batch(torch.tensor([0, 1]), trainer.generator)
        loss, _ = trainer.student.loss(part, batch, 0.5, trainer.data.unconditional())
        loss.backward()
    plan.backward_policy()
    for name, p in parameters.items():
        assert p.grad is not None
        assert not torch.equal(p.grad, alone[name])
    for _ in range(3):
        before = policy.anchor.item()
        trainer.train_step()
    assert policy.anchor.item() != before


def test_an_adapter_for_few_steps_is_saved_and_executes_its_mean(tmp_path: Path) -> None:
    words = ["train", str(ROOT / "recipes/scenes-4steps.toml"), f"out={tmp_path}", "task=digits"]
    short = ["warmup_steps=1", "policy_steps=1", "joint_steps=1", "backbone=frozen"]
    assert main([*words, *short]) == 0
    adapter = ShivaAdapter.from_pretrained(tmp_path / "adapter")
    assert adapter.schedule.law.steps == STEPS
    assert adapter.schedule.law.name == "4 FlowMatchEulerDiscreteScheduler (shift = 1)"
    task = load_task("digits")
    backbone = load_backbone(task)
    shiva_dit.apply(task.pipeline(backbone), tmp_path / "adapter")
    attachment = attachment_of(backbone)
    assert attachment is not None
    maps = kept_maps(task, attachment, 2, seed=0, num_steps=4)[1:]  # the first block keeps all
    assert maps.shape == (5, 4, 2, 64)
    # Over 20 entries rounding misses by half a token at most.
    assert maps.float().mean().item() == pytest.approx(0.6, abs=1 / (2 * 20 * 64) + 1e-6)
    assert shiva_dit.summary(backbone).keep_ratio == pytest.approx(
        0.6, abs=1 / (2 * 20 * 64) + 1e-6
    )


def test_steps_are_kept_with_the_schedule() -> None:
    law = TimeLaw(name="4 steps", steps=STEPS)
    assert law.weights(5) == (0.0, 1.25, 1.25, 1.25, 1.25)
    assert law.at(torch.tensor([0.0, 0.3, 0.6, 1.0])).tolist() == list(STEPS)
    schedule = Schedule.uniform(0.4, num_blocks=3, num_bins=5, law=law)
    assert Schedule.from_json(schedule.to_json()) == schedule
    for wrong, message in (
        ({"steps": (0.5, 0.5)}, "steps must rise"),
        ({"steps": (0.5, 1.5)}, r"must lie in \[0, 1\]"),
        ({"steps": (0.5,), "times": (0.0, 1.0)}, "of its steps, or of shares"),
    ):
        with pytest.raises(ValueError, match=message):
            TimeLaw(name="wrong", **wrong)


def test_recipes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    config = few(tmp_path)
    for changes, message in (
        ({"num_steps": None}, "num_steps go together"),
        ({"time_sampling": "uniform"}, "num_steps go together"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"shared_bin": True}, "leave shared_bin"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match=r"num_bins = 4 puts two .* t = 0.25, 0.5, 0.75, 1 into"):
        Trainer(
            few(tmp_path, policy=PolicyConfig(adaptive=True, num_bins=4)),
            tiny.sd3(),
            TinyData(),
            EVENLY,
        )
    with pytest.raises(ValueError, match="pass scheduler="):
        Trainer(config, tiny.sd3(), TinyData())


def test_the_shipped_recipe_gives_each_part_a_step_and_each_step_a_bin() -> None:
    config = load_recipe(TrainConfig, ROOT / "recipes/scenes-4steps.toml")
    assert (config.num_steps, config.micro_batches, config.guidance) == (4, 4, None)
    assert config.caption_dropout == 0.0
