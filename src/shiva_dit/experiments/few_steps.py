"""Making a few-step backbone, and what its pictures are worth beside its teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shiva_dit.demo.base import ASSETS, load_backbone, usable_device
from shiva_dit.demo.distil import Distillation, distilled
from shiva_dit.demo.made import Made, make_base
from shiva_dit.demo.task import DemoTask
from shiva_dit.experiments.scoring import Sampler, noise_seed, sample, score
from shiva_dit.metrics import decibels, squared_errors

COUNT = 50
"""Pictures of held-out captions that a few-step backbone is held against its teacher by."""
LIMIT = 48
"""Steps of UniPC that the teacher's own pictures are made in."""


def distil_base(
    task: DemoTask,
    config: Distillation,
    out: Path,
    *,
    base: Path = ASSETS,
    device: str = "cpu",
    resume: bool = False,
    count: int = COUNT,
) -> dict[str, Any]:
    """Distil a backbone, guidance included, and write it with its base's judge and their record.

    Args:
        task: The task that gives captions and architecture.
        config: The recipe.
        out: Folder for the two safetensors files (fp16) and their record; made if needed.
        base: Folder of the teacher and the judge; the shipped ones by default.
        device: Where it is trained.
        resume: Go on from the last checkpoint in the folder; from the beginning if there is none.
        count: Held-out captions that it is measured on.

    Returns:
        The record: what the pictures are worth, CPU seconds, configuration.

    Raises:
        ValueError: If the folder holds weights or another run already, another process is at work
            in it, or there is no such device.
        TrainingInterrupted: After Ctrl-C or SIGTERM, when all was saved.
        FloatingPointError: If the loss is not finite; no weights are written then.
    """
    usable_device(device)

    def make(checkpoints: Path) -> Made:
        made = distilled(task, config, base, device, checkpoints)
        held_out = measured(task, config, made, load_backbone(task, base), count)
        return Made({**made.record, "held_out": held_out}, made.backbone, made.judge)

    return make_base(task, out, make, resume=resume)


def measured(
    task: DemoTask, config: Distillation, made: Made, teacher: Any, count: int
) -> dict[str, Any]:
    """Pictures of student and teacher against the teacher's from the same noise in many steps.

    Args:
        task: Gives captions.
        config: How the student was made.
        made: The student, measured as it is saved, and the judge.
        teacher: What it was made of.
        count: Held-out captions.

    Returns:
        By way of sampling: forwards of the backbone per picture, PSNR in dB of values cut to
        [-1, 1], and the share of what the captions ask for that the judge sees.
    """
    student = made.backbone.half().float()
    device = next(student.parameters()).device
    steps, scale = config.num_steps, config.guidance
    ways: dict[str, tuple[Any, int, Sampler, float]] = {
        "truth": (teacher, LIMIT, "unipc", scale),
        "student": (student, steps, "euler", 1.0),
        "teacher": (teacher, steps, "unipc", scale),
        "teacher unguided": (teacher, steps, "unipc", 1.0),
    }
    rows: dict[str, Any] = {}
    truth = torch.empty(0)
    for name, (model, number, sampler, guidance) in ways.items():
        images, _ = sample(
            task,
            model.to(device),
            count,
            seed=noise_seed(0),
            num_steps=number,
            sampler=sampler,
            guidance=guidance,
        )
        truth = images if name == "truth" else truth
        rows[name] = {
            "steps": number,
            "sampler": sampler,
            "guidance": guidance,
            "forwards": number * (1 if guidance == 1.0 else 2),
            "psnr": decibels(squared_errors(images, truth)),
            "right": score(task, made.judge, images).right,
        }
    return {"count": count, "seed": noise_seed(0), "rows": rows}
