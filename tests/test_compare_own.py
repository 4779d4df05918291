"""Comparisons on a model and pictures of one's own: trained, sampled, kept, scored."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import shiva_dit
from shiva_dit.cli import main
from shiva_dit.experiments import compare
from shiva_dit.experiments.compare import Comparison, run_comparison
from shiva_dit.experiments.contest import UNDER_WAY, compete
from shiva_dit.experiments.contestants import Settings
from shiva_dit.experiments.frontier.config import Frontier, Timing
from shiva_dit.experiments.frontier.run import run_frontier
from shiva_dit.pictures.generate import Wanted
from shiva_dit.pictures.prompts import Prompt
from shiva_dit.pictures.reading import find_pictures, read_picture
from shiva_dit.pictures.samplers import solver
from shiva_dit.report.comparison import comparison_table
from shiva_dit.training.checkpoint import latest_checkpoint
from shiva_dit.training.trainer import Trainer
from tests.test_folder import SIDE, encode, pictures, pipeline

__all__ = ["pictures", "pipeline"]
SHORT = {"warmup_steps": 1, "policy_steps": 1, "joint_steps": 2, "batch_size": 2}
SHORT |= {"micro_batches": 1, "guidance": [1.0, 5.0], "lora_rank": 2}
ARMS: dict[str, Any] = {
    "ours": {"name": "ours", "backbone": "lora", "checkpoint_every": 2},
    "random": {"name": "random", "method": "random", "backbone": "lora"},
    "map": {"name": "a map", "method": "fixed_map", "backbone": "frozen"},
    "dense": {"name": "fine-tuned", "method": "dense", "backbone": "lora"},
    "fewer": {"name": "2 steps", "method": "dense", "backbone": "frozen", "num_steps": 2},
}


@pytest.fixture
def comparison(
    pipeline: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Comparison:
    monkeypatch.setattr(compare, "run_jobs", lambda jobs, workers: map(compete, jobs))
    encode(pipeline, pictures, tmp_path / "data")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na disc\n", encoding="utf-8")
    settings = Settings(
        pipeline=str(pipeline),
        data=tmp_path / "data",
        prompts=prompts,
        size=(SIDE, SIDE),
        count=2,
        batch=1,
        num_steps=3,
        sampler="unipc",
        guidance=4.0,
    )
    return Comparison(
        what="own", about="Own.", seeds=(0,), settings=settings, recipe=SHORT, arms=ARMS
    )


def test_arms_and_controls_train_sample_and_are_kept(
    comparison: Comparison, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    record = run_comparison(comparison, out, workers=1)
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["unpruned", "reference", *ARMS]
    assert "floor" not in record
    whole = rows["unpruned"]["flops"]
    assert rows["dense"]["flops"] == whole
    assert rows["fewer"]["flops"] == pytest.approx(whole * 2 / 3)
    assert rows["reference"]["flops"] == pytest.approx(2 * whole)
    assert 0.4 * whole < rows["random"]["flops"] < whole
    assert rows["random"]["keep_ratio"] == pytest.approx(0.6, abs=0.02)
    assert rows["map"]["psnr"] < rows["unpruned"]["psnr"]
    assert {"psnr", "train_cpu_s"} <= rows["ours"].keys()
    assert rows["unpruned"]["held_out_error"] == 0.0 < rows["map"]["held_out_error"]
    assert rows["map"]["held_out_cosine"] < 1.0
    assert "| arm | FLOPs | keep | PSNR to unpruned, dB |" in comparison_table(record)
    # Pictures are those of the pipeline itself, from the noise that `generate` takes.
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    shiva_dit.apply(pipe, out / "trained" / "ours-0")
    kept = shiva_dit.ShivaAdapter.from_pretrained(out / "trained" / "ours-0")
    assert kept.training_record["recipe"]["task"] is None
    prompt = Prompt("00001", "a disc")
    fewer = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": SIDE, "width": SIDE}
    pipe.scheduler = solver(pipe.scheduler, "unipc")
    noise = Wanted(prompt, 0).generator()
    made = pipe(prompt=prompt.text, generator=noise, output_type="pt", **fewer).images[0]
    found = find_pictures(out / "pictures" / "ours")
    assert [found.prompts[name].text for name in found.names] == ["a star", "a disc"]
    there = read_picture(out / "pictures" / "ours" / "00001-0.png")
    assert int(((255 * made).round() - there).abs().max()) <= 1
    # Controls that were kept are arms of a frontier on the same model.
    frontier = Frontier(
        what="x",
        about="y",
        pipeline=str(pipeline),
        prompts=comparison.settings.prompts,
        size=(SIDE, SIDE),
        count=2,
        seeds=(0,),
        guidance=(4.0,),
        reference_steps=6,
        batch=1,
        timing=Timing(batch=2, repeats=1),
        arms={
            "unpruned": {"name": "unpruned", "steps": [3]},
            "map": {"name": "map", "adapter": f"{out}/trained/map-{{seed}}", "steps": [3]},
        },
    )
    front = {row["arm"]: row for row in run_frontier(frontier, tmp_path / "f")["fronts"][0]["rows"]}
    assert front["map"]["psnr"] == pytest.approx(rows["map"]["psnr"], abs=0.05)
    assert front["map"]["flops"] == pytest.approx(rows["map"]["flops"])
    assert not run_comparison(comparison, out, workers=1)["runs_of_this_call"]
    theirs, said = out / "pictures" / "reference", tmp_path / "scores.json"
    judged = ["evaluate", str(out / "pictures" / "ours"), "--dense", str(theirs)]
    assert main([*judged, "--out", str(said)]) == 0
    assert "PSNR" in capsys.readouterr().out
    # Other prompts are never taken for these.
    assert comparison.settings.prompts is not None
    comparison.settings.prompts.write_text("a star\na square\n", encoding="utf-8")
    with pytest.raises(ValueError, match="of another model or other data"):
        run_comparison(comparison, out, workers=1)


def test_a_training_that_was_cut_off_goes_on(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"ours": ARMS["ours"]}
    short = Comparison(
        what="own", about="Own.", seeds=(0,), settings=comparison.settings, recipe=SHORT, arms=arms
    )
    whole = run_comparison(short, tmp_path / "whole", workers=1)
    step = Trainer.train_step
    done: list[int] = []

    def cut(self: Trainer) -> dict[str, float]:
        if done == [0, 1, 2]:
            raise KeyboardInterrupt
        done.append(self.step)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", cut)
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run_comparison(short, out, workers=1)
    left = out / "trained" / f"ours-0{UNDER_WAY}" / "checkpoints"
    assert latest_checkpoint(left) is not None
    done.clear()
    record = run_comparison(short, out, workers=1)
    assert done == [2, 3]
    assert not left.parent.exists()
    kept = [found["rows"][-1]["kept_by_seed"][0]["files"] for found in (whole, record)]
    weights = [name for name in kept[0] if name.endswith(".safetensors")]
    assert len(weights) == 2
    assert all(kept[0][name] == kept[1][name] for name in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "digits"}, "of a task or of a pipeline"),
        ({"pipeline": None}, "go together"),
        ({"data": None}, "go together"),
        ({"prompts": None}, "go together"),
        ({"count": 0}, "count must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_settings_that_miss_a_part_say_so(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"pipeline": "p", "data": Path("d"), "prompts": Path("t"), "count": 2}
    with pytest.raises(ValueError, match=message):
        Settings(**{**given, **changes})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((SIDE + 1, SIDE), f"divisible by .*{SIDE + 1} x {SIDE}"),
        ((0, SIDE), "size must be at least"),
    ],
)
def test_a_size_that_the_pipeline_has_not_is_refused_at_the_start(
    size: tuple[int, int], message: str, comparison: Comparison, tmp_path: Path
) -> None:
    settings = dataclasses.replace(comparison.settings, size=size)
    with pytest.raises(ValueError, match=message):
        run_comparison(
            dataclasses.replace(comparison, settings=settings), tmp_path / "out", workers=1
        )
    assert not (tmp_path / "out" / "trained").exists()


def test_pictures_of_another_pipeline_are_refused(
    comparison: Comparison, pipeline: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pipeline, other)
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1.0)
    pipe.save_pretrained(other)
    given = {"what": "x", "about": "y", "recipe": SHORT, "arms": ARMS}
    settings = {"pipeline": str(other), "data": comparison.settings.data}
    made = Settings(**settings, prompts=comparison.settings.prompts, count=2)
    with pytest.raises(ValueError, match="encoded by another pipeline"):
        run_comparison(Comparison(settings=made, **given), tmp_path / "out", workers=1)
