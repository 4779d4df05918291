"""A frontier: counts, quality, front, resuming, and what others' refusals leave."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import shiva_dit
from shiva_dit.config import from_dict
from shiva_dit.demo.base import load_backbone, shipped_adapter
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.frontier.caches import CACHES, cached, fresh
from shiva_dit.experiments.frontier.config import REFERENCE, Arm, Frontier, Point, points
from shiva_dit.experiments.frontier.executed import counted
from shiva_dit.experiments.frontier.put import arm_on, refusals
from shiva_dit.experiments.frontier.quality import interval, on_front
from shiva_dit.experiments.frontier.run import run_frontier
from shiva_dit.experiments.frontier.sheet import draw_sheet
from shiva_dit.experiments.frontier.source import TaskSource, source_of
from shiva_dit.experiments.own_pipeline import first_prompts, twin
from shiva_dit.experiments.plots import draw_front
from shiva_dit.experiments.scoring import noise_seed, sample_through
from shiva_dit.experiments.subjects import flops_per_image
from shiva_dit.metrics import LARGEST_PSNR, decibels, squared_errors
from shiva_dit.models.attach import attachment_of
from shiva_dit.report.frontier import budget_rows, frontier_rows, frontier_table
from tests import tiny
from tests.test_folder import pipeline

__all__ = ["pipeline"]

ARMS: dict[str, Any] = {
    "unpruned": {"name": "unpruned", "steps": [1, 3]},
    "ours": {"name": "ours", "adapter": "shipped", "steps": [3]},
    "merging": {"name": "merging", "method": "tomesd", "keep_ratio": 0.75, "steps": [3]},
    "cached": {"name": "cached", "cache": "taylor_seer", "threshold": 2, "steps": [3]},
    "refused": {"name": "refused", "method": "tomesd", "keep_ratio": 0.1, "steps": [3]},
}


def made(**changes: Any) -> Frontier:
    plain: dict[str, Any] = {
        "what": "try",
        "about": "A try.",
        "task": "digits",
        "count": 4,
        "batch": 2,
        "seeds": [0, 1],
        "guidance": [1.0, 4.0],
        "reference_steps": 4,
        "timing": {"batch": 1, "repeats": 1},
        "arms": ARMS,
    }
    return from_dict(Frontier, {**plain, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Frontier, dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("frontier")
    frontier = made()
    return frontier, run_frontier(frontier, out), out


def rows(record: dict[str, Any], guidance: float = 1.0) -> dict[tuple[str, int], dict[str, Any]]:
    front = next(f for f in record["fronts"] if f["guidance"] == guidance)
    return {(row["arm"], row["steps"]): row for row in front["rows"]}


def test_every_point_has_its_flops_and_quality(run: Any) -> None:
    frontier, record, _ = run
    task = load_task("digits")
    backbone = load_backbone(task)
    for guidance, halves in ((1.0, 1), (4.0, 2)):
        found = rows(record, guidance)
        dense = flops_per_image(task, backbone, None, 1, "unipc")
        assert found["unpruned", 3]["flops"] == 3 * halves * dense
        assert found["unpruned", 1]["forwards"] == pytest.approx(1.0)
        assert 1.0 < found["cached", 3]["forwards"] <= 3.0
        assert 2.0 < found["merging", 3]["forwards"] < 3.0
        assert found["unpruned", 3]["psnr"] > found["unpruned", 1]["psnr"]
        low, high = found["ours", 3]["psnr_within"]
        assert low <= found["ours", 3]["psnr"] <= high
        assert len(found["ours", 3]["psnr_by_seed"]) == len(frontier.seeds)
        assert 0.0 <= found["ours", 3]["right_all"] <= 1.0
    shiva_dit.apply(backbone, shipped_adapter(task))
    ours = flops_per_image(task, backbone, attachment_of(backbone), 3, "unipc")
    # Executed is a little less: what all pictures of a call share is computed once.
    assert rows(record)["ours", 3]["flops"] == pytest.approx(ours, rel=2e-3)


def test_what_refuses_is_a_row_with_the_reason(run: Any) -> None:
    _, record, _ = run
    row = rows(record)["refused", 3]
    assert "keep_ratio must lie in" in row["failed"]
    assert "psnr" not in row
    assert any("keep_ratio must lie in" in cell for cell in frontier_rows(record, 1.0)[-1])


def test_times_are_shares_of_the_reference_arm(run: Any) -> None:
    _, record, _ = run
    found = rows(record)
    assert found["unpruned", 3]["times"]["eager"]["share"] == 1.0
    assert found["unpruned", 1]["times"]["eager"]["share"] < 1.0
    assert found["ours", 3]["times"]["eager"]["seconds"] > 0


def test_a_finished_frontier_runs_nothing_again(run: Any, monkeypatch: Any) -> None:
    frontier, record, out = run

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(TaskSource, "run", never)
    again = run_frontier(frontier, out)
    assert again["fronts"] == record["fronts"]


def test_points_of_other_settings_are_refused(run: Any) -> None:
    _, _, out = run
    with pytest.raises(ValueError, match="other settings"):
        run_frontier(made(batch=4), out)


def test_a_changed_adapter_is_run_anew(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    task = load_task("digits")
    adapter = shiva_dit.ShivaAdapter.from_pretrained(shipped_adapter(task))
    adapter.save_pretrained(folder)
    arms = {
        "unpruned": {"name": "unpruned", "steps": [1]},
        "ours": {"name": "ours", "adapter": str(folder), "steps": [1]},
    }
    frontier = made(arms=arms, seeds=[0], guidance=[1.0], timing={"repeats": 0})
    first = rows(run_frontier(frontier, tmp_path / "out"))["ours", 1]["psnr"]
    with torch.no_grad():
        for value in adapter.backbone_weights.values():
            value.mul_(1.05)
    adapter.save_pretrained(folder)
    second = rows(run_frontier(frontier, tmp_path / "out"))["ours", 1]["psnr"]
    assert first != second


def test_what_was_refused_is_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    """A library that was missing may have been installed since."""
    arms = {"unpruned": ARMS["unpruned"], "cached": ARMS["cached"]}
    frontier = made(arms=arms, seeds=[0], guidance=[1.0], timing={"batch": 1, "repeats": 1})

    def missing(*_: Any) -> None:
        raise ImportError("no such library")

    with monkeypatch.context() as patch:
        patch.setitem(CACHES, "taylor_seer", missing)
        first = rows(run_frontier(frontier, tmp_path))["cached", 3]
    assert first["failed"] == "ImportError: no such library"
    second = rows(run_frontier(frontier, tmp_path))["cached", 3]
    assert second["psnr"] > 0
    assert second["times"]["eager"]["share"] > 0


@pytest.mark.parametrize(
    ("arm", "error", "is_result"),
    [
        ("ours", ValueError, False),
        ("ours", FloatingPointError, True),
        ("merging", ValueError, True),
        ("merging", TypeError, False),
        ("cached", TypeError, True),
    ],
)
def test_faults_of_ours_are_no_results(arm: str, error: type[Exception], is_result: bool) -> None:
    made_arm = from_dict(Arm, ARMS[arm])
    assert issubclass(error, refusals(made_arm)) == is_result
    assert issubclass(error, refusals(made_arm, compiled=True))


def test_a_missing_adapter_is_said_before_anything_runs(tmp_path: Path) -> None:
    arms = {"unpruned": ARMS["unpruned"], "mine": {"name": "mine", "adapter": "no/such-{seed}"}}
    with pytest.raises(ValueError, match=r"arms\.mine: there is no folder no/such-0"):
        run_frontier(made(arms=arms), tmp_path)
    assert not list(tmp_path.iterdir())


def test_plot_sheet_and_tables_are_made_of_the_record(run: Any, tmp_path: Path) -> None:
    frontier, record, out = run
    draw_front(record, tmp_path / "front.png")
    draw_sheet(frontier, record, out, tmp_path / "sheet.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    plain = json.loads(json.dumps(record))
    table = frontier_table(plain)
    assert "**No guidance**" in table
    assert "**Guidance 4**" in table
    budgets = budget_rows(plain, 1.0)
    assert budgets[1][0] == "1"
    assert budgets[-1][1].startswith("unpruned, 3 steps")


def test_squared_errors_are_of_what_a_picture_shows() -> None:
    images = torch.tensor([[[[3.0]]], [[[0.5]]]])
    truth = torch.tensor([[[[1.0]]], [[[0.3]]]])
    errors = squared_errors(images, truth)
    assert errors.tolist() == pytest.approx([0.0, 0.04])
    assert decibels(errors) == pytest.approx(10 * math.log10(4 / 0.02))
    assert decibels(torch.zeros(2)) == LARGEST_PSNR


def test_an_interval_holds_the_mean_and_narrows_with_more_pictures() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))

    def width(count: int) -> float:
        low, high = interval(lambda chosen: float(values[:count][chosen].mean()), count)
        assert low < float(values[:count].mean()) < high
        return high - low

    assert width(400) < 0.4 * width(25)
    assert width(400) == pytest.approx(2 * 1.96 / 20, rel=0.3)


def test_the_front_is_what_nothing_beats() -> None:
    costs = [1.0, 2.0, 2.0, 3.0, 0.5]
    values = [10.0, 20.0, 20.0, 18.0, 1.0]
    assert on_front(costs, values) == [True, True, True, False, True]


@pytest.mark.parametrize("kind", [k for k in CACHES if k != "dbcache"])
def test_a_cache_saves_forwards_and_leaves_the_model_as_it_was(kind: Any) -> None:
    """Every threshold of 0 or so computes all steps: then nothing changes."""
    source = source_of(made(guidance=[1.0]))
    steps = 6

    def pictures(threshold: float) -> tuple[torch.Tensor, float]:
        arm = Arm(name="cache", cache=kind, threshold=threshold, steps=(steps,))
        point = Point(key="cache", arm=arm, steps=steps, guidance=1.0, seed=0)
        with arm_on(point, source) as (pipe, call), counted(pipe.transformer) as counts:
            images = call(2, 0)
            again = call(2, 0)
        assert torch.equal(images, again)  # nothing of a run is left for the next
        assert not any(_hooks(pipe.transformer))
        return images, sum(counts) / 2

    plain = Point(key="plain", arm=Arm(name="p", steps=(steps,)), steps=steps, guidance=1.0, seed=0)
    with arm_on(plain, source) as (pipe, call), counted(pipe.transformer) as counts:
        images = call(2, 0)
    whole = sum(counts)
    never, always = (1.0, 3.0) if kind == "taylor_seer" else (1e-9, 1e9)
    exact, cost = pictures(never)
    assert cost == whole
    assert torch.equal(exact, images)
    rough, cost = pictures(always)
    assert cost < 0.95 * whole
    assert not torch.equal(rough, images)


def test_whole_steps_cost_a_forward_each_and_come_nearer() -> None:
    source, steps = source_of(made(guidance=[1.0])), 6
    found = {}
    for whole in (0, 1, 2, steps):
        arm = Arm(name="x", adapter="shipped", whole_steps=whole, half_life=1e6, steps=(steps,))
        point = Point(key="x", arm=arm, steps=steps, guidance=1.0, seed=0)
        with arm_on(point, source) as (pipe, call), counted(pipe.transformer) as counts:
            found[whole] = call(4, 0), sum(counts)
    truth, dense = found[steps]
    costs = [cost for _, cost in found.values()]
    assert costs[1] - costs[0] == pytest.approx(dense / steps, rel=1e-3)
    assert costs[2] - costs[1] == pytest.approx(dense / steps, rel=1e-3)
    errors = [float((images - truth).square().mean()) for images, _ in found.values()]
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.3 * errors[2] > 0 == errors[3]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"whole_steps": -1}, "whole_steps must be at least 0"),
        ({"whole_steps": 1}, "for an adapter or a method"),
        ({"whole_steps": 1, "adapter": "x", "cache": "mag_cache"}, "without a cache"),
        ({"adapter": "x", "half_life": 0.0}, "half_life must be positive"),
    ],
)
def test_whole_steps_that_make_no_sense_are_refused(changes: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Arm(name="x", **changes)


def _hooks(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        yield from () if registry is None else registry.hooks


def test_a_cache_that_is_not_installed_says_how(monkeypatch: Any) -> None:
    monkeypatch.setattr("shiva_dit.experiments.frontier.caches.find_spec", lambda name: None)
    with (
        pytest.raises(ValueError, match="pip install cache-dit"),
        cached(None, "dbcache", 0.1, 2, lambda: None),
    ):
        pass


def test_fresh_names_the_run_also_where_the_pipeline_doesnt() -> None:
    model = tiny.sd3()
    with fresh(model, "mag_cache"):
        pass
    tiny.run(model, tiny.inputs())


def test_a_pipeline_of_ones_own_is_held_against_itself(pipeline: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\n\na circle\n", encoding="utf-8")
    arms = {
        "unpruned": {"name": "unpruned", "steps": [2]},
        "own": {"name": "own steps", "steps": [2], "sampler": "euler_diffusers"},
        "merging": {"name": "merging", "method": "tomesd", "keep_ratio": 0.5, "steps": [2]},
    }
    frontier = made(
        task=None,
        pipeline=str(pipeline),
        prompts=str(prompts),
        size=[32, 32],
        count=2,
        seeds=[0],
        guidance=[4.0],
        arms=arms,
    )
    record = run_frontier(frontier, tmp_path / "out")
    found = rows(record, 4.0)
    assert found["unpruned", 2]["forwards"] == pytest.approx(2.0)
    assert "frechet" not in found["unpruned", 2]
    assert "floor" not in record
    draw_sheet(frontier, record, tmp_path / "out", tmp_path / "sheet.png")
    prompts.write_text("a star\na square\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other settings"):
        run_frontier(frontier, tmp_path / "out")
    with pytest.raises(ValueError, match="has 2 prompts"):
        first_prompts(prompts, 3)


def saved_lora(folder: Path) -> Path:
    model: Any = load_backbone(load_task("digits"))
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers: dict[str, Any] = get_peft_model_state_dict(model)
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_lora_lies_under_every_arm_and_the_truth(tmp_path: Path, kind: str) -> None:
    lora = saved_lora(tmp_path)
    if kind == "file":
        (lora,) = lora.glob("*.safetensors")
    plain, styled = source_of(made()), source_of(made(lora=str(lora)))
    assert plain.identity != styled.identity

    def pictures(source: Any, arm: Arm) -> torch.Tensor:
        point = Point(key="x", arm=arm, steps=2, guidance=1.0, seed=0)
        with arm_on(point, source) as (pipe, run):
            assert len(pipe.get_list_adapters()) == (source is styled)
            return run(2, 0)

    for arm in (Arm(name="unpruned"), Arm(name="ours", adapter="shipped")):
        assert float((pictures(plain, arm) - pictures(styled, arm)).abs().max()) > 1e-2
    by_hand = load_task("digits").pipeline(load_backbone(load_task("digits")))
    by_hand.load_lora_weights(tmp_path)
    images = sample_through(
        load_task("digits"),
        by_hand,
        2,
        seed=noise_seed(0),
        start=0,
        num_steps=2,
        sampler="unipc",
        guidance=1.0,
    )
    assert torch.equal(images, pictures(styled, Arm(name="unpruned")))


def test_what_is_no_lora_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name, said in (("none", "there is no file or folder"), ("other", "can't load")):
        with pytest.raises(ValueError, match=f"lora: .*{said}"):
            run_frontier(made(lora=str(tmp_path / name)), tmp_path / "out")


def test_a_tasks_pictures_may_have_another_size(tmp_path: Path) -> None:
    """They are held against the truth as they are, and judged in the judge's size."""
    arms = {name: ARMS[name] for name in ("unpruned", "ours")}
    frontier = made(size=[12, 16], arms=arms, guidance=[1.0], timing={"repeats": 0})
    record = run_frontier(frontier, tmp_path)
    file = tmp_path / "points" / "ours-3-g1-0.safetensors"
    assert load_file(file)["images"].shape == (4, 1, 12, 16)
    for row in rows(record).values():
        assert row["psnr"] > 5
        assert 0 <= row["right_all"] <= 1


def test_twins_share_weights_only_where_they_may() -> None:
    model = tiny.sd3()
    shared, own = twin(model, own_weights=False), twin(model, own_weights=True)
    weight = model.proj_out.weight
    assert shared.proj_out.weight.data_ptr() == weight.data_ptr()
    assert own.proj_out.weight.data_ptr() != weight.data_ptr()
    assert torch.equal(own.proj_out.weight, weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": None}, "of a task or of a pipeline"),
        ({"pipeline": "x"}, "of a task or of a pipeline"),
        ({"prompts": "x.txt"}, "pipeline and prompts"),
        (
            {"task": None, "pipeline": "x", "prompts": "x", "count": 2, "timing": {"batch": 3}},
            "timing.batch must be at most count",
        ),
        ({"reference": "nobody"}, "no arm 'nobody'"),
        ({"guidance": [0.5]}, "guidance must be"),
        ({"arms": {"unpruned": {"name": "x", "method": "random"}}}, "no method without training"),
        ({"arms": {"unpruned": {"name": "x", "run_at": 0.5}}}, "run_at is for an adapter"),
        ({"arms": {"unpruned": {"name": "x", "cache": "mag_cache", "threshold": 0}}}, "threshold"),
        ({"arms": {"unpruned": {"name": "x", "steps": []}}}, "steps must be"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**changes)


def test_the_truth_comes_first_for_each_guidance_and_seed() -> None:
    found = points(made())
    assert [p.key for p in found[:2]] == [REFERENCE, "unpruned"]
    assert sum(p.key == REFERENCE for p in found) == 4
    assert len({p.name for p in found}) == len(found)
