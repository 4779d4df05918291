"""What a run will need of memory, counted, against what a run has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shiva_dit.cli import main
from shiva_dit.training.checkpoint import TENSORS_FILE
from shiva_dit.training.data import Batch
from shiva_dit.training.live import LiveBytes, bytes_alive
from shiva_dit.training.memory import Needs, needs, shapes_of
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import Trainer
from tests import tiny
from tests.test_training import TinyData, recipe

DIGITS = str(Path(__file__).parents[1] / "recipes/digits.toml")
FURTHER: list[dict[str, Any]] = [
    {"backbone": "lora"},
    {"backbone": "dora", "gradient_checkpointing": True},
    {"backbone": "full", "guidance": (1.0, 7.0)},
    {"backbone": "full", "gradient_checkpointing": True, "micro_batches": 1},
    {"backbone": "frozen"},
]
CASES: list[Any] = [
    {"backbone": "lora", "gradient_checkpointing": True, "guidance": (1.0, 7.0)},
    {"backbone": "dora", "guidance": (1.0, 7.0)},
    {"backbone": "frozen", "gradient_checkpointing": True, "precision": "bfloat16"},
    *(pytest.param(case, marks=pytest.mark.matrix) for case in FURTHER),
    pytest.param({"backbone": "lora", "base_dtype": "int8"}, marks=pytest.mark.bits),
    pytest.param(
        {"backbone": "dora", "base_dtype": "nf4", "gradient_checkpointing": True},
        marks=pytest.mark.bits,
    ),
]


def counted(config: TrainConfig, processes: int = 1) -> Needs:
    return needs(config, shapes_of(tiny.sd3(num_layers=2), TinyData(), None), processes=processes)


def seen(config: TrainConfig) -> int:
    """Bytes alive at most in a step of the joint stage, on a CPU."""
    data = TinyData()
    before = bytes_alive()
    trainer = Trainer(config, tiny.sd3(num_layers=2), data)
    trainer.student.model.train()
    trainer.step = config.warmup_steps + config.policy_steps
    trainer.train_step()
    start = bytes_alive() - before
    with LiveBytes() as live:
        trainer.train_step()
    trainer.close()
    return start + live.most


@pytest.mark.parametrize("changes", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_memory_is_counted_before_a_run_as_it_is_in_it(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = recipe(tmp_path, **changes)
    found = counted(config)
    assert found.total == pytest.approx(seen(config), rel=0.15)
    assert found.activations <= found.activations_dense


def test_the_parts_are_what_shapes_say(tmp_path: Path) -> None:
    config = recipe(tmp_path, optimizer=replace(recipe(tmp_path).optimizer, eight_bit=False))
    found = counted(config)
    model = tiny.sd3(num_layers=2)
    count = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    trainer = Trainer(config, model, TinyData())
    parts = trainer.optimization.parts
    learned = {part: sum(p.numel() for p in held.values()) for part, held in parts.items()}
    trainer.run(show_progress=False)
    saved = (trainer.last_good or Path()) / TENSORS_FILE
    trainer.close()
    assert found.weights == {"float32": 4 * count + buffers}
    assert found.teacher == 4 * count + buffers
    assert found.trained == sum(learned.values())
    assert found.averages == 4 * sum(learned.values())
    assert found.moments == pytest.approx(8 * sum(learned.values()), rel=1e-3)  # and steps
    assert found.gradients == 12 * (learned["backbone"] + learned["router"])
    assert saved.stat().st_size == pytest.approx(found.checkpoint, rel=0.05)  # and a header


@pytest.mark.bits
def test_checkpointing_and_narrow_bases_and_moments_take_less(tmp_path: Path) -> None:
    plain = counted(recipe(tmp_path))
    less = counted(recipe(tmp_path, gradient_checkpointing=True))
    # One of two blocks is alive at a time, beside what lies outside blocks: 0.63 was measured.
    assert less.activations < 0.7 * plain.activations
    assert less.weights == plain.weights
    narrow = replace(recipe(tmp_path).optimizer, eight_bit=True)
    few = counted(recipe(tmp_path, optimizer=narrow))
    backbone = sum(p.numel() for p in tiny.sd3(num_layers=2).parameters())
    assert plain.moments - few.moments > 0.5 * 6 * backbone  # small tensors stay as they are
    one, two = (
        counted(recipe(tmp_path, optimizer=narrow, shard=True), processes=count) for count in (1, 2)
    )
    routers = 8 * (plain.trained - backbone)  # each has all of these
    assert two.moments - routers == pytest.approx((one.moments - routers) / 2, abs=1)


def test_data_may_look_at_what_it_reads(tmp_path: Path) -> None:
    class Looking(TinyData):
        def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
            chosen = torch.tensor([index for index in indices.tolist() if index < 12])
            return super().batch(chosen[torch.nonzero(chosen < 12)[:, 0]], generator)

    config, model = recipe(tmp_path), tiny.sd3(num_layers=2)
    assert needs(config, shapes_of(model, Looking(), None)) == counted(config)


class Mixed(TinyData):
    """Pictures of two shapes; the larger ones come last."""

    def groups(self) -> list[int]:
        return [0] * 10 + [1] * (len(self) - 10)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        side = tiny.LATENT if int(indices[0]) >= 10 else tiny.LATENT // 2
        found = super().batch(indices, generator)
        return replace(found, latents=found.latents[..., :side, :side])


def test_a_run_is_counted_by_its_largest_pictures(tmp_path: Path) -> None:
    config, model = recipe(tmp_path), tiny.sd3(num_layers=2)
    mixed = needs(config, shapes_of(model, Mixed(), None))
    assert mixed.activations == counted(config).activations


def test_weights_that_are_shared_are_counted_by_shares(tmp_path: Path) -> None:
    config = recipe(tmp_path, micro_batches=4)
    whole, apart = counted(config), counted(replace(config, shard=True), processes=4)
    assert apart.teacher == whole.teacher - whole.teacher // 4 * 4 + whole.teacher // 4
    assert apart.adapter == whole.adapter
    assert sum(apart.weights.values()) == pytest.approx(sum(whole.weights.values()) / 4, abs=8)
    assert apart.gathered > 0
    assert counted(replace(config, shard=True)) == whole  # alone


def test_the_command_says_it_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", DIGITS, f"out={out}", "micro_batches=4", "--plan"]
    assert main([*words, "--processes", "2"]) == 0
    said = capsys.readouterr().out
    assert "Memory, each of 2 processes; 3,650,759 weights are trained:" in said
    assert "the model's weights               13.2 MiB (float32 13.2 MiB)" in said
    assert "at most at once" in said
    assert not out.exists()
    assert main([*words, "method=random"]) == 2
    assert "method 'random' is a control and gives no adapter" in capsys.readouterr().err
    assert main([*words, "--processes", "8"]) == 2
    assert "micro_batches must be at least 8, their number, got 4" in capsys.readouterr().err
    assert main([*words, "shard=true", "--processes", "3"]) == 2
    assert "micro_batches must be a multiple of 3" in capsys.readouterr().err
    assert main(["train", DIGITS.replace("digits", "sd35"), "--plan"]) == 2  # not of the digits
    assert "names no task: set task=..., or give --data" in capsys.readouterr().err
    assert main([*words[:-1], "--processes", "2"]) == 2
    assert "--processes is for --plan" in capsys.readouterr().err
