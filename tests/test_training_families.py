"""Training works on every family: on real classes, built small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shiva_dit.core.budget import stratified
from shiva_dit.models.families import MODELS, model_spec
from shiva_dit.models.spec import BESIDE, ModelSpec
from shiva_dit.training.data import Batch, ShuffledIndices
from shiva_dit.training.fit import NUM_BATCHES, fit_updates
from shiva_dit.training.looks import pictures as module
from shiva_dit.training.looks.drawn import Row
from shiva_dit.training.looks.material import Material, Shown
from shiva_dit.training.paths import Diffusion, FlowMatching, path_of
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import OptimizerConfig, PolicyConfig, WatchConfig
from shiva_dit.training.trainer import Trainer
from tests import families
from tests.matrix import sampled

BESIDE_LATENTS = {
    "Kandinsky6Transformer3DModel": 4,
    "MotifVideoTransformer3DModel": 2,
    "WanAnimateTransformer3DModel": 4,
}
"""Those that are built to read more channels than they give, and how many they give."""


class FamilyData:
    """Two samples: what the tiny model of a family is called with elsewhere."""

    def __init__(self, name: str, spec: ModelSpec) -> None:
        given = families.arguments(name)
        for key in spec.times(torch.zeros(1)):
            del given[key]
        for key in spec.by_layer:
            if key in given:
                given[key] = torch.stack(given[key], dim=1)
        for key, value in given.items():
            if isinstance(value, list) and isinstance(value[0], Tensor):
                given[key] = pad_sequence(value, batch_first=True)
        self.latents = given.pop(spec.sample)
        if spec.padded_like is not None:
            self.latents = self.latents[:, -families.TOKENS :]
        self.conditioning = {
            key: value
            for key, value in given.items()
            if isinstance(value, Tensor) and key not in families.SHARED
        }
        if spec.model_class in BESIDE_LATENTS:
            own, axis = BESIDE_LATENTS[spec.model_class], spec.channels or 1
            beside = self.latents.shape[axis] - own
            self.latents, self.conditioning[BESIDE] = self.latents.split((own, beside), axis)
        self.shared = {k: v for k, v in given.items() if k not in self.conditioning}

    def __len__(self) -> int:
        return 2

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        del generator
        conditioning = {name: value[indices] for name, value in self.conditioning.items()}
        return Batch(latents=self.latents[indices], conditioning=conditioning, shared=self.shared)

    def unconditional(self) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.conditioning.items() if name != BESIDE}


def trainer_for(name: str, out: Path, **changes: Any) -> Trainer:
    model = families.made(name)
    spec = model_spec(model)
    config = TrainConfig(
        out=out,
        keep_ratio=0.5,
        warmup_steps=1,
        policy_steps=1,
        joint_steps=2,
        batch_size=2,
        micro_batches=1,
        checkpoint_every=100,
        policy=PolicyConfig(adaptive=True, num_bins=8),
        optimizer=OptimizerConfig(router=1e-2, policy=1e-2, backbone=1e-3, warmup_steps=1),
        **changes,
    )
    scheduler = DDPMScheduler() if spec.learned_by == "diffusion schedule" else None
    return Trainer(config, model, FamilyData(name, spec), scheduler)


@sampled("name")
def test_every_family_is_trained(name: str, tmp_path: Path) -> None:
    """Router, policy and a LoRA on every block move (all weights where there is no LoRA)."""
    backbone = "lora" if hasattr(families.made(name), "add_adapter") else "full"
    trainer = trainer_for(name, tmp_path, backbone=backbone)
    student = trainer.student
    before = {
        part: {key: value.detach().clone() for key, value in parameters.items()}
        for part, parameters in trainer.optimization.parts.items()
    }
    blocks = student.attachment.blocks
    for block in blocks:
        layers = sum(hasattr(module, "lora_A") for module in block.modules())
        # Flux.2's single blocks have two linear layers in all.
        least = 2 if type(block).__name__ == "Flux2SingleTransformerBlock" else 5
        assert layers >= least or backbone == "full"
    trained = trainer.run()
    assert trained.adapter is not None
    for part in ("router", "policy", "backbone"):
        after = trainer.optimization.parts[part]
        assert any(not torch.equal(before[part][key], after[key]) for key in after), part
        assert all(torch.isfinite(value).all() for value in after.values()), part
    trainer.close()


def test_a_lora_where_diffusers_has_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PixArtTransformer2DModel takes no LoRA .* backbone="):
        trainer_for("pixart-sigma", tmp_path, backbone="lora")


def test_time_that_runs_back_turns_the_velocity_round() -> None:
    clean, noise = torch.zeros(2, 3), torch.ones(2, 3)
    t = torch.tensor([0.25, 1.0])
    forth, back = (
        FlowMatching(MODELS["FluxTransformer2DModel"]),
        path_of(MODELS["Lumina2Transformer2DModel"]),
    )
    for path in (forth, back):
        assert torch.equal(path.noisy(clean, noise, t), t[:, None].expand(-1, 3))
        assert torch.equal(path.target(clean, noise, t), torch.ones(2, 3))
    assert forth.timestep(t).tolist() == [0.25, 1.0]
    assert back.timestep(t).tolist() == [0.75, 0.0]
    assert torch.equal(forth.prediction((noise,), 3), noise)
    assert torch.equal(back.prediction(([noise[0], noise[1]],), 3), -noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_diffusion_schedule_is_the_schedulers_own(kind: str) -> None:
    scheduler = CogVideoXDDIMScheduler(prediction_type=kind)
    path = path_of(MODELS["CogVideoXTransformer3DModel"], scheduler)
    assert isinstance(path, Diffusion)
    clean, noise = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 1.0])
    steps = path.timestep(t)
    assert steps.tolist() == [300.0, 999.0]
    noisy = path.noisy(clean, noise, t)
    expected = scheduler.add_noise(clean, noise, steps.long())
    assert (noisy - expected).abs().max() <= 1e-6  # float32, another order of operations
    targets = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": DDPMScheduler.get_velocity(scheduler, clean, noise, steps.long()),
    }
    assert (path.target(clean, noise, t) - targets[kind]).abs().max() <= 1e-6


def test_a_diffusion_model_needs_its_scheduler(tmp_path: Path) -> None:
    model = families.made("pixart-sigma")
    spec = model_spec(model)
    with pytest.raises(ValueError, match=r"pass scheduler=pipe\.scheduler"):
        Trainer(TrainConfig(out=tmp_path), model, FamilyData("pixart-sigma", spec))
    with pytest.raises(ValueError, match="prediction_type must be"):
        path_of(spec, DDPMScheduler(prediction_type="flow_prediction"))


@pytest.mark.parametrize("name", ["pixart-sigma", "dit", "cogvideox", "flux"])
def test_updates_are_fitted_on_the_path_of_the_model(name: str, tmp_path: Path) -> None:
    """Least squares on the very states that the model is trained on, and not on others."""
    spec = model_spec(families.made(name))
    rank = 4
    trainer = trainer_for(name, tmp_path, backbone="full", rejected="low_rank", rejected_rank=rank)
    student, data = trainer.student, trainer.data
    seen: list[Tensor] = []
    path = student.path
    model: Any = student.teacher
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[spec.sample]), with_kwargs=True
    )
    fit_updates(student, data)
    handle.remove()
    generator = torch.Generator().manual_seed(trainer.config.seed)
    order = ShuffledIndices(len(data), trainer.config.seed)
    for found in seen:
        batch = data.batch(order.take(2), generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        t = stratified(2, generator)
        assert torch.equal(found, path.noisy(batch.latents, noise, t))
    assert len(seen) == NUM_BATCHES
    assert isinstance(path, Diffusion) == (spec.learned_by == "diffusion schedule")


class WatchedVideos(FamilyData):
    """Is looked at by its own samples."""

    decode: Any = None

    def watched(self, config: WatchConfig) -> Material:
        del config
        both = self.batch(torch.arange(2), torch.Generator())
        shown = Shown(titles=("one", "other"), batch=both)
        return Material(training=self, held_out=(both,), shown=(shown,), decode=self.decode)


@pytest.mark.parametrize(("name", "decodes"), [("wan", False), ("cogvideox", False), ("wan", True)])
def test_a_look_at_videos_shows_frames_side_by_side(
    name: str, decodes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Row] = []
    monkeypatch.setattr(module, "draw_look", lambda path, rows, title: drawn.extend(rows))
    model = families.made(name)
    spec = model_spec(model)
    data = WatchedVideos(name, spec)
    if decodes:
        data.decode = lambda latents: latents[:, :3].repeat_interleave(2, dim=-2)
    config = TrainConfig(
        out=tmp_path,
        keep_ratio=0.5,
        backbone="frozen",
        warmup_steps=1,
        policy_steps=0,
        joint_steps=0,
        batch_size=2,
        micro_batches=1,
        watch=WatchConfig(every=1, held_out=2, times=2, steps=2),
    )
    trainer = Trainer(
        config, model, data, DDPMScheduler() if spec.learned_by == "diffusion schedule" else None
    )
    trainer.run(show_progress=False)
    latents = trainer.looks.drawing._dense[0].latents
    trainer.close()
    assert [row.title for row in drawn] == ["one", "other"]
    frames = latents.movedim(spec.frame_axis, 1)  # (B, F, C, H, W)
    assert frames.shape[2] == model.config.in_channels
    count, high, wide = frames.shape[1], frames.shape[3], frames.shape[4]
    for row, video in zip(drawn, frames, strict=True):
        assert row.dense.shape == (3, high * (1 + decodes), min(count, 3) * wide)
        assert not torch.equal(row.dense, row.pruned)
        assert row.kept is not None
        assert row.kept.shape == (2, high // 2, min(count, 3) * wide // 2)  # patches of 2 x 2
        assert float(row.kept.mean()) == pytest.approx(0.5, abs=0.1)
        assert len(row.kept.unique()) > 1
        last = row.dense[..., -wide:]
        if decodes:
            assert torch.equal(last, video[-1, :3].repeat_interleave(2, dim=-2))
        else:  # scaled channel by channel
            pairs = torch.stack([last[1].flatten(), video[-1, 1].flatten()])
            assert float(torch.corrcoef(pairs)[0, 1]) == pytest.approx(1.0, abs=1e-4)
