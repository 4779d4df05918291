"""The demo backbones and judges: their files, and loading them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.provenance import load_tensors

ASSETS = Path(__file__).parent / "assets"


def shipped_adapter(task: DemoTask) -> Path:
    """Folder of the trained adapter that ships for a task, made by `recipes/<task>.toml`.

    Raises:
        ValueError: If there is none.
    """
    folder = ASSETS / f"{task.name}-keep40"
    if not folder.is_dir():
        raise ValueError(f"no adapter ships for {task.name}: train one, and pass --adapter FOLDER.")
    return folder


def backbone_file(task: DemoTask) -> str:
    """File name of a task's backbone."""
    return f"{task.name}-backbone.safetensors"


def judge_file(task: DemoTask) -> str:
    """File name of a task's judge."""
    return f"{task.name}-judge.safetensors"


def record_file(task: DemoTask) -> str:
    """File name of the record of how both were made."""
    return f"{task.name}-base.json"


def usable_device(name: str) -> torch.device:
    """The device of a name such as "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: If there is no such device here.
    """
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device))  # the meta device holds no values
    # torch without CUDA asserts, and without some backends lacks their modules.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} can't be used here: {reason}") from error
    return device


@torch.no_grad()
def judge_accuracy(judge: Judge, task: DemoTask) -> dict[str, float]:
    """Share of unseen real images that the judge reads right, in [0, 1], by attribute."""
    images, labels = task.judge_test()
    return task.right(judge(images), labels)


def load_backbone(task: DemoTask, folder: Path = ASSETS) -> SD3Transformer2DModel:
    """The trained backbone in float32, in evaluation mode.

    Raises:
        ValueError: If its file is missing, damaged, or another model's.
    """
    model = task.build_backbone()
    _load(model, _asset(folder, task, backbone_file(task)))
    return model.eval()


def load_judge(task: DemoTask, folder: Path = ASSETS) -> Judge:
    """The trained judge in float32, in evaluation mode.

    Raises:
        ValueError: If its file is missing, damaged, or another model's.
    """
    judge = task.build_judge()
    _load(judge, _asset(folder, task, judge_file(task)))
    return judge.eval()


def _load(module: torch.nn.Module, path: Path) -> None:
    """Fill a module, its floating-point values in float32."""
    state = {
        name: value.float() if value.is_floating_point() else value
        for name, value in load_tensors(path).items()
    }
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is of another model or task: {error}") from error


def _asset(folder: Path, task: DemoTask, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: make it with `shiva-dit train-base --recipe "
            f"recipes/{task.name}-base.toml --out {folder}`."
        )
    return path
