"""A base in fewer bits, and Adam's moments in 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import shiva_dit
from shiva_dit.models import base_dtype
from shiva_dit.models.base_dtype import Narrowed
from shiva_dit.training import eight_bit
from shiva_dit.training.checkpoint import TENSORS_FILE
from shiva_dit.training.live import held_bytes
from shiva_dit.training.run import train
from shiva_dit.training.settings import OptimizerConfig
from shiva_dit.training.trainer import Trainer
from tests import tiny
from tests.test_processes import farthest, launched, learned
from tests.test_training import TinyData, recipe

pytestmark = pytest.mark.bits
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.06, "nf4": 0.52}
NARROW = ("bfloat16", "int8", "nf4")
ERROR = {"float32": (0.0, 0.0), "bfloat16": (1e-3, 0.02), "int8": (1e-3, 0.02), "nf4": (0.02, 0.1)}
"""Bounds of a narrowed model's error, relative: bfloat16 rounds to 2^-9, and does so at every
layer; int8 to 1/254 of a row's largest; nf4 to 1/16 about of a block's."""


def _held(layer: torch.nn.Linear) -> int:
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        return held_bytes([layer.weight.data, state.absmax, state.state2.absmax])
    return held_bytes([layer.weight])


def relative(model: Any, wanted: torch.Tensor) -> float:
    inputs = {name: value.to(model.dtype) for name, value in tiny.inputs().items()}
    return float((tiny.run(model, inputs).float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_a_base_in_fewer_bits_does_about_the_same_and_is_given_back(dtype: str) -> None:
    model = tiny.sd3()
    wanted, marks = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    narrowed = Narrowed(model, dtype)
    low, high = ERROR[dtype]
    assert low <= relative(model, wanted) <= high
    inside = [m for m in model.transformer_blocks.modules() if isinstance(m, torch.nn.Linear)]
    held = sum(_held(layer) for layer in inside) / sum(
        m.in_features * m.out_features for m in inside
    )
    assert held == pytest.approx(BYTES[dtype], rel=0.12)  # and scales, which rows of 32 show
    narrowed.give_back()
    assert torch.equal(tiny.run(model, tiny.inputs()), wanted)
    assert tiny.footprint(model) == marks


@pytest.mark.parametrize("backbone", ["lora", "dora", "frozen"])
@pytest.mark.parametrize("dtype", NARROW)
def test_training_over_a_narrow_base_gives_an_adapter_for_the_whole_one(
    dtype: str, backbone: str, tmp_path: Path
) -> None:
    model = tiny.sd3()
    marks, state = tiny.footprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    config = recipe(tmp_path, backbone=backbone, base_dtype=dtype)
    folder = train(config, model, TinyData(), resume=False)
    assert tiny.footprint(model) == marks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    adapter = shiva_dit.ShivaAdapter.from_pretrained(folder)
    assert adapter.training_record["backbone"]["trained_as"] == dtype
    assert adapter.training_record["recipe"]["base_dtype"] == dtype
    assert all(value.dtype == torch.float32 for value in adapter.backbone_weights.values())
    shiva_dit.apply(model, folder)
    whole = tiny.run(model, tiny.inputs())
    shiva_dit.remove(model)
    narrowed = Narrowed(model, dtype)
    shiva_dit.apply(model, folder)
    inputs = {name: value.to(model.dtype) for name, value in tiny.inputs().items()}
    near = tiny.run(model, inputs).float()
    assert float((near - whole).norm() / whole.norm()) <= 0.35  # other tokens at borders
    shiva_dit.remove(model)
    narrowed.give_back()
    assert tiny.footprint(model) == marks


def test_a_narrow_base_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    found = {}
    for dtype in ("as_given", "int8"):
        config = recipe(tmp_path / dtype, backbone="lora", base_dtype=dtype)
        trainer = Trainer(config, tiny.sd3(), TinyData())
        trainer.student.model.train()
        found[dtype] = [trainer.train_step()["loss"] for _ in range(config.total_steps)]
        trainer.close()
    assert found["int8"] == pytest.approx(found["as_given"], rel=0.02)
    assert found["int8"] != found["as_given"]


def test_what_is_trained_as_a_whole_is_not_narrowed(tmp_path: Path) -> None:
    for dtype in NARROW:
        with pytest.raises(ValueError, match="must be float32, not base_dtype"):
            recipe(tmp_path, backbone="full", base_dtype=dtype)
    model = tiny.sd3().to(torch.bfloat16)
    trainer = Trainer(recipe(tmp_path, base_dtype="float32"), model, TinyData())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    trainer.close()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_that_is_quantised_already_is_left_alone() -> None:
    model = tiny.sd3()
    Narrowed(model, "int8")
    with pytest.raises(ValueError, match='quantised already: leave base_dtype = "as_given"'):
        Narrowed(model, "int8")


def test_a_library_that_is_missing_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (base_dtype, eight_bit):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for changes, library in (
        ({"base_dtype": "int8"}, "torchao"),
        ({"base_dtype": "nf4"}, "bitsandbytes"),
        ({"optimizer": OptimizerConfig(eight_bit=True)}, "torchao"),
    ):
        config = recipe(tmp_path / "run", backbone="lora", **changes)
        with pytest.raises(ValueError, match=f"needs {library}: pip install {library}"):
            train(config, tiny.sd3(), TinyData(), resume=False)
    assert not (tmp_path / "run").exists()


def eight_bits(out: Path, **changes: Any) -> Any:
    rates = OptimizerConfig(router=1e-2, policy=1e-2, backbone=1e-3, warmup_steps=1, eight_bit=True)
    return recipe(out, **{"backbone": "full", "optimizer": rates, "joint_steps": 4, **changes})


def test_eight_bit_moments_move_weights_as_float32_ones_do(tmp_path: Path) -> None:
    moved = {}
    for bits in (8, 32):
        config = eight_bits(tmp_path)
        if bits == 32:
            config = recipe(tmp_path, joint_steps=4)
        model = tiny.sd3()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = Trainer(config, model, TinyData())
        model.train()
        for _ in range(config.total_steps):
            trainer.train_step()
        moved[bits] = torch.cat(
            [(p.detach() - before[n]).flatten() for n, p in model.named_parameters()]
        )
        held = trainer.optimization.eight_bit
        if held is not None:
            sizes = {
                name: t for name, t in held.tensors().items() if name.endswith("exp_avg.codes")
            }
            assert sizes
            assert {t.dtype for t in sizes.values()} == {torch.uint8}
            # Routers and policy stay float32.
            assert {
                value.dtype
                for state in trainer.optimization.adamw.state.values()
                for value in state.values()
            } == {torch.float32}
        trainer.close()
    cosine = torch.nn.functional.cosine_similarity(moved[8], moved[32], dim=0)
    assert cosine > 0.98
    assert float(moved[8].norm() / moved[32].norm()) == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(moved[8], moved[32])


def test_a_run_with_eight_bit_moments_goes_on_to_the_bit(tmp_path: Path) -> None:
    config = eight_bits(tmp_path / "whole", checkpoint_every=6)
    whole = Trainer(config, tiny.sd3(), TinyData())
    whole.run(show_progress=False)
    wanted = {name: t.clone() for name, t in whole.optimization.tensors().items()}
    whole.close()
    assert any(name.endswith(".codes") for name in wanted)
    (tmp_path / "whole/checkpoints/step-00000008").rename(tmp_path / "last")
    again = Trainer(config, tiny.sd3(), TinyData())
    assert again.resume().name == "step-00000006"
    again.run(show_progress=False)
    found = {name: t.clone() for name, t in again.optimization.tensors().items()}
    again.close()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = Trainer(recipe(tmp_path / "whole", joint_steps=4), tiny.sd3(), TinyData())
    with pytest.raises(ValueError, match=r"other values of optimizer\.eight_bit"):
        other.resume()
    other.close()


@pytest.mark.parametrize("last", [(1, "--shard"), (4, "--shard"), (1,)], ids=str)
def test_processes_share_eight_bit_moments_and_another_number_goes_on(
    last: tuple[Any, ...], shared_eight_bits: Path, tmp_path: Path
) -> None:
    """Killed in the fifth step, they go on from the checkpoint of the third."""
    words = "--backbone", "full", "--eight-bit"
    launched(2, tmp_path, *words, "--shard", "--kill-at", "6", fails=True)
    launched(last[0], tmp_path, *words, *last[1:])
    assert farthest(learned(shared_eight_bits), learned(tmp_path)) <= 1e-7  # measured: 0
    ours, theirs = (
        load_file(out / "checkpoints" / "step-00000008" / TENSORS_FILE)
        for out in (shared_eight_bits, tmp_path)
    )
    assert ours.keys() == theirs.keys()
    codes = [name for name in ours if name.endswith("exp_avg.codes")]
    assert len(codes) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in codes)


@pytest.fixture(scope="module")
def shared_eight_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one process, whose blocks are such as several could share."""
    out = tmp_path_factory.mktemp("shared")
    launched(1, out, "--backbone", "full", "--eight-bit", "--shard")
    return out


def test_blocks_by_rows_are_those_that_a_share_of_the_rows_has() -> None:
    """Torchao's own reach across: 4,608 values in rows of 144 are blocks of 256, or of 144."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(64, 144, generator=generator)
    gradients = torch.randn(3, 64, 144, generator=generator)

    def moved(rows: slice, **how: Any) -> tuple[nn.Parameter, eight_bit.EightBitAdam]:
        parameter = nn.Parameter(value[rows].clone())
        adam = eight_bit.EightBitAdam([parameter], **how)
        adam.rate = 1e-2
        for gradient in gradients:
            parameter.grad = gradient[rows].clone()
            adam.step()
        return parameter, adam

    both, adam = moved(slice(None), by_rows=True)
    halves = [moved(rows, by_rows=True)[0] for rows in (slice(32), slice(32, None))]
    assert torch.equal(torch.cat(halves), both)
    assert adam.tensors()["eight_bit.0.exp_avg.scale"].shape == (64,)
    across, other = moved(slice(None))
    assert other.tensors()["eight_bit.0.exp_avg.scale"].shape == (36,)
    assert not torch.equal(across, both)
    # Moments that lie across rows go on as the same values in float32.
    adam.load(other.tensors())
    held = adam.tensors()
    assert held["eight_bit.0.exp_avg"].dtype == torch.float32
    expected = other.adamw.state[across]["exp_avg"].dequantize()
    assert torch.equal(held["eight_bit.0.exp_avg"], expected)


def test_eight_bit_moments_are_the_backbones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='backbone = "frozen" trains none of it'):
        eight_bits(tmp_path, backbone="frozen")
