"""Making demo backbones: trainings that go on to the bit, and what they start from."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shiva_dit.cli import main
from shiva_dit.demo import train_base as base_module
from shiva_dit.demo.base import ASSETS, backbone_file, judge_file, load_backbone, record_file
from shiva_dit.demo.distil import Distillation, trajectories_of
from shiva_dit.demo.judge import JudgeTraining
from shiva_dit.demo.learner import Learner
from shiva_dit.demo.scenes import ScenesTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.demo.train_base import BaseTraining, half_places, start_from, train_base
from shiva_dit.experiments import scoring
from shiva_dit.experiments.few_steps import distil_base
from shiva_dit.training.interrupt import TrainingInterrupted
from shiva_dit.training.objective import denoising_loss, interpolate

FEW = ["steps=5", "batch_size=2", "judge.steps=2", "judge.batch_size=4", "checkpoint_every=2"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_base_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """In a process of its own, which forks one for each training: `tests/killed_base.py`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_base", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == 9
    assert min(report.values()) >= 1


def test_a_stopped_base_says_how_to_go_on_and_does_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, whole, out = load_task("digits"), tmp_path / "whole", tmp_path / "my run"
    assert main(["train-base", "--out", str(whole), *FEW]) == 0
    loss, calls = base_module.denoising_loss, []

    def interrupted(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss(*args)

    monkeypatch.setattr(base_module, "denoising_loss", interrupted)
    arguments = ["train-base", "--out", str(out), *FEW]
    assert main(arguments) == 128 + signal.SIGTERM
    assert not (out / backbone_file(task)).exists()
    again = re.search(r"Go on with:\n  shiva-dit (.*)", capsys.readouterr().err)
    assert again is not None
    assert main(arguments) == 2
    assert "holds a run already (step-00000003): go on with it by --resume" in said(capsys)
    assert main([*arguments, "--resume", "seed=1"]) == 2
    assert "was made with other values of seed" in said(capsys)
    assert main(shlex.split(again[1])) == 0
    assert len(calls) == 5
    for name in (backbone_file(task), judge_file(task)):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    records = [json.loads((folder / record_file(task)).read_text()) for folder in (out, whole)]
    assert records[0]["final_loss"] == records[1]["final_loss"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())


# --- from another task's backbone -----------------------------------------------------------------


def test_a_started_backbone_knows_what_the_other_knew() -> None:
    task, small = ScenesTask(64), load_task("scenes")
    torch.manual_seed(0)
    model: Any = task.build_backbone().eval()
    generator = torch.Generator().manual_seed(0)
    batch = task.batch(torch.arange(4), generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])

    @torch.no_grad()
    def loss() -> float:
        noisy = interpolate(batch.latents, noise, t)
        out = model(noisy, timestep=1000 * t, return_dict=False, **batch.conditioning)[0]
        assert out.shape == noise.shape
        return denoising_loss(out, noise - batch.latents).item()

    random = loss()
    start_from(model, load_backbone(small))
    # Measured 1.77 and 0.033; the smaller one's own training ended at 0.029.
    assert loss() < 0.05 * random
    same = small.build_backbone()
    start_from(same, load_backbone(small))
    for name, value in load_backbone(small).state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=0, atol=1e-6)


def test_half_sizes_come_first_and_span_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, seen = ScenesTask(), []
    build = task.build_backbone

    def watched() -> Any:
        model = build()
        model.pos_embed.register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0].shape[-1], output.shape[1]))
        )
        return model

    monkeypatch.setattr(task, "build_backbone", watched)
    judge = JudgeTraining(steps=1, batch_size=2)
    config = BaseTraining(task="scenes", steps=4, batch_size=2, half_share=0.5, judge=judge)
    train_base(task, config, tmp_path)
    assert seen == [(16, 64)] * 2 + [(32, 256)] * 2
    model: Any = build()
    places = model.pos_embed.pos_embed.view(16, 16, -1)
    model.pos_embed.pos_embed = half_places(model)["pos_embed.pos_embed"]
    middle = model.pos_embed.cropped_pos_embed(16, 16).view(8, 8, -1)
    for row, column in ((0, 0), (7, 3)):
        four = places[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(middle[row, column], four.mean((0, 1)))


def test_a_start_that_does_not_fit_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train-base", "--out", str(tmp_path / "a"), "task=scenes", *FEW]
    assert main([*words, "start=digits"]) == 2
    line = said(capsys)
    assert "start: the backbones differ in more than their grids: " in line
    assert re.search(r"\w+\.weight is \(.*\) there and \(.*\) here\.$", line)
    assert not (tmp_path / "a").exists()
    assert main([*words, "start=cats"]) == 2
    assert "start: there is no task 'cats'; known: digits, scenes, scenes64, emoji." in said(capsys)


# --- few steps ------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {
    "task": "digits",
    "num_steps": 2,
    "substeps": 2,
    "guidance": 2.0,
    "trajectories": 40,
    "batch_size": 4,
    "warmup_steps": 2,
    "checkpoint_every": 2,
}


@pytest.mark.slow
def test_a_student_draws_its_teachers_guided_pictures_in_fewer_steps(tmp_path: Path) -> None:
    task = load_task("digits")
    config = Distillation(**{**SHORT, "steps": 60, "learning_rate": 1e-3, "ema": 0.9})
    record = distil_base(task, config, tmp_path, count=12)
    rows = record["held_out"]["rows"]
    forwards = {name: row["forwards"] for name, row in rows.items()}
    assert forwards == {"truth": 96, "student": 2, "teacher": 4, "teacher unguided": 2}
    assert rows["truth"]["psnr"] == 100.0
    # Measured 24.3 dB, beside 22.2 of the teacher without guidance in as many forwards.
    assert rows["student"]["psnr"] > rows["teacher unguided"]["psnr"] + 1.0
    assert (tmp_path / judge_file(task)).read_bytes() == (ASSETS / judge_file(task)).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        backbone_file(task),
        record_file(task),
        judge_file(task),
    ]


def test_trajectories_end_where_the_teachers_sampling_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions are those of the training set, each once."""
    task = load_task("digits")
    teacher = load_backbone(task)
    config = Distillation(**{**SHORT, "steps": 4})
    paths = trajectories_of(teacher, task, config, {}, tmp_path)
    assert len(set(paths.indices.tolist())) == 40
    batch = paths.take(torch.tensor([33, 1]))
    assert batch.route is not None
    states, conditioning = batch.route.states, batch.conditioning
    assert states.shape == (2, 5, 1, 16, 16)
    assert batch.route.guidance.tolist() == [2.0, 2.0]
    pipe = task.pipeline(teacher)
    pipe.scheduler = scoring._scheduler("unipc")
    images = pipe(
        prompt_embeds=conditioning["encoder_hidden_states"],
        pooled_prompt_embeds=conditioning["pooled_projections"],
        negative_prompt_embeds=torch.zeros_like(conditioning["encoder_hidden_states"]),
        negative_pooled_prompt_embeds=torch.zeros_like(conditioning["pooled_projections"]),
        height=scoring.VAE_SCALE * 16,
        width=scoring.VAE_SCALE * 16,
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=states[:, 0],
        output_type="latent",
    ).images
    # They are kept as float16, the noise too.
    torch.testing.assert_close(states[:, -1], images, rtol=0, atol=2e-2)
    monkeypatch.setattr(type(teacher), "forward", None)  # nothing is left to draw
    again = trajectories_of(teacher, task, config, {}, tmp_path)
    assert torch.equal(again.take(torch.tensor([33, 1])).latents, states[:, -1])


def test_a_stopped_distillation_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once in each of its two halves."""
    task, whole, out = load_task("digits"), tmp_path / "whole", tmp_path / "stopped"
    config = Distillation(**{**SHORT, "steps": 6})
    wanted = distil_base(task, config, whole, count=2)
    step = Learner._update
    stops = [1, 4]

    def interrupted(self: Learner, loss: Tensor) -> None:
        if self.step in stops:
            stops.remove(self.step)
            signal.raise_signal(signal.SIGINT)
        step(self, loss)

    monkeypatch.setattr(Learner, "_update", interrupted)
    for done in (2, 5):
        with pytest.raises(TrainingInterrupted, match=f"step-0000000{done}"):
            distil_base(task, config, out, resume=done == 5, count=2)
    found = distil_base(task, config, out, resume=True, count=2)
    assert (out / backbone_file(task)).read_bytes() == (whole / backbone_file(task)).read_bytes()
    assert found["held_out"] == wanted["held_out"]
    assert found["final_loss"] == wanted["final_loss"]
    with pytest.raises(ValueError, match="already"):
        distil_base(task, config, out, resume=True, count=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "batch_size must be a multiple of num_steps, got 3 and 2"),
        ({"guidance": 0.5}, r"guidance must lie in \[1, 100\], got 0.5"),
        ({"own_share": 1.5}, r"own_share must lie in \[0, 1\]"),
        ({"num_steps": 65}, "num_steps must be at most 64"),
    ],
)
def test_distillations_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**{**SHORT, **changes})
