"""The README's Python example, as it stands there, on a tiny SD3 pipeline."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import shiva_dit
from shiva_dit.core.schedule import Schedule
from shiva_dit.demo.base import shipped_adapter
from shiva_dit.demo.tasks import load_task
from shiva_dit.models.attach import attachment_of
from tests import tiny

README = Path(__file__).parents[1] / "README.md"


class _Prompted:
    """A tiny pipeline that takes a prompt, as the large one does, and stands for a trained one."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.transformer = pipe, pipe.transformer
        self.calls: list[torch.Tensor] = []

    def __call__(self, prompt: str, num_inference_steps: int) -> Any:
        assert prompt
        images = tiny.generate(self.pipe, guidance=1.0, num_inference_steps=4)
        self.calls.append(images)
        return type("Output", (), {"images": images})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def test_the_example_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert code is not None
    model = tiny.sd3("dual")
    expected = tiny.generate(tiny.pipeline(model), guidance=1.0, num_inference_steps=4)
    tiny.adapter(model, Schedule.uniform(0.5, num_blocks=4)).save_pretrained(tmp_path / "adapter")
    prompted = _Prompted(tiny.pipeline(model))
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda name: prompted)
    apply, compile_ = shiva_dit.apply, shiva_dit.compile
    monkeypatch.setattr(shiva_dit, "apply", lambda pipe, name: apply(pipe, tmp_path / "adapter"))
    # The example's default backend takes minutes; that it compiles is shown elsewhere.
    monkeypatch.setattr(shiva_dit, "compile", lambda pipe: compile_(pipe, backend="eager"))

    exec(code[1], {})

    pruned, dense = prompted.calls
    assert torch.equal(dense, expected)
    assert not torch.equal(pruned, expected)
    assert "kept on average 50.0%" in capsys.readouterr().out
    assert attachment_of(model) is None


def test_the_guides_first_example_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    """With the adapter that ships in the place of the one that the command before it trains."""
    guide = (README.parent / "docs" / "training.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", guide, re.S)
    assert code is not None
    assert "runs/digits/adapter" in code[1]
    shipped = shipped_adapter(load_task("digits"))
    exec(code[1].replace("runs/digits/adapter", str(shipped)), {})
    assert "SD3Transformer2DModel" in capsys.readouterr().out
