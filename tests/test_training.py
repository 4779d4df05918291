"""The trainer: stages, resuming, errors, and what it leaves behind."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shiva_dit
from shiva_dit.core.budget import BudgetController
from shiva_dit.core.estimators import RejectedUpdate
from shiva_dit.core.keep_table import nearest_bin
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.registry import METHODS
from shiva_dit.methods.settings import SparseDiTConfig
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.features import record_blocks
from shiva_dit.modules.policy import AdaptiveRatioPolicy
from shiva_dit.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from shiva_dit.training.data import Batch, ShuffledIndices, drop_captions
from shiva_dit.training.interrupt import TrainingInterrupted
from shiva_dit.training.looks.material import Material, Shown
from shiva_dit.training.objective import (
    denoising_loss,
    distillation_loss,
    interpolate,
    logit_normal_density,
    squared_error,
)
from shiva_dit.training.plan import Planner
from shiva_dit.training.recipe import EstimatorConfig, StageName, TrainConfig
from shiva_dit.training.run import train
from shiva_dit.training.settings import (
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RouterConfig,
    WatchConfig,
)
from shiva_dit.training.trainer import Trainer
from tests import tiny

OWN = {
    "fixed_map": ("router",),
    "diffcr": ("router", "policy"),
    "dydit": ("router",),
    "sparsedit": ("updates",),
}
"""What training updates of a control's own."""
TUNABLE = [name for name, method in METHODS.items() if method.tunes and name != "shiva"]


class TinyData:
    """Random latents; `broken_at` makes a batch infinite, `interrupt_at` acts as Ctrl-C."""

    def __init__(self, broken_at: int | None = None, interrupt_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(12, tiny.CHANNELS, tiny.LATENT, tiny.LATENT, generator=generator)
        self.text = torch.randn(12, tiny.TEXT_TOKENS, tiny.TEXT_DIM, generator=generator)
        self.pooled = torch.randn(12, tiny.POOLED_DIM, generator=generator)
        self.broken_at, self.interrupt_at = broken_at, interrupt_at
        self.calls = 0

    def __len__(self) -> int:
        return 12

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        self.calls += 1
        if self.calls == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        latents = self.latents[indices]
        latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        if self.calls == self.broken_at:
            latents = latents * float("inf")
        conditioning = {
            "encoder_hidden_states": self.text[indices],
            "pooled_projections": self.pooled[indices],
        }
        return Batch(latents=latents, conditioning=conditioning)

    def unconditional(self) -> dict[str, Tensor]:
        return {
            "encoder_hidden_states": torch.zeros(tiny.TEXT_TOKENS, tiny.TEXT_DIM),
            "pooled_projections": torch.zeros(tiny.POOLED_DIM),
        }


class WatchedData(TinyData):
    """Has samples beside those to train on."""

    def watched(self, config: WatchConfig) -> Material:
        draw = torch.Generator().manual_seed(7)
        shape = (config.held_out, tiny.CHANNELS, tiny.LATENT, tiny.LATENT)
        batch = Batch(
            latents=torch.randn(shape, generator=draw),
            conditioning={
                "encoder_hidden_states": self.text[: config.held_out],
                "pooled_projections": self.pooled[: config.held_out],
            },
        )
        titles = tuple(f"prompt {row}" for row in range(config.held_out))
        return Material(
            training=self, held_out=(batch,), shown=(Shown(titles=titles, batch=batch),)
        )


def recipe(out: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        out=out,
        keep_ratio=0.5,
        backbone="full",
        warmup_steps=2,
        policy_steps=2,
        joint_steps=2,
        batch_size=4,
        micro_batches=2,
        checkpoint_every=100,
        policy=PolicyConfig(adaptive=True, num_bins=8),
        sparsedit=SparseDiTConfig(groups=(1, 0, 1, 1)),  # four blocks
        optimizer=OptimizerConfig(router=1e-2, policy=1e-2, backbone=1e-3, warmup_steps=1),
    )
    return dataclasses.replace(base, **changes)


def values(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    return {
        part: {name: p.detach().clone() for name, p in parameters.items()}
        for part, parameters in trainer.optimization.parts.items()
    }


def changed(before: dict[str, dict[str, Tensor]], trainer: Trainer) -> set[str]:
    after = values(trainer)
    return {
        part
        for part in before
        if any(not torch.equal(before[part][name], after[part][name]) for name in before[part])
    }


@pytest.mark.parametrize("rejected", ["identity", pytest.param("low_rank", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backbone", ["full", "lora", "dora", "frozen"])
def test_each_stage_trains_exactly_its_parts(tmp_path: Path, backbone: str, rejected: Any) -> None:
    config = recipe(tmp_path, backbone=backbone, rejected=rejected)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    always = {"router"} | ({"updates"} if rejected == "low_rank" else set())
    expected = [always] * 2 + [always | {"policy"}] * 2
    joint = always | {"policy"} | ({"backbone"} if backbone != "frozen" else set())
    for parts in [*expected, joint, joint]:
        before = values(trainer)
        trainer.train_step()
        assert changed(before, trainer) == parts
    trainer.close()
    assert attachment_of(trainer.student.model) is None


@pytest.mark.parametrize("kind", ["plain", "dual"])
@pytest.mark.parametrize(
    "estimator",
    [
        EstimatorConfig(kind="paper"),
        *(EstimatorConfig(rejected=r) for r in get_args(RejectedUpdate)),
        EstimatorConfig(kv_gate=True),
    ],
    ids=lambda e: f"{e.kind}-{e.rejected}-{e.kv_gate}",
)
def test_every_estimator_moves_router_and_policy(
    tmp_path: Path, kind: str, estimator: EstimatorConfig
) -> None:
    config = recipe(tmp_path, estimator=estimator, warmup_steps=0, policy_steps=0, joint_steps=1)
    trainer = Trainer(config, tiny.sd3(kind), TinyData())
    before = values(trainer)
    result = trainer.train_step()
    assert changed(before, trainer) == {"router", "policy", "backbone"}
    assert result["loss"] > 0


def test_shared_scores_learn_from_all_blocks_that_use_them(tmp_path: Path) -> None:
    """Only the first block's router is asked, and learns."""
    moved = []
    for every in (1, 3):
        router = RouterConfig(hidden=8, num_groups=4, noise_std=0.0, select_every=every)
        config = recipe(tmp_path, router=router, warmup_steps=1, policy_steps=0, joint_steps=0)
        trainer = Trainer(config, tiny.sd3(), TinyData())
        adapter = trainer.student.adapter
        assert adapter.config.select_every == every
        weights = [group.score.weight for group in adapter.router.groups]
        before = [weight.clone() for weight in weights]
        trainer.train_step()
        moved.append([not torch.equal(a, b) for a, b in zip(weights, before, strict=True)])
    assert moved == [[False, True, True, True], [False, True, False, False]]


@pytest.mark.parametrize("rejected", ["identity", "low_rank"])
def test_resuming_is_equal_to_the_bit(tmp_path: Path, rejected: Any) -> None:
    config = recipe(tmp_path / "a", rejected=rejected)
    straight = Trainer(config, tiny.sd3(), TinyData())
    straight.run(show_progress=False)

    config = dataclasses.replace(config, out=tmp_path / "b")
    first = Trainer(config, tiny.sd3(), TinyData())
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(config, tiny.sd3(), TinyData())
    assert second.resume() == first.last_good
    assert second.step == 3
    second.run(show_progress=False)

    for part, parameters in values(straight).items():
        for name, value in parameters.items():
            assert torch.equal(value, values(second)[part][name]), f"{part}.{name}"
        for ours, theirs in zip(
            straight.optimization.average[part], second.optimization.average[part], strict=True
        ):
            assert torch.equal(ours, theirs)
    assert straight.budget.state_dict() == second.budget.state_dict()
    assert torch.equal(straight.generator.get_state(), second.generator.get_state())


def test_interrupting_saves_and_resuming_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    config = recipe(tmp_path / "whole")
    train(config, tiny.sd3(), TinyData(), resume=False)

    config = dataclasses.replace(config, out=tmp_path / "broken")
    with pytest.raises(TrainingInterrupted, match=r"saved in .*step-00000004"):
        # Two micro-batches a step: the eighth batch lies in the middle of the fourth step. The
        # first call of all reads the shapes.
        train(config, tiny.sd3(), TinyData(interrupt_at=8), resume=False)
    assert latest_checkpoint(config.out / "checkpoints") is not None
    with pytest.raises(ValueError, match="holds a run already"):
        train(config, tiny.sd3(), TinyData(), resume=False)
    train(config, tiny.sd3(), TinyData(), resume=True)

    for name in ("diffusion_pytorch_model.safetensors", "tuned_backbone.safetensors"):
        whole = (tmp_path / "whole" / "adapter" / name).read_bytes()
        assert whole == (tmp_path / "broken" / "adapter" / name).read_bytes()
    lines = (config.out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


class MoreData(TinyData):
    def __len__(self) -> int:
        return 13


def nudged(model: Any) -> Any:
    """A model of which a single bit in the middle of one tensor is another."""
    with torch.no_grad():
        weight = model.transformer_blocks[1].ff.net[2].weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    return model


class NamedData(TinyData):
    """Data that says what it is."""

    def __init__(self, identity: str) -> None:
        super().__init__()
        self._identity = identity

    def identity(self) -> str:
        return self._identity


def test_resume_refuses_data_of_the_same_length_that_is_another(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    trainer = Trainer(config, tiny.sd3(), NamedData("one"))
    trainer.train_step()
    trainer.save()
    Trainer(config, tiny.sd3(), NamedData("one")).resume()
    with pytest.raises(ValueError, match=r"another data than this run's \(one then, two now\)"):
        Trainer(config, tiny.sd3(), NamedData("two")).resume()
    with pytest.raises(ValueError, match=r"another data than this run's \(one then, not given no"):
        Trainer(config, tiny.sd3(), TinyData()).resume()


def test_an_older_versions_checkpoint_goes_on_and_says_what_isnt_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tmp_path)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    trainer.train_step()
    older = load_checkpoint(trainer.save())
    del older.state["origin"]
    older.state["data"] = {"samples": 12, "model": "0" * 64}
    save_checkpoint(trainer.checkpoints, 1, older)
    Trainer(config, tiny.sd3(), TinyData()).resume()
    assert "whether backbone and data are the same isn't known" in capsys.readouterr().err
    with pytest.raises(ValueError, match="made with another samples than"):
        Trainer(config, tiny.sd3(), MoreData()).resume()


def test_the_record_of_own_data_names_no_task(tmp_path: Path) -> None:
    for data, identity in ((NamedData("mine"), "mine"), (TinyData(), "not given")):
        trained = Trainer(recipe(tmp_path), tiny.sd3(), data).result()
        assert trained.adapter is not None
        made = trained.adapter.training_record
        assert made["recipe"]["task"] is None
        assert made["data"] == {"name": None, "samples": 12, "identity": identity}
        assert made["backbone"]["class"] == "SD3Transformer2DModel"


def test_a_trainer_that_can_t_be_made_gives_the_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.sd3()
    before = tiny.footprint(model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shiva_dit.training.trainer.fit_updates", fail)
    with pytest.raises(KeyboardInterrupt):
        Trainer(recipe(tmp_path, backbone="lora"), model, TinyData())
    assert attachment_of(model) is None
    assert tiny.footprint(model) == before


def test_resume_refuses_another_recipe_model_or_data(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    with pytest.raises(ValueError, match=r"no checkpoint in .* to resume from: is out= right\?"):
        trainer.resume()
    trainer.train_step()
    trainer.save()
    other = Trainer(recipe(tmp_path, keep_ratio=0.4), tiny.sd3(), TinyData())
    with pytest.raises(ValueError, match="other values of keep_ratio"):
        other.resume()
    with pytest.raises(ValueError, match="made with another samples than"):
        Trainer(config, tiny.sd3(), MoreData()).resume()
    with pytest.raises(ValueError, match="made with another model than"):
        Trainer(config, tiny.sd3(seed=5), TinyData()).resume()
    with pytest.raises(ValueError, match="made with another model than"):
        Trainer(config, nudged(tiny.sd3()), TinyData()).resume()
    older = load_checkpoint(trainer.save())  # it predates some settings: they are the defaults
    del older.state["config"]["rejected"], older.state["config"]["policy"]["shape"]
    save_checkpoint(trainer.checkpoints, 1, older)
    Trainer(config, tiny.sd3(), TinyData()).resume()
    slower = dataclasses.replace(config.optimizer, backbone=1e-4)  # after a divergence
    assert Trainer(recipe(tmp_path, optimizer=slower), tiny.sd3(), TinyData()).resume().exists()


def test_training_into_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    train(config, tiny.sd3(), TinyData(), resume=False)
    for kept in ("checkpoints", "adapter", "log.jsonl"):
        with pytest.raises(ValueError, match="holds a run already"):
            train(config, tiny.sd3(), TinyData(), resume=False)
        path = tmp_path / kept
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(config, tiny.sd3(), TinyData(), resume=False)


@pytest.mark.parametrize("backbone", ["full", "lora", "dora", "frozen"])
def test_closing_gives_the_model_back_as_it_came(tmp_path: Path, backbone: str) -> None:
    model = tiny.sd3()
    model.proj_out.bias.requires_grad_(False)
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    checkpointing = backbone in ("full", "lora")
    config = recipe(tmp_path, backbone=backbone, gradient_checkpointing=checkpointing)
    folder = train(config, model, TinyData(), resume=False)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    after = tiny.footprint(model)
    assert {k: v for k, v in after.items() if k.endswith("requires_grad")} == {
        k: v for k, v in before.items() if k.endswith("requires_grad")
    }
    assert list(model.state_dict()) == list(tiny.sd3().state_dict())
    shiva_dit.apply(model, folder)
    with pytest.raises(ValueError, match=r"has an adapter on: call shiva_dit\.remove"):
        Trainer(config, model, TinyData())
    shiva_dit.remove(model)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


def test_a_wrapped_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    wrapped = torch.compile(tiny.sd3(), backend="eager")
    with pytest.raises(ValueError, match=r"gets the model itself.*unwrapped"):
        train(recipe(tmp_path / "run"), wrapped, TinyData(), resume=False)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_step_stage_and_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path), tiny.sd3(), TinyData(broken_at=6))
    for _ in range(2):
        trainer.train_step()
    kept = trainer.save()
    with pytest.raises(FloatingPointError, match=rf"step 2 \(stage 'policy'\).*{kept.name}"):
        trainer.train_step()


def diverging(out: Path, **rates: float) -> Trainer:
    optimizer = OptimizerConfig(**{"warmup_steps": 1, **rates})
    config = recipe(out, warmup_steps=0, policy_steps=0, joint_steps=9, optimizer=optimizer)
    return Trainer(config, tiny.sd3(), TinyData())


def test_a_run_that_diverges_stops_and_saves_nothing_broken(tmp_path: Path) -> None:
    trainer = diverging(tmp_path, backbone=1e3)
    with pytest.raises(
        FloatingPointError, match=r"not finite at step \d \(stage 'joint'\).*--resu"
    ):
        trainer.run(show_progress=False)
    for path in tmp_path.glob("checkpoints/*"):
        assert all(torch.isfinite(v).all() for v in load_checkpoint(path).tensors.values())


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path), tiny.sd3(), TinyData())
    before = values(trainer)
    weight = trainer.student.adapter.router.layer_embedding.weight
    weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match=r"gradient of the router is not finite at step 0"):
        trainer.train_step()
    assert changed(before, trainer) == set()


def test_a_policy_that_diverges_names_step_and_stage(tmp_path: Path) -> None:
    trainer = diverging(tmp_path)
    with torch.no_grad():
        trainer.student.adapter.policy.anchor.fill_(-200.0)
    with pytest.raises(FloatingPointError, match=r"ratios have left \(0, 1\] at step 0 \(stage 'j"):
        trainer.train_step()


def test_weights_that_overflow_when_saved_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path, backbone_dtype="float16"), tiny.sd3(), TinyData())
    with torch.no_grad():
        trainer.optimization.average["backbone"][0].fill_(1e6)
    with pytest.raises(FloatingPointError, match=r"is not finite as float16: .*backbone_dtype"):
        trainer.result()


def test_ratios_near_one_train_too(tmp_path: Path) -> None:
    """Every block keeps all its tokens, and the backbone is frozen in the first stages."""
    trainer = Trainer(recipe(tmp_path, keep_ratio=0.999), tiny.sd3(), TinyData())
    before = values(trainer)
    trainer.run(show_progress=False)
    assert changed(before, trainer) == {"router", "policy", "backbone"}


def test_checkpoints_keep_two_and_say_when_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, Checkpoint({"x": torch.tensor([step])}, {"step": step}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    last = latest_checkpoint(tmp_path)
    assert last is not None
    assert load_checkpoint(last).tensors["x"].item() == 3
    path = last / "tensors.safetensors"
    content = path.read_bytes()
    for damage in (content[:-1], content[:-8] + b"\1" * 8, b""):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"damaged.*SHA-256.*step-00000002"):
            load_checkpoint(last)
    path.write_bytes(content)
    path = last / "state.json"
    for damage in (b"{}", b"[]", b"{", b"\xff\xfe"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"damaged.*step-00000002"):
            load_checkpoint(last)


@pytest.mark.parametrize("rejected", ["identity", pytest.param("low_rank", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backbone", ["full", "lora", "dora", "frozen"])
def test_the_saved_adapter_gives_what_was_trained(
    tmp_path: Path, backbone: str, rejected: Any
) -> None:
    config = recipe(tmp_path, backbone=backbone, rejected=rejected)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    trained = trainer.run(show_progress=False)
    with trainer.optimization.averaged():
        ours = trainer.student.adapter
        again = attach(
            trainer.student.model, ours.selector(), trained.schedule, updates=ours.updates
        )
        trainer.student.model.eval()
        expected = tiny.run(trainer.student.model, tiny.inputs())
        again.detach()
    trainer.close()

    assert trained.adapter is not None
    trained.adapter.save_pretrained(tmp_path / "adapter")
    fresh = tiny.sd3()
    dense = tiny.run(fresh, tiny.inputs())
    shiva_dit.apply(fresh, tmp_path / "adapter")
    found = tiny.run(fresh, tiny.inputs())
    if backbone in ("lora", "dora"):  # in training PEFT's layers run, which round otherwise
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    else:
        assert torch.equal(found, expected)
    shiva_dit.remove(fresh)
    assert torch.equal(tiny.run(fresh, tiny.inputs()), dense)


@pytest.mark.parametrize("backbone", ["full", "lora", "dora", "frozen"])
def test_the_teacher_is_the_unpruned_model_before_training(tmp_path: Path, backbone: str) -> None:
    trainer = Trainer(recipe(tmp_path, backbone=backbone), tiny.sd3(), TinyData())
    for _ in range(6):
        trainer.train_step()
    arguments = {**tiny.inputs(), "return_dict": False}
    features, prediction = trainer.student.teach(arguments)
    assert torch.equal(prediction, tiny.run(tiny.sd3(), tiny.inputs()))
    assert set(features.inputs) == {1, 2, 3}
    assert trainer.student.attachment.enabled


@pytest.mark.parametrize(
    ("loss", "rejected", "asked"),
    [
        ({}, "ridge", True),
        ({"distillation": 0.0}, "ridge", True),
        ({"output": 0.0}, "ridge", True),
        ({"output": 0.0, "distillation": 0.0}, "teacher", True),
        ({"output": 0.0, "distillation": 0.0}, "ridge", False),
    ],
)
def test_the_teacher_runs_where_something_asks_for_it(
    tmp_path: Path, loss: dict[str, float], rejected: Any, asked: bool
) -> None:
    config = recipe(tmp_path, loss=LossConfig(**loss), estimator=EstimatorConfig(rejected=rejected))
    trainer = Trainer(config, tiny.sd3(), TinyData())
    forwards: list[int] = []
    trainer.student.teacher.register_forward_hook(lambda *_: forwards.append(1))
    values = trainer.train_step()
    assert bool(forwards) == asked
    assert ("distill" in values) == asked
    assert values["loss"] > 0
    trainer.close()


@pytest.mark.parametrize("select_every", [1, 2])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, select_every: int) -> None:
    losses = []
    for on in (False, True):
        router = RouterConfig(hidden=8, select_every=select_every)
        config = recipe(tmp_path, gradient_checkpointing=on, router=router)
        trainer = Trainer(config, tiny.sd3(), TinyData())
        losses.append([trainer.train_step()["loss"] for _ in range(6)])
        trainer.close()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("backbone", ["full", "lora", "frozen"])
def test_updates_start_by_least_squares(tmp_path: Path, backbone: Any) -> None:
    plain = Trainer(recipe(tmp_path / "a", backbone=backbone), tiny.sd3(), TinyData())
    config = recipe(tmp_path / "b", backbone=backbone, rejected="low_rank", rejected_rank=8)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    # Nothing of the training's own randomness is used up.
    assert torch.equal(trainer.generator.get_state(), plain.generator.get_state())
    updates = trainer.student.updates
    assert updates is not None
    model, arguments = tiny.sd3(), tiny.inputs(batch=8, t=0.4, seed=9)
    with (
        torch.no_grad(),
        record_blocks(model, inputs=(2, 3), outputs=(2, 3), num_tokens=tiny.NUM_TOKENS) as features,
    ):
        embedding = model.time_text_embed.timestep_embedder.register_forward_hook(
            lambda module, args, output: features.outputs.update({-1: output})
        )
        model(**arguments)
    embedding.remove()
    for block in (2, 3):
        x, change = features.inputs[block], features.update(block)
        condition = updates.condition(features.outputs[-1], arguments["pooled_projections"])[block]
        rest = (change - updates.group(block)(x, condition)).square().sum()
        assert rest < 0.8 * change.square().sum()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("backbone", ["lora", "dora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_tuned_over_16_bits_is_float32_and_saved_as_trained(
    tmp_path: Path, backbone: Any, precision: Any, dtype: torch.dtype
) -> None:
    """Weights, gradients, moments and averages; steps far below a unit in the last place count."""
    small = OptimizerConfig(backbone=1e-5, warmup_steps=1, weight_decay=0.0, ema=0.9)
    config = recipe(
        tmp_path,
        backbone=backbone,
        precision=precision,
        rejected="low_rank",
        optimizer=small,
        warmup_steps=0,
        policy_steps=0,
        joint_steps=4,
    )
    trainer = Trainer(config, tiny.sd3().to(dtype), TinyData())
    tuned = trainer.optimization.parts["backbone"]
    start = {name: p.detach().clone() for name, p in tuned.items()}
    trained = trainer.run(show_progress=False)
    adamw = trainer.optimization.adamw.state
    for name, parameter in tuned.items():
        held = [parameter, *(adamw[parameter][key] for key in ("exp_avg", "exp_avg_sq"))]
        assert {tensor.dtype for tensor in held} == {torch.float32}
        # Adam's steps are the rate's size while gradients keep their sign.
        if "attn.to_v." in name and "lora_A" not in name:
            step = (parameter.detach() - start[name]).abs().max()
            assert 1e-5 < float(step) <= 4.2e-5, name
    averages = {
        part: dict(zip(trainer.optimization.parts[part], means, strict=True))
        for part, means in trainer.optimization.average.items()
    }
    assert {mean.dtype for part in averages.values() for mean in part.values()} == {torch.float32}
    assert trained.adapter is not None
    trained.adapter.save_pretrained(tmp_path / "adapter")
    saved = shiva_dit.ShivaAdapter.from_pretrained(tmp_path / "adapter")
    assert len(saved.backbone_weights) == len(tuned)
    for key, value in saved.backbone_weights.items():
        # PEFT saves magnitudes under a shorter name.
        whole = key.removeprefix("transformer.").removesuffix(".weight")
        (name,) = [n for n in tuned if n.replace(".shiva_dit", "").removesuffix(".weight") == whole]
        torch.testing.assert_close(value, averages["backbone"][name], rtol=1e-6, atol=0.0)
    trainer.close()
    assert {p.dtype for p in trainer.student.model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", ["lora", "dora"])
def test_an_untrained_lora_over_16_bits_changes_nothing(
    tmp_path: Path, backbone: Any, dtype: torch.dtype
) -> None:
    """Magnitudes rounded to 16 bits would: by 0.2% in bfloat16."""
    model = tiny.sd3().to(dtype)
    arguments = {name: value.to(dtype) for name, value in tiny.inputs().items()}
    before = tiny.run(model, arguments)
    trainer = Trainer(recipe(tmp_path, backbone=backbone), model, TinyData())
    trainer.student.attachment.enabled = False
    after = tiny.run(model, arguments)
    # DoRA's m / |W| is 1 to float32's rounding: next to nothing is rounded to another value.
    assert float((after - before).float().norm()) < 1e-4 * float(before.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tuning_all_of_a_model_in_16_bits_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny.sd3().to(dtype)
    before = tiny.footprint(model)
    with pytest.raises(ValueError, match=r'load the model in float32 and .* precision = "bfloat16'):
        Trainer(recipe(tmp_path, backbone="full"), model, TinyData())
    assert tiny.footprint(model) == before


@pytest.mark.parametrize("method", [n for n in TUNABLE if n != "dense" and METHODS[n].rejects])
def test_controls_learn_what_rejected_tokens_get_too(tmp_path: Path, method: Any) -> None:
    config = recipe(tmp_path, method=method, rejected="low_rank", backbone="frozen")
    trainer = Trainer(config, tiny.sd3(), TinyData())
    before = values(trainer)
    trained = trainer.run(show_progress=False)
    assert changed(before, trainer) == {"updates", *OWN.get(method, ())}
    assert trained.updates is not None
    assert trained.updates.group(1).up.weight.abs().max() > 0


@pytest.mark.parametrize("method", TUNABLE)
def test_controls_train_their_backbone_for_all_steps(tmp_path: Path, method: Any) -> None:
    trainer = Trainer(recipe(tmp_path, method=method), tiny.sd3(), TinyData())
    before = values(trainer)
    trained = trainer.run(show_progress=False)
    assert changed(before, trainer) == {"backbone", *OWN.get(method, ())}
    assert trainer.step == 6
    assert trained.adapter is None
    assert (trained.reducer is None) == (method == "dense")


@pytest.mark.parametrize("method", [n for n, method in METHODS.items() if not method.learns])
def test_a_control_with_nothing_to_train_is_there_as_it_is(tmp_path: Path, method: Any) -> None:
    trainer = Trainer(recipe(tmp_path, method=method, backbone="frozen"), tiny.sd3(), TinyData())
    with pytest.raises(ValueError, match=f"{method}.* with a frozen backbone has nothing to train"):
        trainer.run(show_progress=False)
    trained = trainer.result()
    assert trained.backbone_weights == {}
    assert (trained.reducer is None) == (method == "dense")
    assert trained.schedule.mean_keep_ratio == pytest.approx(0.5)


# --- plans --------------------------------------------------------------------------------


def planner(config: TrainConfig, num_blocks: int = 4) -> Planner:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # not what tests before have left
        policy = AdaptiveRatioPolicy(num_blocks, config.keep_ratio)
    fixed = Schedule.uniform(config.keep_ratio, num_blocks=num_blocks)
    return Planner(config, 64, policy, fixed, BudgetController(config.keep_ratio))


def test_warmup_gives_each_part_a_ratio_of_its_own_stratum(tmp_path: Path) -> None:
    plan = planner(recipe(tmp_path, micro_batches=4, batch_size=8)).step(
        "warmup", torch.Generator().manual_seed(0)
    )
    kept = sorted(part.counts[1] / 64 for part in plan.parts)
    low, high = TrainConfig().warmup_ratios
    for stratum, ratio in enumerate(kept):
        # Rounding down to tokens moves a ratio by less than 1/64.
        assert low + (high - low) * stratum / 4 - 1 / 64 <= ratio
        assert ratio <= low + (high - low) * (stratum + 1) / 4
    assert all(part.counts[0] == 64 for part in plan.parts)
    # All times together still cover every stratum of the batch once.
    t = torch.cat([part.t for part in plan.parts]).sort().values
    assert (t * 8).floor().tolist() == list(range(8))


@pytest.mark.parametrize("shared_bin", [False, True])
def test_the_policy_is_asked_at_all_times_alike(tmp_path: Path, shared_bin: bool) -> None:
    """Else it would keep much where it is looked at and little between."""
    config = recipe(tmp_path, shared_bin=shared_bin, micro_batches=2, batch_size=16)
    plans = planner(config)
    with torch.no_grad():  # ratios that differ in every bin, so that counts tell the bin
        plans.policy.time_branch[-1].weight.normal_(generator=torch.Generator().manual_seed(1))
    grid = (torch.arange(8) + 0.5) / 8
    ratios = (64 * plans.policy(grid)[:, 1]).tolist()
    generator = torch.Generator().manual_seed(0)
    visits = torch.zeros(8)
    for _ in range(400):
        for part in plans.step("joint", generator).parts:
            soft = float(torch.as_tensor(part.soft_k[1]).detach())
            found = min(range(8), key=lambda b: abs(ratios[b] - soft))
            visits[found] += 1
            if shared_bin:
                assert {nearest_bin(t, 8) for t in part.t.tolist()} == {found}
    # 800 visits, 100 expected per bin, strata make them less random than a multinomial (sd 9.4).
    assert visits.min() > 60
    assert visits.max() < 140


def test_a_range_of_targets_moves_the_anchor_in_the_joint_stage_alone(tmp_path: Path) -> None:
    config = recipe(tmp_path, keep_ratio=0.5, micro_batches=2, batch_size=16)
    ranged = dataclasses.replace(config.policy, target_range=(0.25, 0.75), logit_noise=0.0)
    plans = planner(dataclasses.replace(config, policy=ranged))
    with torch.no_grad():  # blocks differ much, times don't
        plans.policy.layer_branch[-1].weight.normal_(generator=torch.Generator().manual_seed(1))

    def means(stage: StageName) -> list[float]:
        parts = [p for _ in range(100) for p in plans.step(stage, generator).parts]
        return sorted(
            sum(float(torch.as_tensor(k).detach()) for k in p.soft_k[1:]) / 192 for p in parts
        )

    generator = torch.Generator().manual_seed(0)
    still, moved = means("policy"), means("joint")
    assert still[-1] - still[0] < 1e-6
    assert 0.25 <= moved[0] < 0.27
    assert 0.73 < moved[-1] <= 0.75 + 1e-6
    inverse = sum(1.0 / mean for mean in moved) / len(
        moved
    )  # even in 1 / ratio: low ones are harder
    assert inverse == pytest.approx((1 / 0.25 + 1 / 0.75) / 2, abs=0.08)
    plan = plans.step("joint", generator)  # the budget's table isn't moved
    assert plan.mean_keep_ratio == pytest.approx(still[0], abs=0.01)


def test_a_plan_carries_gradients_of_tokens_and_budget_to_the_policy(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    plans = planner(config)
    plan = plans.step("joint", torch.Generator().manual_seed(0))
    task = sum(part.soft_k[1] for part in plan.parts)
    assert isinstance(task, Tensor)
    task.backward()
    plan.backward_policy()
    anchor = plans.policy.anchor.grad
    assert anchor is not None
    # d (64 r) / d anchor = 64 r (1 - r) per part; the mean is on target, so the budget adds only
    # what rounding leaves (at most half a token).
    assert float(anchor) == pytest.approx(2 * 64 * 0.25, rel=1e-3)
    assert plan.mean_keep_ratio == 0.5


def test_the_budget_brings_the_executed_integers_to_the_target(tmp_path: Path) -> None:
    """A closed loop over what is run: with 9 tokens, rounding moves a ratio by up to 0.06."""
    torch.manual_seed(0)  # of the policy's weights
    config = recipe(tmp_path, keep_ratio=0.4)
    plans = planner(config)
    plans.num_tokens = 9
    with torch.no_grad():
        plans.policy.anchor.fill_(2.0)  # 0.88 of the tokens
        plans.policy.layer_branch[-1].weight.normal_(
            std=0.1, generator=torch.Generator().manual_seed(1)
        )
    optimizer = torch.optim.Adam(plans.policy.parameters(), lr=1e-4)  # the paper's
    generator = torch.Generator().manual_seed(0)
    executed = []
    for _ in range(240):
        plan = plans.step("joint", generator)
        executed.append(plan.mean_keep_ratio)
        optimizer.zero_grad()
        plan.backward_policy()
        optimizer.step()
    assert executed[0] > 0.8
    # Measured 0.0005 with seven of eight seeds; one takes longer (0.014 here, 0.007 at 400 steps).
    assert max(abs(mean - 0.4) for mean in executed[-20:]) < 0.0047


def test_a_learned_policy_refuses_times_that_the_budget_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="time_sampling"):
        recipe(tmp_path, time_sampling="logit_normal")
    fixed = PolicyConfig(adaptive=False)
    assert recipe(tmp_path, time_sampling="logit_normal", policy=fixed).time_sampling


# --- data and objective -------------------------------------------------------------------


def test_indices_run_through_whole_epochs_and_can_be_put_back() -> None:
    indices = ShuffledIndices(7, seed=1)
    first = torch.cat([indices.take(3) for _ in range(7)])
    assert [sorted(first[i : i + 7].tolist()) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert first[:7].tolist() != first[7:14].tolist()
    again = ShuffledIndices(7, seed=1)
    again.position = 6
    assert torch.equal(again.take(9), first[6:15])


@pytest.mark.parametrize(("p", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_captions_are_dropped_with_their_probability(p: float, share: float) -> None:
    data = TinyData()
    batch = data.batch(torch.zeros(400, dtype=torch.long), torch.Generator())
    dropped = drop_captions(batch, data.unconditional(), p, torch.Generator().manual_seed(0))
    gone = [(v == 0).flatten(1).all(1) for v in dropped.conditioning.values()]
    assert torch.equal(gone[0], gone[1])
    # Standard deviation at p = 1/4 and 400 samples: 0.022.
    assert abs(gone[0].double().mean().item() - share) < 0.08
    assert torch.equal(dropped.latents, batch.latents)


def test_the_straight_path_and_its_velocity() -> None:
    clean, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.3, 1.0])
    x = interpolate(clean, noise, t)
    assert torch.equal(x[0], clean[0])
    assert torch.equal(x[2], noise[2])
    ahead = interpolate(clean, noise, t + 1e-2)
    velocity = (ahead - x) / 1e-2
    # Float32: 1e-7 relative over a step of 1e-2.
    assert denoising_loss(velocity, noise - clean) < 1e-8
    with_variance = torch.cat([velocity, torch.full_like(velocity, 9.0)], dim=1)
    assert denoising_loss(with_variance, noise - clean) < 1e-8


def test_weights_by_time_keep_the_mean_and_favour_the_middle() -> None:
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    density = logit_normal_density(t)
    # A density: the midpoint rule over 4,000 points is good to far better than this.
    assert density.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert density[2000] == density.max() or density[1999] == density.max()
    ours = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    theirs = torch.zeros_like(ours)
    weights = torch.tensor([0.0, 2.0, 1.0])
    each = [squared_error(ours[i : i + 1], theirs[i : i + 1]).item() for i in range(3)]
    assert squared_error(ours, theirs).item() == pytest.approx(sum(each) / 3, rel=1e-5)
    weighted = squared_error(ours, theirs, weights).item()
    assert weighted == pytest.approx((2 * each[1] + each[2]) / 3, rel=1e-5)


def test_distillation_sees_direction_not_scale() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert distillation_loss([x], [3.0 * x + 1.0]) < 1e-8
    # Opposite features: normalised, their distance is 2 per element.
    assert distillation_loss([x], [-x]).item() == pytest.approx(4.0, rel=1e-3)
    with pytest.raises(ValueError, match="as many teacher as student layers"):
        distillation_loss([x], [])


@pytest.mark.parametrize("backbone", ["full", "lora", "frozen"])
def test_training_starts_from_an_adapter(tmp_path: Path, backbone: Any) -> None:
    first = train(recipe(tmp_path / "a", backbone=backbone), tiny.sd3(), TinyData(), resume=False)
    config = recipe(tmp_path / "b", backbone=backbone, start=first, keep_ratio=0.6)
    trainer = Trainer(config, tiny.sd3(), TinyData())
    served, given = tiny.sd3(), shiva_dit.ShivaAdapter.from_pretrained(first)
    shiva_dit.apply(served, first, keep_ratio=0.6)
    student, inputs = trainer.student, tiny.inputs()
    for name, value in student.adapter.state_dict().items():
        assert torch.equal(value, given.state_dict()[name])
    ours, theirs = attachment_of(student.model), attachment_of(served)
    assert ours is not None
    assert theirs is not None
    ours.counts.use(theirs.schedule)
    with torch.no_grad():
        assert torch.allclose(tiny.run(student.model, inputs), tiny.run(served, inputs), atol=1e-5)
        taught = tiny.run(student.teacher, inputs) if backbone == "full" else None
    if taught is not None:  # by the model as it was given
        assert torch.equal(taught, tiny.run(tiny.sd3(), inputs))
    trainer.train_step()
    trainer.save()
    other = train(
        recipe(tmp_path / "c", backbone=backbone, seed=1), tiny.sd3(), TinyData(), resume=False
    )
    changed = dataclasses.replace(config, start=other)
    with pytest.raises(ValueError, match="other values of start"):
        Trainer(changed, tiny.sd3(), TinyData()).resume()
    shutil.copytree(other, first, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="another adapter to start from"):
        Trainer(config, tiny.sd3(), TinyData()).resume()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_start_for_another_model_is_moved_to_this_one(tmp_path: Path, kind: str) -> None:
    first = train(recipe(tmp_path / "a", backbone="full"), tiny.sd3(), TinyData(), resume=False)
    config = recipe(tmp_path / "b", backbone="full", start=first)
    with pytest.raises(ValueError, match=r"another model than this one: give .* start_base"):
        Trainer(config, tiny.sd3(seed=5), TinyData())
    tiny.sd3().save_pretrained(tmp_path / "base", max_shard_size="100KB")
    base = tmp_path / "base"
    assert len(list(base.glob("*.safetensors"))) > 1
    if kind == "file":
        base = tmp_path / "base.safetensors"
        save_file(tiny.sd3().state_dict(), base)
    trainer = Trainer(dataclasses.replace(config, start_base=base), tiny.sd3(seed=5), TinyData())
    then, now = dict(tiny.sd3().named_parameters()), dict(tiny.sd3(seed=5).named_parameters())
    given = shiva_dit.ShivaAdapter.from_pretrained(first).backbone_weights
    student = dict(trainer.student.model.named_parameters())
    for name, tuned in given.items():
        assert torch.allclose(student[name] - now[name], tuned - then[name], atol=1e-6)
    assert any(not torch.equal(given[name], then[name]) for name in given)
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    for bad, said in (("no", "there is no safetensors file"), ("other.safetensors", "has no ")):
        with pytest.raises(ValueError, match=f"start_base: .*{said}"):
            Trainer(dataclasses.replace(config, start_base=tmp_path / bad), tiny.sd3(), TinyData())
    with pytest.raises(ValueError, match="start_base is the model of an adapter to start from"):
        recipe(tmp_path / "b", start_base=base)


def test_an_adapter_for_one_target_starts_one_for_many_and_back(tmp_path: Path) -> None:
    """What the policy learns of targets starts at zero, moves, and is left out again."""
    first = train(recipe(tmp_path / "a"), tiny.sd3(), TinyData(), resume=False)
    many = dataclasses.replace(recipe(tmp_path).policy, target_range=(0.3, 0.7))
    rates = dataclasses.replace(recipe(tmp_path).optimizer, policy=1e-2)
    config = recipe(tmp_path / "b", start=first, policy=many, optimizer=rates)
    second = train(config, tiny.sd3(), TinyData(), resume=False)
    adapter = shiva_dit.ShivaAdapter.from_pretrained(second)
    assert adapter.trained_for == (0.3, 0.7)
    moved = adapter.state_dict()["policy.layer_by_target"]
    assert float(moved.abs().max()) > 1e-4
    for keep in (0.3, 0.6):
        served = attachment_of(shiva_dit.apply(tiny.sd3(), second, keep_ratio=keep))
        assert served is not None
        assert served.schedule.mean_keep_ratio == pytest.approx(keep, abs=1e-6)
    back = Trainer(recipe(tmp_path / "c", start=second), tiny.sd3(), TinyData())
    assert "policy.layer_by_target" not in back.student.adapter.state_dict()
    back.close()


def test_an_adapter_of_another_shape_is_no_start(tmp_path: Path) -> None:
    first = train(recipe(tmp_path / "a"), tiny.sd3(), TinyData(), resume=False)
    for change in ({"backbone": "lora"}, {"router": RouterConfig(hidden=8)}):
        with pytest.raises(ValueError, match="the recipe asks for"):
            Trainer(recipe(tmp_path / "b", start=first, **change), tiny.sd3(), TinyData())
    with pytest.raises(ValueError, match="has none"):
        recipe(tmp_path / "b", start=first, method="random")
    with pytest.raises(ValueError, match="there is no folder no/adapter: train that"):
        Trainer(recipe(tmp_path / "b", start=Path("no/adapter")), tiny.sd3(), TinyData())


@pytest.mark.parametrize("backbone", ["full", "lora", "dora"])
def test_full_weight_decay_is_the_model_as_it_was_given(tmp_path: Path, backbone: Any) -> None:
    """Whatever was tuned: a rate times a decay of 1 pulls all the way."""
    first = train(recipe(tmp_path / "a", backbone=backbone), tiny.sd3(), TinyData(), resume=False)
    strong = OptimizerConfig(backbone=1e-3, weight_decay=1e3, warmup_steps=1, router=0.0)
    config = recipe(
        tmp_path / "b",
        backbone=backbone,
        start=first,
        optimizer=strong,
        warmup_steps=0,
        policy_steps=0,
        joint_steps=2,
    )
    trainer = Trainer(config, tiny.sd3(), TinyData())
    student, inputs, bare = trainer.student, tiny.inputs(), tiny.run(tiny.sd3(), tiny.inputs())

    def off() -> float:
        student.attachment.enabled = False  # all tokens, tuned weights
        found = tiny.run(student.model, inputs)
        student.attachment.enabled = True
        return float((found - bare).norm() / bare.norm())

    before = off()
    trainer.optimization.start("joint", 1, 2)
    trainer.optimization._decay()
    assert off() < 1e-5 < before / 10
    trainer.close()
