"""One adapter for a range of keep ratios: joined, between its neighbours, saved, refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shiva_dit
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.cli.command_line import main
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import attachment_of
from shiva_dit.saved_folder import CONFIG_FILE
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.start import read_start
from tests import tiny
from tests.test_adapter import same


def one(keep_ratio: float, backbone: str = "full", seed: int = 0, **options: Any) -> ShivaAdapter:
    """An adapter as if trained for a keep ratio from one start with others."""
    config = {"backbone": backbone, "lora_rank": tiny.LORA_RANK, "keep_ratio": keep_ratio}
    made = tiny.adapter(tiny.sd3(), **config, **options)
    tiny.randomize(made.router, seed=seed + 1, std=1.0)
    tiny.randomize(made.policy, seed=seed + 2)
    made.schedule = made.policy.schedule(keep_ratio, made.config.num_bins)
    weights, _ = tiny.tuned(backbone)
    generator = torch.Generator().manual_seed(seed)
    made.backbone_weights = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in weights.items()
    }
    made.training_record = {"backbone": {"sha256": "of the same model"}}
    return made


def three(backbone: str = "full") -> tuple[ShivaAdapter, ...]:
    """For 0.4, what is taken by default, 0.3 and 0.8."""
    return one(0.4, backbone, seed=1), one(0.3, backbone, seed=2), one(0.8, backbone, seed=3)


@pytest.mark.parametrize("backbone", ["frozen", "lora", "dora", "full"])
def test_at_what_was_trained_it_is_that_adapter(backbone: str) -> None:
    adapters = three(backbone)
    joined = ShivaAdapter.of_budgets(*adapters)
    assert same(joined, adapters[0])
    for adapter in adapters:
        assert same(joined.at(adapter.config.keep_ratio), adapter)
        assert not joined.at(adapter.config.keep_ratio).budgets
    assert same(joined.at(0.1), adapters[1])
    assert same(joined.at(1.0), adapters[2])
    assert joined.trained_for == (0.3, 0.8)
    assert adapters[0].parts is None


def test_between_two_every_weight_lies_on_their_line() -> None:
    low, high = one(0.4, seed=1), one(0.8, seed=3)
    made = ShivaAdapter.of_budgets(low, high).at(0.5)
    assert made.config.keep_ratio == 0.5
    assert made.schedule.mean_keep_ratio == pytest.approx(0.5, abs=1e-6)
    a, b = low.state_dict(), high.state_dict()
    for name, value in made.state_dict().items():
        torch.testing.assert_close(value, 0.75 * a[name] + 0.25 * b[name])
    for name, value in made.backbone_weights.items():
        a, b = low.backbone_weights[name], high.backbone_weights[name]
        torch.testing.assert_close(value, (0.75 * a.float() + 0.25 * b.float()).to(a.dtype))


def test_between_two_loras_the_update_lies_on_their_line() -> None:
    low, high = one(0.4, "lora", seed=1), one(0.8, "lora", seed=3)
    made = ShivaAdapter.of_budgets(low, high).at(0.6)
    assert made.config.lora_rank == 2 * low.config.lora_rank

    def updates(adapter: ShivaAdapter) -> dict[str, torch.Tensor]:
        weights = adapter.backbone_weights
        return {
            name: weights[name.replace(".lora_A.", ".lora_B.")] @ value
            for name, value in weights.items()
            if ".lora_A." in name
        }

    a, b = updates(low), updates(high)
    assert a
    for name, value in updates(made).items():
        torch.testing.assert_close(value, 0.5 * a[name] + 0.5 * b[name])


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_apply_takes_the_weights_for_the_ratio_that_is_asked_for(backbone: str) -> None:
    adapters = three(backbone)
    joined = ShivaAdapter.of_budgets(*adapters)

    def made(adapter: ShivaAdapter, **options: Any) -> torch.Tensor:
        model = tiny.sd3()
        shiva_dit.apply(model, adapter, **options)
        return tiny.run(model, tiny.inputs())

    assert torch.equal(made(joined), made(adapters[0]))
    for adapter in adapters:
        ratio = adapter.config.keep_ratio
        assert torch.equal(made(joined, keep_ratio=ratio), made(adapter))
        assert torch.equal(
            made(joined, schedule=Schedule.uniform(ratio, num_blocks=4)),
            made(adapter, schedule=Schedule.uniform(ratio, num_blocks=4)),
        )
    assert torch.equal(made(joined, keep_ratio=0.6), made(joined.at(0.6)))
    assert not torch.equal(made(joined, keep_ratio=0.6), made(joined, keep_ratio=0.8))


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_a_folder_holds_all_of_them(backbone: str, tmp_path: Path) -> None:
    adapters = three(backbone)
    joined = ShivaAdapter.of_budgets(*adapters)
    for folder in ("one", "two"):
        joined.save_pretrained(tmp_path / folder)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert "diffusion_pytorch_model.keep-0.3.safetensors" in files
    read = ShivaAdapter.from_pretrained(tmp_path / "one")
    assert read.trained_for == (0.3, 0.8)
    for adapter in adapters:
        assert same(read.at(adapter.config.keep_ratio), adapter)
    assert same(read.part("keep-0.3"), adapters[1])
    assert same(read.at(0.5), joined.at(0.5))
    assert "For mean keep ratios from 0.3 to 0.8" in files["README.md"].decode()
    adapters[0].save_pretrained(tmp_path / "one")
    assert len(list((tmp_path / "one").iterdir())) == (3 if backbone == "frozen" else 4)


def test_parts_that_are_not_what_they_are_called_are_refused(tmp_path: Path) -> None:
    ShivaAdapter.of_budgets(*three()).save_pretrained(tmp_path)
    parts = json.loads((tmp_path / CONFIG_FILE).read_text())["parts"]
    tiny.edit_config(tmp_path, parts={**parts, "first": "keep-0.5"})
    with pytest.raises(ValueError, match=r"the parts would be keep-0\.4, keep-0\.3, keep-0\.8"):
        ShivaAdapter.from_pretrained(tmp_path)
    others = {
        name: {**said, "config": {**said["config"], "num_bins": 32}}
        for name, said in parts["others"].items()
    }
    tiny.edit_config(tmp_path, parts={**parts, "others": others})
    with pytest.raises(ValueError, match=r"config\.json\.parts: num_bins is 64 in the adapter"):
        ShivaAdapter.from_pretrained(tmp_path)


def test_join_makes_a_folder_that_trainings_start_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = three()
    folders = [str(tmp_path / str(place)) for place in range(3)]
    for adapter, folder in zip(adapters, folders, strict=True):
        adapter.training_record = {}  # of no model that another isn't
        adapter.save_pretrained(folder)
    out = tmp_path / "joined"
    assert main(["join", *folders, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    joined = ShivaAdapter.from_pretrained(out)
    assert same(joined, adapters[0])
    recipe = TrainConfig(out=tmp_path / "run", start=out, keep_ratio=0.5, backbone="full")
    assert same(read_start(recipe, one(0.5), tiny.sd3()), joined.at(0.5))
    assert main(["join", folders[0], "--out", str(out)]) == 2
    assert "one adapter is no range" in capsys.readouterr().err


def test_nothing_lies_between_two_doras() -> None:
    joined = ShivaAdapter.of_budgets(*three("dora"))
    model = tiny.sd3()
    with pytest.raises(ValueError, match=r"nothing lies between two DoRAs: .* such as 0\.4, 0\.8"):
        shiva_dit.apply(model, joined, keep_ratio=0.5)
    assert attachment_of(model) is None


def test_what_cannot_be_joined_is_refused_with_what_differs() -> None:
    first, second = one(0.4), one(0.3)
    of_another_model = one(0.3)
    of_another_model.training_record = {"backbone": {"sha256": "of another"}}
    without_its_weights = one(0.3)
    without_its_weights.backbone_weights.popitem()
    other_law = one(0.3)
    law = replace(first.schedule.law, name="another sampler")
    other_law.schedule = replace(other_law.schedule, law=law)
    wrong = {
        "one adapter is no range": (first,),
        r"two adapters are for keep_ratio 0\.4": (first, one(0.4, seed=5)),
        "num_bins is 64 in the adapter for 0.4 and 32 in the one for 0.3": (
            first,
            one(0.3, num_bins=32),
        ),
        "backbone is full": (first, one(0.3, "lora")),
        "the backbone is of the same model": (first, of_another_model),
        "the shape of .* and None": (first, without_its_weights),
        "the steps' law is": (first, other_law),
        r"trained for a range \(policy.target_range\)": (
            first,
            one(0.3, target_range=(0.2, 0.5)),
        ),
        "the adapter for 0.4 holds several already": (
            ShivaAdapter.of_budgets(first, second),
            one(0.8),
        ),
    }
    for message, adapters in wrong.items():
        with pytest.raises(ValueError, match=message):
            ShivaAdapter.of_budgets(*adapters)
    for ratio in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"keep_ratio must lie in \(0, 1\]"):
            ShivaAdapter.of_budgets(first, second).at(ratio)
