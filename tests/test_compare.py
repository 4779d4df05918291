"""Comparisons: arms merge into recipes, finished runs are kept, foreign ones refused."""

import json
from pathlib import Path

import pytest

from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.cli import main
from shiva_dit.config import load_recipe
from shiva_dit.demo.base import load_backbone
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.compare import Comparison
from shiva_dit.experiments.merging import merge_records
from shiva_dit.report import comparison_table

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("compare-*.toml"))
FEW = ["recipe.warmup_steps=1", "recipe.policy_steps=1", "recipe.joint_steps=1", "seeds=[0]"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_arm_that_ships_is_a_whole_recipe(path: Path) -> None:
    comparison = load_recipe(Comparison, path)
    contestants = comparison.contestants()
    assert list(contestants) == ["unpruned", *comparison.arms]
    assert len({c.name for c in contestants.values()}) == len(contestants)
    arms = [(c.recipe, c.run_at, c.num_steps) for c in contestants.values()]
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
[recipe]
backbone = "full"
batch_size = 4
micro_batches = 2
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
num_steps = 6
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
    names = "unpruned", "ours", "moved", "random", "untrained", "fewer", "same"
    assert tuple(row["method"] for row in first["rows"]) == names
    unpruned, ours, moved, random, untrained, fewer, same = first["rows"]
    assert same["frechet_to_dense"] == pytest.approx(0.0, abs=1e-6)
    assert "psnr" not in same  # infinite, which JSON doesn't know
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
        0.6,
        0.3,
        0.6,
        0.6,
        None,
        None,
    ]
    executed = [round(row["keep_ratio"], 2) for row in first["rows"]]
    assert executed == [1.0, 0.6, 0.3, 0.6, 0.6, 1.0, 1.0]
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
    assert f"| ours | {ours['parameters']:,} | " in routers[3]
    assert f" | {ours['held_out_cosine']:.4f} | " in routers[3]
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
