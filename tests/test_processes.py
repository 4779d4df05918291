"""Several processes train one adapter: the same as one alone, stopped, killed and gone on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image as images
from safetensors.torch import load_file
from torch import Tensor, nn

import shiva_dit
from shiva_dit.models.sharded import norm_of, sum_by_block
from shiva_dit.training.log import LOG_FILE, read_log
from shiva_dit.training.optimization import PARTS, Optimization
from shiva_dit.training.processes import ALONE, Processes, joined
from shiva_dit.training.settings import OptimizerConfig
from shiva_dit.training.trainer import Trainer
from tests import distributed, ranks, tiny
from tests.test_training import TinyData, recipe


def launched(count: int, out: Path, *options: str, fails: bool = False) -> str:
    """What a run by so many processes printed."""
    return ranks.launched(count, distributed.main, str(out), *options, fails=fails)


def learned(out: Path) -> dict[str, Tensor]:
    adapter = shiva_dit.ShivaAdapter.from_pretrained(out / "adapter")
    return {**adapter.state_dict(), **adapter.backbone_weights}


def looks(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(out / LOG_FILE) if "ratios" in line]


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((value - theirs[name]).abs().max()) for name, value in ours.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, guided and on trajectories as well: all that is drawn by chance."""
    out = tmp_path_factory.mktemp("alone")
    launched(1, out, "--guided")
    return out


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.matrix), 3])
def test_any_number_of_processes_trains_the_same_adapter(
    alone: Path, count: int, tmp_path: Path
) -> None:
    launched(count, tmp_path, "--guided")
    one, many = learned(alone), learned(tmp_path)
    assert farthest(one, many) <= 1e-7
    assert max(float(v.abs().max()) for n, v in one.items() if "lora_B" in n) > 1e-3
    logs = [
        [json.loads(line) for line in (out / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        for out in (alone, tmp_path)
    ]
    assert [line["step"] for line in logs[1]] == list(range(1, 9))
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["guided"] == pytest.approx(theirs["guided"], rel=1e-4)
        assert ours["keep"] == theirs["keep"]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["full", pytest.param("dora", marks=pytest.mark.matrix)])
def test_fifty_steps_by_four_processes_end_where_one_does(backbone: str, tmp_path: Path) -> None:
    options = "--backbone", backbone, "--steps", "50"
    launched(1, tmp_path / "one", *options)
    launched(4, tmp_path / "four", *options)
    assert farthest(learned(tmp_path / "one"), learned(tmp_path / "four")) <= 1e-5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that trains all of a model's weights."""
    out = tmp_path_factory.mktemp("whole")
    launched(1, out, "--backbone", "full")
    return out


@pytest.mark.parametrize(
    "last",
    [(1,), (2, "--shard"), pytest.param((4, "--shard"), marks=pytest.mark.matrix)],
    ids=str,
)
def test_processes_that_share_weights_train_the_same_and_another_number_goes_on(
    whole: Path, last: tuple[Any, ...], tmp_path: Path
) -> None:
    """Killed in the fifth step, it goes on from the checkpoint of the third."""
    words = "--backbone", "full"
    launched(2, tmp_path, *words, "--shard", "--kill-at", "5", fails=True)
    assert not (tmp_path / "adapter").exists()
    launched(last[0], tmp_path, *words, *last[1:])
    assert farthest(learned(whole), learned(tmp_path)) <= 1e-7  # measured: 0
    given = dict(tiny.sd3().named_parameters())
    changes = (v - given[n] for n, v in learned(tmp_path).items() if n in given)
    assert max(float(change.abs().max()) for change in changes) > 1e-4


def test_after_training_a_model_is_whole_again_and_can_be_trained_again(tmp_path: Path) -> None:
    """`distributed.as_it_came` looks at it in each process, here and in all other runs."""
    launched(2, tmp_path, "--backbone", "full", "--shard", "--twice")
    assert farthest(learned(tmp_path), learned(tmp_path / "again")) == 0.0


def test_processes_that_share_weights_draw_the_same_trajectories(tmp_path: Path) -> None:
    """Three of them: in the second turn one process has none to draw, and runs all the same.

    The second is killed, and of the trajectories one is gone: another number draws it again.
    """
    words = "--backbone", "full", "--guided", "--steps", "6"
    launched(1, tmp_path / "one", *words)
    launched(2, tmp_path / "two", *words, "--shard", "--kill-at", "5", fails=True)
    files = sorted((tmp_path / "two" / "trajectories").iterdir())
    assert [path.stem[-5:] for path in files] == ["00000", "00001", "00002"]
    files[1].unlink()
    launched(2, tmp_path / "two", *words, "--shard")
    for path in files:
        ours, theirs = (
            load_file(tmp_path / name / "trajectories" / path.name) for name in ("one", "two")
        )
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"cpu_s"}:
            assert torch.equal(ours[name], theirs[name])
    assert farthest(learned(tmp_path / "one"), learned(tmp_path / "two")) <= 1e-7  # measured: 0


def test_a_share_of_a_tensor_is_updated_as_in_the_whole() -> None:
    """A quarter of 16 values is shorter than a vector of the CPU's."""
    generator = torch.Generator().manual_seed(0)
    value, given = (torch.randn(2, 48, 16, generator=generator) * 0.1).unbind()
    gradient = torch.randn(48, 16, generator=generator) * 1e-4

    def updated(places: slice) -> Tensor:
        names = [str(index) for index in range(48)]
        weights = {
            n: nn.Parameter(row[places].clone()) for n, row in zip(names, value, strict=True)
        }
        untuned = {n: row[places] for n, row in zip(names, given, strict=True)}
        parts = {part: weights if part == "backbone" else {} for part in PARTS}
        config = OptimizerConfig(backbone=1e-3, warmup_steps=1)
        optimization = Optimization(parts, config, untuned, shareable=True)
        for step in range(3):
            optimization.start("joint", step, 10)
            for row, weight in zip(gradient, weights.values(), strict=True):
                weight.grad = row[places] * (1.0 + step)
            optimization.finish(step)
        return torch.stack([*weights.values()]).detach()

    shares = [updated(slice(at, at + 4)) for at in range(0, 16, 4)]
    assert torch.equal(torch.cat(shares, dim=1), updated(slice(None)))


def test_a_norm_is_that_of_float64() -> None:
    """Norms of tensors that are rounded before they are summed miss a third of these."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randn(7, 5, generator=generator)
        assert norm_of(rows.unbind()).item() == rows.double().norm().float().item()


def test_each_block_sums_by_itself_and_is_given_back() -> None:
    """1 + 2^-24 is 1 in float32: only two such summed first are seen."""
    small = 2.0**-24
    blocks = nn.ModuleList(_Twice() for _ in range(2))

    def gradient() -> float:
        shared = torch.ones(1, requires_grad=True)
        ((blocks[0](shared) * small) + blocks[1](shared) * 0.5).sum().backward()
        assert shared.grad is not None
        return shared.grad.item()

    assert gradient() == 1.0
    undo = sum_by_block(blocks)
    assert gradient() == 1.0 + 2 * small
    undo()
    assert gradient() == 1.0
    assert not any(block._forward_pre_hooks for block in blocks)


class _Twice(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value * 1.0 + value * 1.0


@pytest.mark.slow
def test_fifty_steps_by_processes_that_share_weights_end_where_one_does(tmp_path: Path) -> None:
    words = "--backbone", "full", "--steps", "50"
    launched(1, tmp_path / "one", *words)
    launched(2, tmp_path / "two", *words, "--shard")
    # Measured: 0. A bit's difference in the fifth step grows to 1e-3, so all sums must be alike.
    assert farthest(learned(tmp_path / "one"), learned(tmp_path / "two")) <= 1e-5
    last = [
        json.loads((tmp_path / name / LOG_FILE).read_text(encoding="utf-8").splitlines()[-1])
        for name in ("one", "two")
    ]
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=1e-5)
    assert last[0]["keep"] == last[1]["keep"]


def test_a_loss_that_is_none_ends_processes_that_share_weights(tmp_path: Path) -> None:
    said = launched(2, tmp_path, "--backbone", "full", "--shard", "--bad-at", "4", fails=True)
    for rank in (0, 1):
        assert f"rank {rank} says: " in said
        assert f"not finite at step 4 (stage 'joint'); the last good checkpoint: {tmp_path}" in said


def test_processes_that_share_weights_need_as_many_parts_each(tmp_path: Path) -> None:
    config = recipe(tmp_path, micro_batches=4, shard=True)
    with pytest.raises(ValueError, match="micro_batches must be a multiple of 3"):
        Trainer(config, tiny.sd3(), TinyData(), processes=Processes(0, 3))
    with pytest.raises(ValueError, match='shard is for backbone = "full"'):
        recipe(tmp_path, backbone="lora", shard=True)


def test_a_signal_to_one_stops_all_at_the_same_step_and_another_number_goes_on(
    alone: Path, tmp_path: Path
) -> None:
    said = launched(2, tmp_path, "--guided", "--signal-at", "4")
    for rank in (0, 1):
        assert f"rank {rank} stopped: step-00000004" in said
    launched(1, tmp_path, "--guided")
    assert farthest(learned(alone), learned(tmp_path)) <= 1e-6


def test_after_a_kill_of_one_the_run_goes_on_from_the_last_checkpoint(
    alone: Path, tmp_path: Path
) -> None:
    launched(2, tmp_path, "--guided", "--kill-at", "5", fails=True)
    assert not (tmp_path / "adapter").exists()
    launched(4, tmp_path, "--guided")
    assert farthest(learned(alone), learned(tmp_path)) <= 1e-6


def test_a_loss_that_is_none_in_one_ends_all_of_them(tmp_path: Path) -> None:
    said = launched(2, tmp_path, "--bad-at", "4", fails=True)
    for rank in (0, 1):
        assert f"rank {rank} says: " in said
        assert f"not finite at step 4 (stage 'joint'); the last good checkpoint: {tmp_path}" in said


@pytest.mark.parametrize(
    "words",
    [
        ("--guided",),
        pytest.param(("--backbone", "full", "--shard"), marks=pytest.mark.slow),
    ],
    ids=["whole", "shared"],
)
def test_all_look_together_and_stop_together(words: tuple[str, ...], tmp_path: Path) -> None:
    """Two processes share three forwards of a look; what they decide is one decision."""
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        launched(count, out, *words, "--patience", "1", "--steps", "60")
        found.append(json.loads((out / "result.json").read_text(encoding="utf-8")))
        assert {path.name for path in out.iterdir()} >= {"best", "curves.png", "watch"}
    one, many = found
    assert (one["steps"], one["best"]["step"]) == (many["steps"], many["best"]["step"])
    assert one["stopped_early"]
    assert one["steps"] < 60
    assert many["best"]["error"] == pytest.approx(one["best"]["error"], rel=1e-5)
    assert farthest(learned(tmp_path / "1"), learned(tmp_path / "2")) <= 1e-6


def test_looks_change_nothing_where_processes_share_weights(whole: Path, tmp_path: Path) -> None:
    """They measure what one process does that holds all weights, and leave every bit."""
    words = "--backbone", "full", "--look"
    launched(1, tmp_path / "one", *words)
    launched(2, tmp_path / "two", *words, "--shard")
    assert farthest(learned(tmp_path / "one"), learned(whole)) == 0.0
    assert farthest(learned(tmp_path / "two"), learned(whole)) <= 1e-7  # measured: 0
    one, two = (looks(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == [2, 4, 6, 8]
    for line, other in zip(one, two, strict=True):
        assert other["held_out"] == pytest.approx(line["held_out"], rel=1e-5)
        assert other["ratios"] == line["ratios"]
    drawn = {"step-000002.png", "step-000004.png", "step-000006.png", "step-000008.png"}
    assert {path.name for path in (tmp_path / "two" / "watch").iterdir()} == drawn
    for name in drawn:
        pictures = [images.imread(tmp_path / run / "watch" / name) for run in ("one", "two")]
        assert pictures[0].shape == pictures[1].shape
        assert abs(pictures[0] - pictures[1]).mean() < 1e-3


def test_a_look_that_fails_in_one_ends_those_that_share_weights(tmp_path: Path) -> None:
    """The other would wait for it in the middle of a forward; what was saved is there."""
    words = "--backbone", "full", "--shard", "--look", "--no-memory"
    said = launched(2, tmp_path, *words, fails=True)
    assert "OutOfMemoryError: CUDA out of memory" in said
    assert "training goes on" not in said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_look_that_fails_in_one_of_several_that_hold_all_ends_nothing(tmp_path: Path) -> None:
    said = launched(2, tmp_path, "--look", "--no-memory")
    assert "the held-out error failed (OutOfMemoryError: CUDA out of memory)" in said
    assert [("held_out" in line) for line in looks(tmp_path)] == [True, False, True, True]


def test_a_folder_with_another_run_is_refused_once(alone: Path) -> None:
    said = launched(2, alone, "--guided", "--steps", "9", fails=True)
    assert said.count("ValueError: ") == 1


def test_each_process_needs_a_part(tmp_path: Path) -> None:
    config = recipe(tmp_path, micro_batches=2)
    with pytest.raises(ValueError, match="micro_batches must be at least 3, their number, got 2"):
        Trainer(config, tiny.sd3(), TinyData(), processes=Processes(0, 3))


def test_started_by_no_launcher_a_process_is_alone() -> None:
    with joined("cpu") as found:
        assert found == (ALONE, "cpu")
    one = torch.ones(2)
    ALONE.sum([one])
    assert one.tolist() == [1.0, 1.0]
    assert list(Processes(1, 3).mine(7)) == [1, 4]
    assert ALONE.from_first(lambda: "made") == "made"
