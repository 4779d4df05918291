"""Comparisons: arms merge into recipes, finished runs are kept, foreign ones refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.cli import main
from shiva_dit.config import load_recipe
from shiva_dit.demo.base import load_backbone, load_judge
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.compare import Comparison, run_comparison
from shiva_dit.experiments.contest import compete
from shiva_dit.experiments.contestants import (
    Contestant,
    Diverged,
    Job,
    Outcome,
    Settings,
    saved_settings,
)
from shiva_dit.experiments.kept import put_on
from shiva_dit.experiments.measures import measure
from shiva_dit.experiments.merging import merge_records
from shiva_dit.experiments.plots import draw_comparison, draw_schedules
from shiva_dit.experiments.scoring import noise_seed, sample
from shiva_dit.models.counted import model_flops
from shiva_dit.provenance import file_digest
from shiva_dit.report.comparison import comparison_rows, comparison_table
from shiva_dit.training.recipe import TrainConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("compare-*.toml"))
FEW = ["recipe.warmup_steps=1", "recipe.policy_steps=1", "recipe.joint_steps=1", "seeds=[0]"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_arm_that_ships_is_a_whole_recipe(path: Path) -> None:
    comparison = load_recipe(Comparison, path)
    contestants = comparison.contestants()
    assert list(contestants) == ["unpruned", "reference", *comparison.arms]
    assert len({c.name for c in contestants.values()}) == len(contestants)
    arms = [(c.recipe, c.run_at, c.num_steps, c.sampler) for c in contestants.values()]
    assert len(set(arms)) == len(arms), "two arms are the same"
    assert f"compare recipes/{path.name}" in path.read_text()


def test_an_arm_changes_what_it_names_and_nothing_else() -> None:
    arms = {"a": {"name": "A", "router": {"hidden": 16}}}
    recipe = {"keep_ratio": 0.3, "router": {"noise_std": 0.1}}
    made = Comparison(what="x", about="y", recipe=recipe, arms=arms).contestants()["a"].recipe
    assert made is not None
    assert (made.keep_ratio, made.router.hidden, made.router.noise_std) == (0.3, 16, 0.1)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({}, "at least one seed and one arm"),
        ({"unpruned": {"name": "x"}}, "always there"),
        ({"reference": {"name": "x"}}, "always there"),
        (
            {"a": {"name": "A", "sampler": "dpm"}},
            "arms.a.sampler: expected one of 'euler', 'unipc'",
        ),
        ({"a": 0.5}, "arms.a: expected a table with a name, got 0.5"),
        ({"a": {"keep_ratio": 0.5}}, "arms.a: 'name' is missing"),
        ({"a": {"name": "A", "routr": {}}}, "arms.a: unknown key 'routr'"),
        ({"a": {"name": "A", "num_steps": 0}}, "arms.a: num_steps must be at least 1"),
        ({"a": {"name": "A", "series": 1}}, "arms.a.series: expected str, got 1"),
        ({"a": {"name": "A", "run_at": 1.5}}, "arms.a: run_at must be a ratio in"),
        ({"a": {"name": "A", "run_at": "0.5"}}, "arms.a.run_at: expected float"),
        ({"a": {"name": "A", "run_at": 0.5, "method": "random"}}, "run_at needs a learned"),
        ({"a": {"name": "A", "run_at": 0.5, "policy": {"adaptive": False}}}, "run_at needs a"),
    ],
)
def test_a_wrong_comparison_says_what_is_wrong(arms: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Comparison(what="x", about="y", arms=arms).contestants()


def test_settings_of_records_that_name_no_sampler_are_those_of_their_time() -> None:
    plain = {"task": "digits", "count": 300}
    assert saved_settings(plain, "x").sampler == "euler_diffusers" != Settings().sampler
    assert saved_settings({**plain, "sampler": "unipc"}, "x").sampler == "unipc"
    whole = json.loads((ROOT / "results" / RECORD).read_text())
    parts = [_one_seed(whole, index) for index in range(2)]
    parts[1]["config"]["settings"]["sampler"] = "euler"
    with pytest.raises(ValueError, match="differ in more than seeds"):
        merge_records(parts)
    table = comparison_table(whole)
    assert table.endswith("Sampled by Euler with diffusers' default steps, before the fix.")
    whole["config"]["settings"]["sampler"] = "euler"
    assert "Sampled by Euler over t = 1, 1 - 1/n, ..., 1/n unless" in comparison_table(whole)


def test_seeds_that_diverged_stand_in_tables_merges_and_plots(tmp_path: Path) -> None:
    """Means are over the seeds that are there, and the tables say how many these are."""
    whole = json.loads((ROOT / "results" / RECORD).read_text())
    parts = [_one_seed(whole, index) for index in range(3)]
    for part, step in ((parts[0], 40), (parts[2], None)):
        row = part["rows"][1]
        gone = [name for name in row if name.endswith("_by_seed") or f"{name}_by_seed" in row]
        for name in (*gone, "schedules", "steps", "keep_ratio_asked"):
            row.pop(name, None)
        seed = part["config"]["seeds"][0]
        row["failed"] = [{"seed": seed, "step": step, "reason": "the loss is not finite"}]
    merged = merge_records(parts)
    row = merged["rows"][1]
    assert row["frechet_by_seed"] == parts[1]["rows"][1]["frechet_by_seed"]
    assert row["frechet"] == row["frechet_by_seed"][0]
    assert [found["seed"] for found in row["failed"]] == [0, 2]
    assert row["steps"] == whole["rows"][1]["steps"]
    line = comparison_table(merged).splitlines()[3]
    name = whole["rows"][1]["name"]
    assert line.startswith(
        f"| {name} (1 of 3 seeds; diverged at step 40; pictures not finite) | 0."
    )
    assert (
        comparison_table(parts[0])
        .splitlines()[3]
        .startswith(f"| {name} | diverged at step 40 | - | - |")
    )
    none = merge_records([parts[0], parts[2]])
    assert len(none["rows"][1]["failed"]) == 2
    for number, record in enumerate((merged, none)):
        assert len(comparison_rows(record, "targets")) == 1 + len(record["rows"])
        for draw in (draw_comparison, draw_schedules):
            path = tmp_path / f"{draw.__name__}{number}.png"
            draw(record, path)
            assert path.stat().st_size > 10_000


RECORD = "estimators-digits-keep40--epyc-2-cores--2026-11-25.json"


def test_records_of_single_seeds_merge_into_the_record_of_all() -> None:
    whole = json.loads((ROOT / "results" / RECORD).read_text())
    parts = [_one_seed(whole, index) for index in range(3)]
    merged = merge_records(parts)
    assert len(merged.pop("merged")) == 3
    assert merged.pop("wall_s") == 3 * whole["wall_s"]
    assert merged.pop("runs_of_this_call") == 3 * whole["runs_of_this_call"]
    assert merged == {k: v for k, v in whole.items() if k not in ("wall_s", "runs_of_this_call")}
    with pytest.raises(ValueError, match=r"a seed is in two records: \[0, 0, 1\]"):
        merge_records([parts[0], merge_records(parts[:2])])
    parts[1]["config"]["settings"]["count"] += 1
    with pytest.raises(ValueError, match="differ in more than seeds"):
        merge_records(parts)
    with pytest.raises(ValueError, match="at least two"):
        merge_records(parts[:1])
    with pytest.raises(ValueError, match="no record of a comparison"):
        merge_records([parts[0], {"what": "quickstart"}])


def _one_seed(record: dict, index: int) -> dict:
    """What the comparison would have left of one of its seeds."""
    one = json.loads(json.dumps(record))
    one["config"]["seeds"] = [record["config"]["seeds"][index]]
    for row in one["rows"]:
        for name in [name for name in row if name.endswith("_by_seed") or name == "schedules"]:
            row[name] = [row[name][index]]
        for name in [name for name in row if f"{name}_by_seed" in row]:
            row[name] = row[f"{name}_by_seed"][0]
    return one


@pytest.mark.slow
@pytest.mark.usefixtures("quick_jobs")
def test_a_comparison_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        """
what = "small"
about = "Two arms."
[settings]
count = 20
num_steps = 8
[recipe]
backbone = "full"
batch_size = 4
micro_batches = 2
policy = { adaptive = true }
[arms.ours]
name = "ours"
[arms.moved]
name = "ours at 0.3"
run_at = 0.3
[arms.random]
name = "by chance"
method = "random"
rejected = "low_rank"
[arms.untrained]
name = "by chance, untrained"
method = "random"
backbone = "frozen"
[arms.fewer]
name = "half the steps"
method = "dense"
backbone = "frozen"
num_steps = 4
[arms.same]
name = "the unpruned model again"
method = "dense"
backbone = "frozen"
"""
    )
    out = tmp_path / "runs"
    command = ["compare", str(recipe), "--out", str(out), "--workers", "1", *FEW]
    assert main(command) == 0
    first = json.loads((out / "record.json").read_text())
    names = "unpruned", "reference", "ours", "moved", "random", "untrained", "fewer", "same"
    assert tuple(row["method"] for row in first["rows"]) == names
    unpruned, truth, ours, moved, random, untrained, fewer, same = first["rows"]
    assert truth["flops"] == 2 * unpruned["flops"]
    assert "frechet_to_dense" not in truth
    assert "psnr" not in truth  # infinite, which JSON doesn't know
    for name in ("psnr", "frechet", "frechet_to_dense"):
        assert same[name] == unpruned[name]
    assert unpruned["psnr"] > fewer["psnr"] > 25.0
    assert ours["psnr"] > 0.0
    assert fewer["flops"] == 0.5 * unpruned["flops"]
    assert fewer["held_out_error"] == 0.0 < fewer["frechet_to_dense"]
    assert "steps" not in untrained
    assert untrained["train_cpu_s"] == 0.0 < untrained["held_out_error"]
    assert unpruned["held_out_error"] == 0.0 < ours["held_out_error"] < moved["held_out_error"]
    assert unpruned["held_out_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert 1.0 > ours["held_out_cosine"] > moved["held_out_cosine"] > 0.0
    assert random["ink_kept"] == pytest.approx(0.6, abs=0.02)
    assert len(ours["schedules"][0]) == 64
    assert [row.get("keep_ratio_asked") for row in first["rows"]] == [
        None,
        None,
        0.6,
        0.3,
        0.6,
        0.6,
        None,
        None,
    ]
    executed = [round(row["keep_ratio"], 2) for row in first["rows"]]
    assert executed == [1.0, 1.0, 0.6, 0.3, 0.6, 0.6, 1.0, 1.0]
    # One training serves both: its seconds are the same to the last digit.
    assert ours["train_cpu_s"] == moved["train_cpu_s"] != random["train_cpu_s"]
    model = load_backbone(load_task("digits"))
    made = ShivaAdapter(ShivaConfig.for_model(model, rejected="low_rank"))
    for row, module in ((ours, made.router), (random, made.updates)):
        assert row["parameters"] == sum(p.numel() for p in module.parameters())
    assert "by chance" in capsys.readouterr().out
    table = comparison_table(first)
    assert "Two arms. 20 images per arm and seed, 1 seed. Floor" in table
    routers = comparison_table(first, "routers").splitlines()
    assert routers[0].startswith("| arm | parameters | FLOPs | held-out error x 1000 | cosine |")
    assert f"| ours | {ours['parameters']:,} | " in routers[4]
    assert f" | {ours['held_out_cosine']:.4f} | " in routers[4]
    assert "| ours at 0.3 | 0.300 | " in comparison_table(first, "targets")
    with pytest.raises(ValueError, match="'attributes' can't be made: the record has no 'count'"):
        comparison_table(first, "attributes")
    (out / "random-0.json").unlink()
    assert main(command) == 0
    again = json.loads((out / "record.json").read_text())
    assert again["runs_of_this_call"] == 1
    timed = ("train_cpu_s", "sample_cpu_s")
    for old, new in zip(first["rows"], again["rows"], strict=True):
        for name in set(old) - {f"{t}{end}" for t in timed for end in ("", "_by_seed")}:
            assert old[name] == new[name]
    assert main([*command, "settings.count=21"]) == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("quick_jobs")
def test_an_arm_that_diverges_is_recorded_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It isn't met again unless that is asked for; what was trained is kept, and gives the same."""
    jobs: list[Job] = []

    def run_here(given: list[Job], workers: int) -> Iterator[list[Outcome | Diverged]]:
        assert workers == 1
        for job in given:
            jobs.append(job)
            yield compete(job)

    monkeypatch.setattr("shiva_dit.experiments.compare.run_jobs", run_here)
    short = {"backbone": "full", "batch_size": 4, "micro_batches": 2}
    short |= {"warmup_steps": 1, "policy_steps": 1, "joint_steps": 1}
    broken = {"backbone": 1000.0, "grad_clip": 1e30, "warmup_steps": 0}
    arms = {
        "broken": {"name": "broken", "joint_steps": 6, "optimizer": broken},
        "ours": {"name": "ours", "router": {"select_every": 2}},
        "ours_unipc": {"name": "by UniPC", "sampler": "unipc", "router": {"select_every": 2}},
        "random": {"name": "chance", "method": "random", "rejected": "low_rank"},
        "map": {"name": "map", "method": "fixed_map", "backbone": "dora"},
        "dense": {"name": "tuned", "method": "dense", "backbone": "lora"},
    }
    settings = Settings(count=20, num_steps=4)
    comparison = Comparison(
        what="x", about="y", seeds=(0,), settings=settings, recipe=short, arms=arms
    )
    record = run_comparison(comparison, tmp_path, workers=1)
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["unpruned", "reference", *arms]
    (failed,) = rows["broken"]["failed"]
    assert failed["seed"] == 0
    assert 2 < failed["step"] < 8
    assert "not finite" in failed["reason"]
    assert "frechet" not in rows["broken"]
    table = comparison_table(record)
    assert f"| broken | diverged at step {failed['step']} | - |" in table
    # One training serves both samplers, and its weights are named once.
    assert [job.contestants[0].name for job in jobs].count("ours") == 1
    assert rows["ours"]["train_cpu_s"] == rows["ours_unipc"]["train_cpu_s"]
    assert rows["ours"]["kept_by_seed"] == rows["ours_unipc"]["kept_by_seed"]
    assert rows["ours"]["psnr"] != rows["ours_unipc"]["psnr"]
    task = load_task("digits")
    for key in ("ours", "random", "map", "dense"):
        (kept,) = rows[key]["kept_by_seed"]
        folder = tmp_path / kept["folder"]
        assert kept["files"] == {path.name: file_digest(path) for path in folder.iterdir()}
        model = load_backbone(task)
        attachment = put_on(folder, model, seed=noise_seed(0) + 500)
        assert (attachment is None) == (key == "dense")
        images, _ = sample(task, model, 20, seed=noise_seed(0), num_steps=4)
        judged = load_file(tmp_path / f"{key}-0.safetensors")["images"]
        torch.testing.assert_close(images, judged, rtol=0.0, atol=1e-5)
    with pytest.raises(ValueError, match=r"holds neither config\.json nor control.json"):
        put_on(tmp_path, load_backbone(task))
    jobs.clear()
    again = run_comparison(comparison, tmp_path, workers=1)
    assert not jobs
    assert again["rows"] == record["rows"]
    run_comparison(comparison, tmp_path, workers=1, retry_failed=True)
    assert [job.contestants[0].name for job in jobs] == ["broken"]


@pytest.mark.usefixtures("quick_jobs")
def test_merging_competes_like_any_method() -> None:
    """Its share and its FLOPs are those of what runs, the matching included."""
    recipe = TrainConfig(method="tomesd", backbone="frozen", keep_ratio=0.5)
    dense = Contestant(name="dense", recipe=TrainConfig(method="dense", backbone="frozen"))
    merging = Contestant(name="merging", recipe=recipe, draws_maps=True)
    made = {}
    for contestant in (dense, merging):
        job = Job(
            settings=Settings(count=20, num_steps=2),
            contestants=(contestant,),
            seed=0,
        )
        (made[contestant.name],) = compete(job)
    found, bare = made["merging"], made["dense"]
    assert isinstance(found, Outcome)
    assert isinstance(bare, Outcome)
    assert (found.keep_ratio, found.parameters, found.maps) == (0.5, 0, None)
    assert found.held_out.ink_kept is None
    assert bare.held_out.error == 0.0 < found.held_out.error
    assert 0.5 * bare.flops < found.flops < bare.flops


@pytest.mark.usefixtures("quick_jobs")
@pytest.mark.parametrize("method", ["tofu", "ibtm", "toma", "sdtm"])
def test_published_methods_compete(method: str) -> None:
    """Single predictions are asked of those alone that don't go by the steps of a run."""
    recipe = TrainConfig(method=method, backbone="frozen", keep_ratio=0.5)
    settings = Settings(count=20, num_steps=3, guidance=3.0)
    job = Job(settings=settings, contestants=(Contestant(name=method, recipe=recipe),), seed=0)
    (found,) = compete(job)
    assert isinstance(found, Outcome)
    dense = 3 * model_flops(load_backbone(load_task("digits")), 64, 4).dense()
    assert 0.5 * dense < found.flops < dense
    by_steps = method in ("ibtm", "sdtm")
    assert (found.held_out.error is None) == by_steps
    values = measure(found, None, load_judge(load_task("digits")))
    assert ("held_out_error" in values) == (not by_steps)
