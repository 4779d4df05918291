"""The digits task, its shipped weights, the quickstart and the command line."""

import json
import re
import shlex
import signal
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image

import shiva_dit
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.cli import main
from shiva_dit.config import from_dict, load_recipe
from shiva_dit.core.schedule import Schedule
from shiva_dit.demo.base import (
    ASSETS,
    backbone_file,
    judge_file,
    load_backbone,
    load_judge,
    record_file,
    shipped_adapter,
)
from shiva_dit.demo.captions import CaptionEncoder
from shiva_dit.demo.digits import MAX_WORDS, DigitsTask
from shiva_dit.demo.judge import JudgeTraining
from shiva_dit.demo.tasks import load_task
from shiva_dit.demo.train_base import BaseTraining, train_base
from shiva_dit.experiments.contestants import Settings
from shiva_dit.experiments.maps import kept_maps
from shiva_dit.experiments.quickstart import CONTROLS, FEW, NAMES, load_quickstart_recipe
from shiva_dit.experiments.scoring import Sampler, floors, sample, sampler_times, score
from shiva_dit.experiments.served import Serving
from shiva_dit.experiments.subjects import flops_per_image
from shiva_dit.methods.fixed_map import FixedMapSelector
from shiva_dit.metrics import psnr
from shiva_dit.models.attach import attach
from shiva_dit.report.documents import render
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
SHIPPED = ("digits", "scenes")
SHORT = ["warmup_steps=1", "policy_steps=1", "joint_steps=1", "batch_size=4", "micro_batches=2"]


@pytest.fixture(scope="module")
def task() -> DigitsTask:
    return DigitsTask()


def test_the_split_is_whole_disjoint_and_balanced(task: DigitsTask) -> None:
    assert task.images.shape == (1297, 1, 16, 16)
    assert task.held_out_images.shape == (500, 1, 16, 16)
    assert task.images.min() == -1
    assert task.images.max() == 1
    counts = torch.bincount(task.held_out_labels)
    # Stratified: scikit-learn's digits have 174 to 183 of each, so 500 / 1797 of that.
    assert counts.min() >= 48
    assert counts.max() <= 51
    trained = {image.numpy().tobytes() for image in task.images}
    assert not any(image.numpy().tobytes() in trained for image in task.held_out_images)


def test_captions_are_told_apart_and_wrong_words_named(task: DigitsTask) -> None:
    embeds, pooled = task.captions([task.caption(3), task.caption(4), ""])
    assert embeds.shape == (3, MAX_WORDS, task.captions.embed_dim)
    assert not torch.equal(embeds[0], embeds[1])
    assert not torch.equal(pooled[0], pooled[1])
    assert not embeds[2].any()
    with pytest.raises(ValueError, match=r"unknown word 'eleven'; known are a, handwritten"):
        task.captions(["a handwritten eleven"])
    with pytest.raises(ValueError, match="has 5 words, at most 4"):
        CaptionEncoder(("a",), 4)(["a a a a a"])


# Of ten pictures. Measured: all right; 27.6 dB on the digits, 30.5 dB on the scenes; against the
# pictures of other noise it is 16.5 and 23.2 dB.
@pytest.mark.parametrize(
    ("name", "db"), [("digits", 22.0), pytest.param("scenes", 27.0, marks=pytest.mark.slow)]
)
def test_what_ships_draws_what_the_judge_reads(name: str, db: float) -> None:
    """The backbone, and the adapter on it, which leaves it as it was."""
    shipped = load_task(name)
    backbone, judge = load_backbone(shipped), load_judge(shipped)

    def draw(count: int, **options: Any) -> torch.Tensor:
        return sample(shipped, backbone, count, seed=0, guidance=1.5, **options)[0]

    before, dense = draw(2, num_steps=2), draw(10)
    assert score(shipped, judge, dense).right["all"] >= 0.9
    shiva_dit.apply(shipped.pipeline(backbone), shipped_adapter(shipped))
    words = shipped.captions.max_words
    assert shiva_dit.summary(backbone, text_tokens=words).keep_ratio == pytest.approx(0.4, 1e-3)
    pruned = draw(10)
    assert score(shipped, judge, pruned).right["all"] >= 0.9
    assert psnr(pruned, dense) > db
    shiva_dit.remove(backbone)
    assert torch.equal(draw(2, num_steps=2), before)


def test_the_judge_knows_unseen_digits_and_the_distance_sees_noise(task: DigitsTask) -> None:
    judge = load_judge(task)
    with torch.no_grad():
        right = (judge(task.held_out_images).argmax(1) == task.held_out_labels).double().mean()
    assert right >= 0.99
    floor = floors(task, judge, 300).frechet
    noisy = task.images[:300] + 0.4 * torch.randn(
        300, 1, 16, 16, generator=torch.Generator().manual_seed(0)
    )
    assert score(task, judge, noisy).frechet > 2 * floor


def test_maps_show_what_a_selector_keeps(task: DigitsTask) -> None:
    backbone = load_backbone(task)
    selector = FixedMapSelector.centre(6, 8, 8)
    attachment = attach(backbone, selector, Schedule.uniform(0.25, num_blocks=6))
    maps = kept_maps(task, attachment, 2, seed=0)
    assert maps.shape == (6, 12, 2, 64)
    assert maps[0].all()
    assert (maps[1:].sum(-1) == 16).all()
    assert maps[3, 5, 1].view(8, 8)[2:6, 2:6].sum() >= 12  # the middle 16 tokens, ties aside
    dense = flops_per_image(task, backbone, None, 12)
    assert 0.4 < flops_per_image(task, backbone, attachment, 12) / dense < 0.55


def test_samplers_visit_these_times() -> None:
    """No step is wasted, but by diffusers' default, which older records were made with."""
    assert sampler_times(4) == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-6)
    # UniPC takes whole timesteps of 1,000.
    assert sampler_times(4, "unipc") == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=2e-3)
    assert sampler_times(2, "euler_diffusers") == pytest.approx([1.0, 0.001], abs=1e-6)


def test_models_are_called_at_the_times_that_are_counted(task: DigitsTask) -> None:
    backbone: Any = load_backbone(task)
    seen: list[float] = []
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0]) / 1000),
        with_kwargs=True,
    )
    for sampler in get_args(Sampler):
        for num_steps in (1, 3):
            seen.clear()
            sample(task, backbone, 2, seed=0, num_steps=num_steps, sampler=sampler)
            assert seen == pytest.approx(sampler_times(num_steps, sampler), abs=1e-6)


@pytest.mark.slow
def test_better_steps_come_nearer_to_the_samplers_limit(task: DigitsTask) -> None:
    """With six forwards; by 1 dB and by 6 when this was written."""
    backbone = load_backbone(task)
    limit, _ = sample(task, backbone, 10, seed=5, num_steps=36, sampler="unipc")
    samplers: tuple[Sampler, ...] = ("euler_diffusers", "euler", "unipc")
    found = [
        psnr(sample(task, backbone, 10, seed=5, num_steps=6, sampler=sampler)[0], limit)
        for sampler in samplers
    ]
    assert found[0] + 0.5 < found[1]
    assert found[1] + 3.0 < found[2]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_jobs")
def test_quickstart_writes_picture_record_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = partial(Settings, num_steps=10)
    monkeypatch.setattr("shiva_dit.experiments.quickstart.Settings", settings)
    brief = partial(Serving, batch=1, num_steps=2, repeats=1)
    monkeypatch.setattr("shiva_dit.experiments.served.Serving", brief)
    assert main(["quickstart", "--out", str(tmp_path), "--count", "20", *SHORT]) == 0
    record = json.loads((tmp_path / "quickstart.json").read_text())
    assert tuple(row["method"] for row in record["rows"]) == FEW
    assert record["sampler"] == "euler"
    assert record["keep_ratio_executed"] == pytest.approx(0.4, abs=0.01)
    rows = {row["method"]: row for row in record["rows"]}
    assert rows["shiva"]["flops"] < 0.62 * rows["dense"]["flops"]
    assert rows["shiva"]["train_cpu_s"] > 0
    assert (tmp_path / "quickstart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert re.search(r"Shiva +\d\.\d\d G \(0\.\d\d\)", printed)
    assert "Floor of that to real (20 real training digits)" in printed
    assert rows["shiva"]["frechet_to_dense"] > 0
    assert "frechet_to_dense" not in rows["reference"]
    assert rows["dense"]["psnr"] > 30.0
    assert rows["shiva_unipc"]["flops"] == pytest.approx(rows["shiva"]["flops"], rel=0.01)
    assert rows["shiva_unipc"]["train_cpu_s"] == rows["shiva"]["train_cpu_s"]
    assert "Sampled by Euler over t = 1, 1 - 1/n" in printed
    served = json.loads((tmp_path / "served.json").read_text())
    assert served["num_tokens"] == 1024
    assert served["keep_ratio"] == pytest.approx(0.4, abs=0.01)
    assert served["flops_ratio"] > 1.8
    assert served["psnr"] > 12.0  # of two steps
    assert min(served["seconds"].values()) > 0.0
    assert f"{served['speed_up']:.2f} times as fast" in printed  # the median of rounds' ratios
    assert f"(FLOPs say {served['flops_ratio']:.2f})" in printed
    assert (tmp_path / "served.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_jobs")
def test_all_controls_are_compared_at_equal_flops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = partial(Settings, num_steps=4)
    monkeypatch.setattr("shiva_dit.experiments.quickstart.Settings", settings)
    brief = partial(Serving, batch=1, num_steps=1, repeats=1)
    monkeypatch.setattr("shiva_dit.experiments.served.Serving", brief)
    arguments = ["quickstart", "--all-controls", "--seeds", "2", "--seed", "3", "--keep", "0.5"]
    assert main([*arguments, "--count", "20", "--out", str(tmp_path), *SHORT]) == 0
    record = json.loads((tmp_path / "quickstart.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == list(NAMES)
    assert record["config"]["seeds"] == [3, 4]
    dense, ours = rows["dense"]["flops"], rows["shiva"]["flops"]
    for method in ("random", "random_tuned", "centre_tuned", "fixed_map_tuned", "norm_tuned"):
        # The routers are what ours costs more.
        assert 0.9 * ours < rows[method]["flops"] < ours
    assert rows["dense_tuned"]["flops"] == dense
    # Whole steps of the four: half a step away at most.
    assert abs(rows["fewer_steps"]["flops"] - ours) <= dense / 4 / 2
    assert rows["fewer_steps_unipc"]["flops"] == rows["fewer_steps"]["flops"]
    assert rows["dense_unipc"]["flops"] == dense == rows["reference"]["flops"] / 2
    for method, row in rows.items():
        assert len(row["frechet_by_seed"]) == 2
        assert (row["train_cpu_s"] > 0) == (method in CONTROLS or method.startswith("shiva"))
    with Image.open(tmp_path / "quickstart.png") as picture:
        assert picture.size == (1320, 1859)


def test_train_command_saves_refuses_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(ROOT / "recipes/digits.toml"), f"out={tmp_path}", *SHORT]
    assert main(arguments) == 0
    assert (tmp_path / "adapter" / "config.json").is_file()
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main([*arguments[:2], "--resume", *arguments[2:]]) == 0  # in any order


def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = str(ROOT / "recipes/digits.toml"), f"out={tmp_path / 'my run'}"
    arguments = ["train", recipe, "--threads", "1", out, *SHORT]
    step = Trainer.train_step

    def interrupted(self: Trainer) -> dict[str, float]:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert main(arguments) == 130
    said = capsys.readouterr().err
    assert "saving; Ctrl-C again" in said
    again = re.search(r"Go on with:\n  shiva-dit (.*)", said)
    assert again is not None
    monkeypatch.setattr(Trainer, "train_step", step)
    words = shlex.split(again[1])
    assert words == ["train", recipe, out, *SHORT, "--resume", "--threads", "1"]
    assert main(words) == 0
    assert (tmp_path / "my run" / "adapter" / "config.json").is_file()


def test_the_base_is_trained_from_a_seed_and_never_over_another(
    task: DigitsTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(out: str, *overrides: str) -> int:
        few = ["steps=3", "batch_size=4", "judge.steps=2", "judge.batch_size=4"]
        return main(["train-base", "--out", str(tmp_path / out), *few, *overrides])

    assert run("a") == 0
    state = torch.get_rng_state()
    assert run("b") == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert run("c", "seed=1") == 0
    for name in (backbone_file(task), judge_file(task)):
        first, same, other = ((tmp_path / out / name).read_bytes() for out in "abc")
        assert first == same
        assert first != other
    record = json.loads((tmp_path / "a" / record_file(task)).read_text())
    assert record["config"]["steps"] == 3
    assert 0 <= record["judge_accuracy_on_held_out"]["all"] <= 1
    assert run("a") == 2
    assert f"holds {backbone_file(task)} already" in capsys.readouterr().err
    for wrong in ("steps=0", "batch_size=0", "learning_rate=nan", "judge.steps=0", "ema=1.0"):
        assert run("d", wrong) == 2
    assert not (tmp_path / "d" / backbone_file(task)).exists()


@pytest.mark.slow
def test_training_the_base_lowers_its_loss(task: DigitsTask, tmp_path: Path) -> None:
    losses = {}
    for steps in (1, 30):
        config = BaseTraining(
            steps=steps, batch_size=8, warmup_steps=5, judge=JudgeTraining(steps=1)
        )
        losses[steps] = train_base(task, config, tmp_path / str(steps))["final_loss"]
    # A running mean that starts at the first loss; measured 1.600 and 1.285.
    assert losses[30] < 0.9 * losses[1]


@pytest.mark.parametrize(("name", "last"), [("digits", "digits"), ("scenes", "scenes-guided")])
def test_what_ships_was_made_by_the_recipes_that_ship(name: str, last: str) -> None:
    task = load_task(name)
    base = load_recipe(BaseTraining, ROOT / f"recipes/{name}-base.toml")
    record = json.loads((ASSETS / record_file(task)).read_text())
    assert from_dict(BaseTraining, record["config"]) == base
    recipe = load_recipe(TrainConfig, ROOT / f"recipes/{last}.toml")
    shipped = ShivaAdapter.from_pretrained(shipped_adapter(task))
    made = shipped.training_record["recipe"]
    assert from_dict(TrainConfig, {**made, "out": str(recipe.out)}) == recipe
    for part in shipped.budgets:
        made = part.training_record["recipe"]
        command = next(
            line.split()[4:-1]
            for line in (ROOT / f"recipes/{name}-budgets.toml").read_text().splitlines()
            if f"keep_ratio={made['keep_ratio']} " in line
        )
        recipe = load_recipe(TrainConfig, ROOT / f"recipes/{name}-budgets.toml", command)
        assert from_dict(TrainConfig, {**made, "out": str(recipe.out)}) == recipe


def test_the_digits_base_is_the_default() -> None:
    assert load_recipe(BaseTraining, ROOT / "recipes/digits-base.toml") == BaseTraining()


def test_the_quickstart_trains_in_all_three_stages() -> None:
    recipe = load_quickstart_recipe()
    assert min(recipe.warmup_steps, recipe.policy_steps, recipe.joint_steps) >= 10
    assert recipe.learns_policy
    assert recipe.backbone == "full"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "5"], "count must be at least 20"),
        (["backbone=frozen"], "leaves them nothing to train"),
        (["seed=3"], "sets seed by itself: use --keep, --seed"),
        (["--keep", "1.5"], r"keep_ratio must lie in \(0, 1\)"),
        (["--out", __file__], "is a file, not a folder"),
    ],
)
def test_the_quickstart_refuses_before_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["quickstart", "--out", str(tmp_path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("keep_ration=0.5", "did you mean 'keep_ratio'"),
        ("keep_ratio=1.5", r"keep_ratio must lie in \(0, 1\)"),
        ("router.hiden=3", "did you mean 'hidden'"),
        ("task=cats", "there is no task 'cats'; known: digits"),
        ("method=random", "is a control"),
    ],
)
def test_train_command_explains_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    recipe = str(ROOT / "recipes/digits.toml")
    assert main(["train", recipe, f"out={tmp_path}", override]) == 2
    assert re.search(message, capsys.readouterr().err)


DOCUMENTS = [
    "README.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md")),
]
TABLES = {
    "docs/beside.md": 2,
    "docs/export.md": 1,
    "docs/models.md": 2,
    "docs/performance.md": 18,
    "docs/results/captions.md": 1,
    "docs/results/estimators-digits.md": 4,
    "docs/results/estimators-scenes.md": 6,
    "docs/results/flips.md": 4,
    "docs/results/frontier.md": 5,
    "docs/results/quickstart.md": 2,
    "docs/results/rejected.md": 1,
    "docs/results/routers.md": 1,
    "docs/results/schedules.md": 3,
    "docs/results/targets.md": 1,
    "docs/results/variations.md": 1,
    "docs/training.md": 1,
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_agree_with_their_records(document: str) -> None:
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    assert text.count("<!-- table ") == TABLES.get(document, 0)
    assert render(text, path.parent) == text


def test_report_names_missing_records(tmp_path: Path) -> None:
    text = "<!-- table quickstart: gone.json -->\n<!-- end table -->\n"
    with pytest.raises(ValueError, match=r"gone\.json is missing"):
        render(text, tmp_path)
    with pytest.raises(ValueError, match="no table 'weather'"):
        render(text.replace("quickstart", "weather"), tmp_path)


@pytest.mark.parametrize(
    "damage", [("<!-- end table", "<!--  end tabel"), ("<!-- table q", "<!--table q"), (":", ";")]
)
def test_report_refuses_damaged_markers(damage: tuple[str, str], tmp_path: Path) -> None:
    text = "<!-- table quickstart: gone.json -->\nforged\n<!-- end table -->\n"
    with pytest.raises(ValueError, match="but 0 whole tables"):
        render(text.replace(*damage), tmp_path)


@pytest.mark.slow
def test_twenty_steps_bring_the_student_nearer_to_its_teacher(tmp_path: Path) -> None:
    arguments = ["train", str(ROOT / "recipes/digits.toml"), f"out={tmp_path}"]
    assert main([*arguments, "warmup_steps=0", "policy_steps=0", "joint_steps=20"]) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = (sum(row["distill"] for row in log[i : i + 5]) for i in (0, 15))
    # Measured: the mean of five steps falls from 0.439 to 0.113.
    assert last < 0.5 * first
