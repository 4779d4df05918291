"""Published methods that are trained: each by the trainer of ours, and as it was published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shiva_dit.core.schedule import Schedule
from shiva_dit.core.time_law import UNIFORM
from shiva_dit.experiments.kept import keep, put_on, put_trained_on
from shiva_dit.methods.base import Lesson
from shiva_dit.methods.diffcr import DiffCR
from shiva_dit.methods.norm import NormSelector
from shiva_dit.methods.settings import DiffCRConfig
from shiva_dit.models.attach import attach
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_widths
from shiva_dit.models.families import model_spec
from shiva_dit.models.features import BlockFeatures
from shiva_dit.training.settings import OptimizerConfig
from shiva_dit.training.trainer import Trainer
from tests import families, tiny
from tests.test_training import TinyData, recipe

FAST = OptimizerConfig(router=0.1, policy=0.1, backbone=1e-3, warmup_steps=1, ema=0.0)
PEERS = ("diffcr",)


def trainer_of(method: str, out: Path, steps: int = 3, **changes: Any) -> Trainer:
    base: dict[str, Any] = {
        "method": method,
        "warmup_steps": 0,
        "policy_steps": 0,
        "joint_steps": steps,
        "optimizer": FAST,
        "batch_size": 4,
        "micro_batches": 4,
    }
    return Trainer(recipe(out, **{**base, **changes}), tiny.sd3(), TinyData())


def bare(t: float = 0.5) -> Tensor:
    return tiny.run(tiny.sd3(), tiny.inputs(t=t))


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PEERS)
def test_what_was_trained_is_the_same_from_its_files(tmp_path: Path, method: str) -> None:
    trainer = trainer_of(method, tmp_path / "run")
    config, trained = trainer.config, trainer.run(show_progress=False)
    trainer.close()
    outputs = []
    for t in (0.1, 0.9):
        model = tiny.sd3()
        put_trained_on(trained, trained.schedule, model, seed=0)
        outputs.append(tiny.run(model, tiny.inputs(t=t)))
        assert not torch.equal(outputs[-1], bare(t))
    keep(trained, config, tmp_path / "kept")
    for t, output in zip((0.1, 0.9), outputs, strict=True):
        model = tiny.sd3()
        put_on(tmp_path / "kept", model)
        assert torch.equal(tiny.run(model, tiny.inputs(t=t)), output)


@pytest.mark.parametrize("method", PEERS)
def test_training_leaves_no_trace_and_goes_on_to_the_bit(tmp_path: Path, method: str) -> None:
    whole = trainer_of(method, tmp_path / "whole", steps=4)
    whole.run(show_progress=False)
    first = trainer_of(method, tmp_path / "parts", steps=4)
    for _ in range(2):
        first.train_step()
    first.save()
    marks = tiny.footprint(tiny.sd3())
    first.close()
    assert tiny.footprint(first.student.model).keys() == marks.keys()
    second = trainer_of(method, tmp_path / "parts", steps=4)
    second.resume()
    second.run(show_progress=False)
    for name, value in whole.optimization.tensors().items():
        assert torch.equal(second.optimization.tensors()[name], value), name


@pytest.mark.parametrize("method", PEERS)
def test_every_parameter_of_its_own_gets_a_gradient(tmp_path: Path, method: str) -> None:
    trainer = trainer_of(method, tmp_path, steps=20)
    seen: dict[str, Tensor] = {}
    # Regions come one to a part; ratios leave their first value, where routers have no say, soon.
    for _ in range(8):
        before = {n: v.clone() for n, v in trainer.optimization.tensors().items()}
        trainer.train_step()
        for name, value in trainer.optimization.tensors().items():
            if name.startswith(("router.", "policy.")):
                moved = value != before[name]
                seen[name] = seen.get(name, torch.zeros_like(moved)) | moved
    assert seen
    for name, moved in seen.items():
        assert bool(moved.all()), name


@pytest.mark.parametrize("method", PEERS)
def test_its_own_objective_or_the_recipes(tmp_path: Path, method: str) -> None:
    own, ours = (
        trainer_of(method, tmp_path / kind, objective=kind) for kind in ("method", "recipe")
    )
    assert ours.student.weights == ours.config.loss
    found = own.student.weights
    assert own.student.reducer is not None
    assert {n: getattr(found, n) for n in own.student.reducer.objective} == dict(
        own.student.reducer.objective
    )
    assert own.student.needs_teacher == bool(found.output or found.distillation)


# --- DiffCR -----------------------------------------------------------------------------------


def diffcr(keep_ratio: float = 0.5, **settings: Any) -> DiffCR:
    config = DiffCRConfig(**settings)
    return DiffCR(32, 4, keep_ratio, config, generator=torch.Generator().manual_seed(0))


def test_ratios_mix_the_two_next_to_them() -> None:
    method = diffcr()
    with torch.no_grad():
        method.ratios.copy_(torch.tensor([[0.43, 0.05, 1.2]]).expand(4, -1))
    found = method.mixtures(2, 60)
    assert [found[block].counts for block in (1, 2, 3)] == [(24, 30), (6, 12), (54, 60)]
    weights = torch.stack([found[block].weights for block in (1, 2, 3)])
    # In float32, of numbers up to 10: rounding of 1e-6.
    expected = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(weights, expected, rtol=0.0, atol=2e-6)
    schedule = method.learned_schedule(UNIFORM)
    assert schedule.ratios == ((1.0, 0.4, 0.1, 1.0),) * 4
    # The slope between two ratios, also beyond the bounds: there they can come back.
    weights[:, 1].sum().backward()
    assert method.ratios.grad is not None
    torch.testing.assert_close(method.ratios.grad[2], torch.full((3,), 10.0))


def test_the_budget_is_the_squared_distance_of_the_mean() -> None:
    method = diffcr(0.6)
    lesson = Lesson(progress=0.0, generator=torch.Generator())
    assert float(method.loss(lesson).detach()) == pytest.approx(0.3 * 0.4**2, rel=1e-6)


@pytest.mark.parametrize("site", ["feed_forward", "block"])
@pytest.mark.parametrize("kind", ["plain", "dual"])
def test_the_routers_weight_multiplies_updates(site: Any, kind: str) -> None:
    """One block by hand, all tokens of which run but one."""
    method = diffcr(weight_site=site)
    model = tiny.sd3(kind, 1)
    method = DiffCR(32, 1, 0.5, method.config, full_blocks=())
    block: Any = model.transformer_blocks[0]
    calls: list[Any] = []
    block.register_forward_hook(lambda m, a, k, out: calls.append((k, out)), with_kwargs=True)
    schedule = Schedule.from_ratios([[63 / 64]], [])
    attach(model, method, schedule)
    tiny.run(model, tiny.inputs())
    given, (_, output) = calls[0]
    x = given["hidden_states"]
    scores = x @ method.routers[0].detach()  # (B, N)
    same = tiny.sd3(kind, 1).transformer_blocks[0]
    for b in range(2):
        chosen = scores[b].argsort(descending=True)[:63]
        one = {
            name: value[b : b + 1] if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        one["hidden_states"] = before = x[b : b + 1, chosen]
        weights = scores[b, chosen].sigmoid()[:, None]
        if site == "feed_forward":
            same.ff.register_forward_hook(lambda m, a, out, w=weights: out * w)
        with torch.no_grad():
            after = same(**one)[1]
        same.ff._forward_hooks.clear()
        if site == "block":
            after = before + weights * (after - before)
        # Sums of other orders, of tokens of size 3: measured below 2e-6.
        torch.testing.assert_close(output[b, chosen], after[0], rtol=0.0, atol=1e-5)
        left = scores[b].argmin()
        assert torch.equal(output[b, left], x[b, left])


@pytest.mark.parametrize("site", ["feed_forward", "block"])
def test_training_at_a_ratio_that_runs_is_what_sampling_runs(tmp_path: Path, site: Any) -> None:
    trainer = trainer_of("diffcr", tmp_path, diffcr=DiffCRConfig(weight_site=site))
    student = trainer.student
    assert isinstance(student.reducer, DiffCR)
    with torch.no_grad():
        student.reducer.ratios.copy_(torch.tensor([0.5, 1.0, 0.3]).expand(4, -1))
    arguments = tiny.inputs(t=0.6)
    model = student.model.eval()
    part = trainer.planner.step("joint", trainer.generator).parts[2]
    lesson = Lesson(progress=0.0, generator=trainer.generator)
    with torch.no_grad(), student._in_training(part, lesson, BlockFeatures()):
        ours = model(**arguments).sample
    trainer.close()
    schedule = student.reducer.learned_schedule(UNIFORM)
    assert schedule.ratios[2] == (1.0, 0.5, 1.0, 0.3)
    attach(model, student.reducer, tiny.from_counts([[64, 32, 64, 20]] * 4))
    theirs = tiny.run(model, arguments)
    # The same operations, once times 1 and once beside others times 0 (0.3 of 64 is rounded up).
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-6)


def test_samples_of_a_part_share_their_region(tmp_path: Path) -> None:
    for parts in (1, 2, 4):
        trainer = trainer_of("diffcr", tmp_path, batch_size=8, micro_batches=parts)
        seen = set()
        for _ in range(30):
            plan = trainer.planner.step("joint", trainer.generator)
            for part in plan.parts:
                (region,) = set((part.t * 4).long().clamp(max=3).tolist())
                seen.add(region)
            times = torch.cat([part.t for part in plan.parts])
            if parts == 4:  # its samples lie in one region as they are drawn
                assert (times.sort().values * 8).floor().tolist() == list(range(8))
        assert seen == {0, 1, 2, 3}
        trainer.close()


def test_the_budget_leads_the_ratios_to_their_target(tmp_path: Path) -> None:
    settings = DiffCRConfig(budget_weight=30.0)
    optimizer = dataclasses.replace(FAST, policy=0.03, backbone=0.0)
    changes = {"diffcr": settings, "optimizer": optimizer, "keep_ratio": 0.6}
    trainer = trainer_of("diffcr", tmp_path, steps=40, **changes)
    trained = trainer.run(show_progress=False)
    assert isinstance(trained.reducer, DiffCR)
    assert float(trained.reducer.kept().detach().mean()) == pytest.approx(0.6, abs=0.03)
    assert trained.schedule == trained.reducer.learned_schedule(trained.schedule.law)
    assert trained.schedule.num_bins == 4


def test_flops_are_those_of_the_kept_tokens_and_of_the_routers() -> None:
    model = tiny.sd3()
    schedule = tiny.from_counts([[64, 32, 16, 64]])
    bare_ones = attach(model, diffcr(), schedule)
    size = tiny.NUM_TOKENS, tiny.TEXT_TOKENS
    found = pruned_flops(bare_ones, *size, schedule.for_tokens(64).counts[0])
    others = attach(model, NormSelector(), schedule)
    without = pruned_flops(others, *size, schedule.for_tokens(64).counts[0])
    assert found - without == 2 * 32 * (64 + 64 + 32 + 16)  # logits of all, weights of the chosen


@pytest.mark.parametrize("name", ["flux", "pixart-sigma", "qwen-image", "wan"])
def test_other_families_take_diffcr_too(name: str) -> None:
    model = families.made(name)
    spec = model_spec(model)
    width, blocks = model_widths(model).width, len(spec.blocks(model))
    full = spec.full_blocks(model) or (0,)
    schedule = Schedule.uniform(0.5, num_blocks=blocks, full_blocks=full)
    arguments = families.arguments(name)
    before = families.run(model, arguments)
    for site in ("block", "feed_forward"):
        method = DiffCR(width, blocks, 0.5, DiffCRConfig(weight_site=site), full_blocks=full)
        if site == "feed_forward" and name != "pixart-sigma":
            with pytest.raises(ValueError, match=r'set its weight_site = "block"'):
                attach(model, method, schedule)
            continue
        attached = attach(model, method, schedule)
        assert not torch.equal(families.run(model, arguments), before)
        attached.detach()
    assert torch.equal(families.run(model, arguments), before)


@pytest.mark.parametrize("settings", [{"regions": 0}, {"budget_weight": -1.0}])
def test_what_diffcr_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"diffcr {next(iter(settings))}"):
        DiffCRConfig(**settings)
    with pytest.raises(ValueError, match="block 0 unpruned"):
        diffcr().scores(torch.zeros(1, 4, 32), None, 0)
