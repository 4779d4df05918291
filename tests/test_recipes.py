"""That every setting of a training recipe reaches what it is for."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.core.hand_made import hand_made
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.modules.router import ShivaRouter
from shiva_dit.training import student
from shiva_dit.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from shiva_dit.training.optimization import PARTS, Optimization
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import (
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RouterConfig,
    ShapeConfig,
)
from shiva_dit.training.trainer import Trainer
from tests import tiny
from tests.test_training import TinyData, planner, recipe

# --- what the paper gives -------------------------------------------------------------------


def test_the_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.batch_size, config.caption_dropout, config.lora_rank) == (16, 0.1, 32)
    assert config.backbone == "dora"
    assert (config.router.hidden, config.router.num_groups) == (64, None)
    assert (config.router.tau_rank[0], config.router.tau_select[0]) == (0.2, 0.1)
    assert (config.optimizer.router, config.optimizer.policy) == (3e-4, 1e-4)
    assert config.optimizer.warmup_steps == 200
    assert config.policy.logit_noise == 1.0
    assert config.policy.budget.momentum == 0.2
    assert config.loss.distill_every == 4


# --- temperatures and noise -----------------------------------------------------------------


def test_temperatures_fall_over_the_whole_run_and_noise_reaches_the_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    def record(**options: Any) -> SelectionGates:
        made.append(options)
        return SelectionGates(**options)

    monkeypatch.setattr(student, "SelectionGates", record)
    router = RouterConfig(tau_rank=(0.4, 0.1), tau_select=(0.2, 0.05), noise_std=0.7)
    trainer = Trainer(recipe(tmp_path, router=router), tiny.sd3(), TinyData())
    trainer.run(show_progress=False)
    for name, (start, end) in (("tau_rank", (0.4, 0.1)), ("tau_select", (0.2, 0.05))):
        taus = [options[name] for options in made]
        assert taus[0] == start
        assert taus[-1] == pytest.approx(end)
        assert taus == sorted(taus, reverse=True)
        assert len(set(taus)) == 6  # one for each step
    assert {options["noise_std"] for options in made} == {0.7}
    assert all(options["generator"] is trainer.generator for options in made)


def test_logit_noise_is_on_in_the_policy_stage_alone(tmp_path: Path) -> None:
    config = recipe(tmp_path, micro_batches=2, batch_size=4)

    def spread(stage: Any, noise: float) -> float:
        plans = planner(
            dataclasses.replace(config, policy=PolicyConfig(adaptive=True, logit_noise=noise))
        )
        generator = torch.Generator().manual_seed(0)
        found = [
            torch.logit(torch.as_tensor(part.soft_k[block]).detach() / 64)
            for _ in range(200)
            for part in plans.step(stage, generator).parts
            for block in (1, 2, 3)
        ]
        return float(torch.stack(found).std())

    # The policy starts flat, so that all that varies is the noise; 1,200 draws: 2% of sd.
    assert spread("policy", 1.0) == pytest.approx(1.0, rel=0.1)
    assert spread("policy", 0.5) == pytest.approx(0.5, rel=0.1)
    assert spread("joint", 1.0) < 1e-5


@pytest.mark.parametrize(("law", "std"), [("uniform", 0.2887), ("logit_normal", 0.2083)])
def test_times_follow_their_law(tmp_path: Path, law: Any, std: float) -> None:
    fixed = PolicyConfig(adaptive=False)
    plans = planner(recipe(tmp_path, time_sampling=law, policy=fixed, batch_size=64))
    generator = torch.Generator().manual_seed(0)
    parts = [part for _ in range(20) for part in plans.step("joint", generator).parts]
    t = torch.cat([part.t for part in parts])
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert t.std().item() == pytest.approx(std, rel=0.03)


# --- what the model is given ----------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_captions_are_dropped_in_training(tmp_path: Path, p: float) -> None:
    model = tiny.sd3()
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["pooled_projections"])

    trainer = Trainer(recipe(tmp_path, caption_dropout=p), model, TinyData())
    model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train_step()
    assert len(seen) == 2
    assert all(bool((pooled == 0).all()) == (p == 1.0) for pooled in seen)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_models_products(tmp_path: Path, precision: Any) -> None:
    model = tiny.sd3()
    seen: list[torch.dtype] = []
    trainer = Trainer(recipe(tmp_path, precision=precision), model, TinyData())
    model.transformer_blocks[1].attn.to_q.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    before = {n: p.detach().clone() for n, p in trainer.student.adapter.named_parameters()}
    for _ in range(4):
        trainer.train_step()
    assert set(seen) == {getattr(torch, precision)}
    moved = {
        n for n, p in trainer.student.adapter.named_parameters() if not torch.equal(p, before[n])
    }
    assert any(name.startswith("router") for name in moved)
    assert any(name.startswith("policy") for name in moved)


# --- losses ---------------------------------------------------------------------------------


def first_loss(out: Path, **weights: Any) -> float:
    loss = LossConfig(**{"diffusion": 0.0, "distillation": 0.0, "output": 0.0, **weights})
    # Without a policy there is no budget loss.
    config = recipe(out, loss=loss, policy=PolicyConfig(adaptive=False))
    return Trainer(config, tiny.sd3(), TinyData()).train_step()["loss"]


def test_every_loss_counts_by_its_weight(tmp_path: Path) -> None:
    alone = {
        name: first_loss(tmp_path, **{name: 1.0})
        for name in ("diffusion", "distillation", "output")
    }
    assert min(alone.values()) > 1e-4
    assert len(set(alone.values())) == 3
    for name, value in alone.items():
        assert first_loss(tmp_path, **{name: 2.0}) == pytest.approx(2 * value, rel=1e-5)
        by_time = first_loss(tmp_path, **{name: 1.0, "time_weighting": "logit_normal"})
        assert abs(by_time - value) > 1e-3 * value
    together = first_loss(tmp_path, diffusion=1.0, distillation=1.0, output=1.0)
    assert together == pytest.approx(sum(alone.values()), rel=1e-5)


# --- the optimizer --------------------------------------------------------------------------


def optimization(**options: Any) -> tuple[Optimization, dict[str, nn.Parameter]]:
    parts = {part: nn.Parameter(torch.zeros(4)) for part in PARTS}
    config = OptimizerConfig(router=3.0, policy=2.0, backbone=1.0, updates=4.0, **options)
    untuned = {"x": torch.full((4,), 3.0)}
    return Optimization({part: {"x": p} for part, p in parts.items()}, config, untuned), parts


def test_rates_rise_in_each_stage_and_fall_at_the_end_of_the_last() -> None:
    made, _ = optimization(warmup_steps=4, decay_share=0.5)

    def rates(stage: Any, done: int) -> tuple[float, ...]:
        made.start(stage, done, 20)
        return tuple(group["lr"] for group in made.adamw.param_groups)

    assert PARTS == ("router", "policy", "backbone", "updates")
    assert rates("warmup", 0) == (0.75, 0.0, 0.0, 1.0)
    assert rates("warmup", 9) == (3.0, 0.0, 0.0, 4.0)
    assert rates("policy", 1) == (1.5, 1.0, 0.0, 2.0)
    assert rates("joint", 3) == (3.0, 2.0, 1.0, 4.0)
    assert rates("joint", 10) == (3.0, 2.0, 1.0, 4.0)
    assert rates("joint", 15) == (1.5, 1.0, 0.5, 2.0)
    assert rates("joint", 19) == pytest.approx((0.3, 0.2, 0.1, 0.4))


@pytest.mark.parametrize(("decay_share", "at_7"), [(0.5, 1.2), (0.0, 2.0)])
def test_the_policy_is_held_after_its_share_of_the_last_stage(
    decay_share: float, at_7: float
) -> None:
    made, _ = optimization(warmup_steps=0, decay_share=decay_share, policy_share=0.5)

    def rates(done: int) -> tuple[float, ...]:
        made.start("joint", done, 20)
        return tuple(group["lr"] for group in made.adamw.param_groups)

    assert rates(5) == (3.0, 2.0, 1.0, 4.0)
    assert rates(7) == pytest.approx((3.0, at_7, 1.0, 4.0))
    assert rates(10) == (3.0, 0.0, 1.0, 4.0)


def test_a_policy_that_never_learns_in_the_last_stage() -> None:
    made, _ = optimization(warmup_steps=0, policy_share=0.0)
    made.start("joint", 0, 20)
    assert [group["lr"] for group in made.adamw.param_groups] == [3.0, 0.0, 1.0, 4.0]


def test_each_part_is_clipped_by_itself() -> None:
    made, parts = optimization(grad_clip=0.5)
    for size, parameter in zip((10.0, 0.1, 3.0, 0.2), parts.values(), strict=True):
        parameter.grad = torch.full((4,), size / 2)  # norm: size
    made.start("joint", 0, 1)
    made.finish(0)
    # Adam's first moment after one step is a tenth of the gradient.
    moments = [made.adamw.state[p]["exp_avg"].norm().item() for p in parts.values()]
    assert moments == pytest.approx([0.05, 0.01, 0.05, 0.02], rel=1e-4)


def test_weight_decay_pulls_the_backbone_to_the_model_as_it_was_given() -> None:
    made, parts = optimization(warmup_steps=1, weight_decay=0.25)
    for parameter in parts.values():
        parameter.grad = torch.zeros(4)
    for expected in (0.75, 0.75 + 0.25 * 2.25):
        made.start("joint", 0, 1)
        for parameter in parts.values():
            parameter.grad = torch.zeros(4)
        made.finish(0)
        assert parts["backbone"].tolist() == pytest.approx([expected] * 4)
    assert not any(parts[part].any() for part in PARTS if part != "backbone")


def test_small_gradients_of_router_and_policy_still_move_them() -> None:
    made, parts = optimization(warmup_steps=1, weight_decay=0.0)
    for parameter in parts.values():
        parameter.grad = torch.full((4,), 1e-10)
    made.start("joint", 0, 1)
    made.finish(0)
    moved = {part: parameter.abs().mean().item() for part, parameter in parts.items()}
    assert moved["router"] == pytest.approx(3.0, rel=1e-3)
    assert moved["policy"] == pytest.approx(2.0, rel=1e-3)
    assert moved["backbone"] < 0.02  # Adam's usual eps of 1e-8 hides it


def test_the_average_follows_by_its_decay() -> None:
    made, parts = optimization(ema=0.75, weight_decay=0.0)
    made.start("joint", 0, 1000)
    average = made.average["backbone"][0]
    for step, decay in ((0, 0.1), (500, 0.75)):  # a short run does not average in its start
        with torch.no_grad():
            parts["backbone"].fill_(8.0)
            average.fill_(4.0)
        made.finish(step)
        assert average[0].item() == pytest.approx(decay * 4.0 + (1 - decay) * 8.0)
    with made.averaged():
        assert torch.equal(parts["backbone"], average)
    assert parts["backbone"][0].item() == 8.0


# --- sizes and files ------------------------------------------------------------------------


def test_sizes_reach_the_adapter(tmp_path: Path) -> None:
    router = RouterConfig(hidden=24, num_groups=4, normalize_inputs=False)
    config = recipe(tmp_path, router=router, backbone="lora", lora_rank=5)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    trained = trainer.run(show_progress=False)
    made = trained.adapter
    assert made is not None
    assert (made.config.hidden, made.config.num_groups, made.config.lora_rank) == (24, 4, 5)
    assert not made.config.normalize_inputs
    ranks = {v.shape[0] for n, v in made.backbone_weights.items() if "lora_A" in n}
    assert ranks == {5}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_tuned_backbone_is_kept_in_its_dtype(tmp_path: Path, dtype: Any) -> None:
    trainer = Trainer(recipe(tmp_path, backbone_dtype=dtype), tiny.sd3(), TinyData())
    weights = trainer.result().backbone_weights
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    seen: list[str] = []
    trainer = Trainer(recipe(tmp_path, checkpoint_every=2, joint_steps=1), tiny.sd3(), TinyData())
    save = trainer.save

    def spy() -> Path:
        path = save()
        seen.append(path.name)
        return path

    trainer.save = spy
    trainer.run(show_progress=False)
    assert seen == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_checkpoint_that_fails_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Checkpoint({"x": torch.ones(2)}, {"step": 1})
    save_checkpoint(tmp_path, 1, good)

    def fail(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("shiva_dit.training.checkpoint.save_file", fail)
    for step in (1, 2):
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, step, Checkpoint({"x": torch.zeros(2)}, {"step": step}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    last = latest_checkpoint(tmp_path)
    assert last is not None
    assert torch.equal(load_checkpoint(last).tensors["x"], good.tensors["x"])


def test_the_bar_tells_loss_ratio_and_distillation_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(recipe(tmp_path), tiny.sd3(), TinyData()).run()
    shown = capsys.readouterr().err
    assert "6/6" in shown
    for pattern in (r"stage=joint", r"loss=\d+\.\d{3}", r"keep=0\.\d{3}", r"distill=\d+\.\d{4}"):
        assert re.search(pattern, shown)


# --- schedules by hand, routers that read less ------------------------------------------------


def test_a_fixed_schedule_by_hand_is_what_trains_and_what_is_saved(tmp_path: Path) -> None:
    shape = ShapeConfig(depth=-1.5, time=2.0)
    policy = PolicyConfig(adaptive=False, shape=shape, num_bins=8)
    config = recipe(tmp_path, policy=policy, batch_size=8, micro_batches=4)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    wanted = hand_made(
        config.keep_ratio, depth=-1.5, time=2.0, form="linear", num_blocks=4, num_bins=8
    )
    table = wanted.for_tokens(64)
    assert len(set(table.counts)) > 4
    for _ in range(20):
        for part in trainer.planner.step("joint", trainer.generator).parts:
            assert part.counts in {table.row(t) for t in part.t.tolist()}
            assert part.soft_k == [float(k) for k in part.counts]
    adapter = trainer.run(show_progress=False).adapter
    assert adapter is not None
    assert adapter.schedule == wanted
    assert adapter.schedule.mean_keep_ratio == pytest.approx(config.keep_ratio, abs=1e-6)


@pytest.mark.parametrize("form", ["linear", "step"])
def test_schedules_by_hand_lean_as_asked_and_keep_the_mean(form: Any) -> None:
    early = hand_made(0.3, depth=-2.0, time=0.0, form=form, num_blocks=7, num_bins=4)
    noisy = hand_made(0.3, depth=0.0, time=2.0, form=form, num_blocks=7, num_bins=4)
    for made in (early, noisy):
        assert made.mean_keep_ratio == pytest.approx(0.3, abs=1e-9)
        assert all(row[0] == 1.0 for row in made.ratios)
    assert early.ratios[0] == early.ratios[3]
    assert early.ratios[0][1] > 2 * early.ratios[0][6]
    assert noisy.ratios[3][1] > 2 * noisy.ratios[0][1]
    assert len({*early.ratios[0][1:]}) == (6 if form == "linear" else 2)


@pytest.mark.parametrize("left_out", ["time", "context", "layer"])
def test_a_router_does_not_see_what_it_is_not_given(tmp_path: Path, left_out: str) -> None:
    inputs: Any = tuple(name for name in ("time", "context", "layer") if name != left_out)
    config = recipe(tmp_path, router=RouterConfig(inputs=inputs))
    trained = Trainer(config, tiny.sd3(), TinyData()).run(show_progress=False).adapter
    assert trained is not None
    trained.save_pretrained(tmp_path / "adapter")
    router = ShivaAdapter.from_pretrained(tmp_path / "adapter").router
    tiny.randomize(router, seed=0, std=1.0)
    generator = torch.Generator().manual_seed(0)
    time = torch.randn(2, 32, generator=generator)
    context = torch.randn(2, tiny.POOLED_DIM, generator=generator)
    plain = router.condition(time, context)[2]
    changed = {
        "time": router.condition(-time, context)[2],
        "context": router.condition(time, -context)[2],
        "layer": router.condition(time, context)[3],  # the same group's other block
    }
    for name, found in changed.items():
        assert torch.equal(found, plain) == (name == left_out)


def test_what_does_not_fit_together_is_named() -> None:
    with pytest.raises(ValueError, match=r"set policy\.adaptive = false"):
        PolicyConfig(adaptive=True, shape=ShapeConfig(depth=1.0))
    with pytest.raises(ValueError, match=r"target_range must rise within \(0, 1\)"):
        PolicyConfig(adaptive=True, target_range=(0.9, 0.3))
    with pytest.raises(ValueError, match="target_range is for learned ratios"):
        PolicyConfig(adaptive=False, target_range=(0.3, 0.9))
    with pytest.raises(ValueError, match=r"depth and time must lie in \[-20, 20\]"):
        ShapeConfig(time=float("nan"))
    with pytest.raises(ValueError, match="must be among time, context, layer, got text"):
        ShivaRouter(8, 8, 8, 2, 1, inputs=("text",))
