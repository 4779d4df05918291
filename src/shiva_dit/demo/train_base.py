"""Training a demo backbone and its judge."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, pad
from torch.nn.functional import interpolate as resized

from shiva_dit.core.budget import logit_normal, stratified
from shiva_dit.demo.base import judge_accuracy, load_backbone, usable_device
from shiva_dit.demo.judge import Judge, JudgeTraining, shift
from shiva_dit.demo.learner import Learner, Learning
from shiva_dit.demo.made import Made, make_base
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import TASKS, load_task
from shiva_dit.training.data import drop_captions
from shiva_dit.training.objective import denoising_loss, interpolate
from shiva_dit.training.origin import origin


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseTraining(Learning):
    """How a demo backbone is trained from scratch (`recipes/*-base.toml`)."""

    start: str | None = None
    """The task whose shipped backbone it starts from, its places spread over this task's grid; None
    starts from random weights."""
    caption_dropout: float = 0.1
    """Probability of training a sample without its caption, in [0, 1]."""
    moved_share: float = 0.4
    """Share of the steps, from the first, whose images are moved by up to a pixel, in [0, 1]. It
    makes more of few images; but moved digits are no real ones, so the last word is theirs."""
    half_share: float = 0.0
    """Share of the steps, from the first, whose images have half their side, in [0, 1]: a quarter
    of the tokens, and of what a step costs."""
    judge: JudgeTraining = field(default_factory=JudgeTraining)
    """The judge's own training."""

    def __post_init__(self) -> None:
        Learning.__post_init__(self)
        if self.start is not None and self.start not in TASKS:
            raise ValueError(f"start: there is no task {self.start!r}; known: {', '.join(TASKS)}.")
        for name in ("caption_dropout", "moved_share", "half_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")


def train_base(
    task: DemoTask, config: BaseTraining, out: Path, device: str = "cpu", *, resume: bool = False
) -> dict[str, Any]:
    """Train a backbone and a judge, and write both with the record of how they were made.

    Args:
        task: The task that gives data and architectures.
        config: The recipe.
        out: Folder for the two safetensors files (fp16) and their record; made if needed.
        device: Where both are trained; pictures are drawn on the CPU.
        resume: Go on from the last checkpoint in the folder; from the beginning if there is none.

    Returns:
        The record: accuracy of the judge on unseen real images, CPU seconds, configuration.

    Raises:
        ValueError: If the folder holds weights or another run already, another process is at work
            in it, or there is no such device.
        TrainingInterrupted: After Ctrl-C or SIGTERM, when all was saved.
        FloatingPointError: If the loss is not finite; no weights are written then.
    """
    usable_device(device)
    return make_base(task, out, partial(_trained, task, config, device), resume=resume)


def _trained(task: DemoTask, config: BaseTraining, device: str, checkpoints: Path) -> Made:
    """The backbone and the judge, from the beginning or the last checkpoint."""
    place = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        judge = task.build_judge()
        torch.manual_seed(config.seed)  # of its own: the judge's training must not change it
        model: Any = task.build_backbone()
        if config.start is not None:
            start_from(model, load_backbone(load_task(config.start)))
        learner = Learner(
            model.to(place),
            config,
            len(task),
            checkpoints=checkpoints,
            origin=origin(model, task),
        )
        learner.kept["judge"] = judge
        if not learner.resume():
            learner.notes = _train_judge(judge, task, config, place)
            learner.save()
        judge.eval()
        learner.run(partial(_loss, task, config, learner, place), f"{task.name} backbone")
    record = {
        "what": f"{task.name}-base",
        "config": config,
        "device": device,
        **learner.notes,
        "backbone_cpu_s": learner.cpu_s,
        "final_loss": learner.loss,
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }
    return Made(record, learner.trained, judge)


def _train_judge(
    judge: Judge, task: DemoTask, config: BaseTraining, place: torch.device
) -> dict[str, Any]:
    """Train the judge in place, and say what it is worth."""
    began = time.process_time()
    judge.to(place)
    generator = torch.Generator().manual_seed(config.seed)
    task.train_judge(judge, config.judge, generator)
    judge.cpu()
    return {
        "judge_accuracy_on_held_out": judge_accuracy(judge, task),
        "judge_cpu_s": time.process_time() - began,
    }


def _loss(
    task: DemoTask, config: BaseTraining, learner: Learner, place: torch.device, step: int
) -> Tensor:
    """Flow matching on the step's batch."""
    generator = learner.generator
    batch = task.batch(learner.indices.take(config.batch_size), generator)
    if step < config.moved_share * config.steps:
        batch = dataclasses.replace(batch, latents=shift(batch.latents, generator))
    halved = step < config.half_share * config.steps
    if halved:
        batch = dataclasses.replace(batch, latents=avg_pool2d(batch.latents, 2))
    batch = drop_captions(batch, task.unconditional(), config.caption_dropout, generator)
    t = logit_normal(stratified(config.batch_size, generator))
    noise = torch.randn(batch.latents.shape, generator=generator)
    batch, t, noise = batch.to(place), t.to(place), noise.to(place)
    inputs = {
        "hidden_states": interpolate(batch.latents, noise, t),
        "timestep": t * 1000.0,
        "return_dict": False,
        **batch.conditioning,
    }
    places = half_places(learner.model) if halved else {}
    prediction = functional_call(learner.model, places, kwargs=inputs)[0]
    return denoising_loss(prediction, noise - batch.latents)


def half_places(model: Any) -> dict[str, Tensor]:
    """The places with which a backbone sees images of half the side: each the mean of four.

    A model takes the middle of its table for a smaller image. For an image that is all there, only
    coarser, the middle has to hold places that span the whole.

    Args:
        model: A backbone with a table of s x s places, s divisible by 4.

    Returns:
        The table, (1, s * s, D), under its name in the model's state.
    """
    name = "pos_embed.pos_embed"
    table = model.get_buffer(name)
    side = math.isqrt(table.shape[1])
    grid = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = pad(avg_pool2d(grid, 2), [side // 4] * 4)
    return {name: grid.flatten(2).transpose(1, 2)}


@torch.no_grad()
def start_from(model: Any, other: Any) -> None:
    """Give a backbone another's weights, its places spread over this one's grid.

    Raises:
        ValueError: If they differ in more than their grids.
    """
    state, own = other.state_dict(), model.state_dict()
    places = own["pos_embed.pos_embed"]  # (1, N, D)
    side, old = (math.isqrt(p.shape[1]) for p in (places, state["pos_embed.pos_embed"]))
    grid = state["pos_embed.pos_embed"].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = resized(grid, size=(side, side), mode="bicubic", align_corners=False)
    state["pos_embed.pos_embed"] = grid.flatten(2).transpose(1, 2)
    shapes, wanted = ({n: tuple(v.shape) for n, v in one.items()} for one in (state, own))
    wrong = sorted(n for n in {*shapes, *wanted} if shapes.get(n) != wanted.get(n))
    if wrong:
        raise ValueError(
            f"start: the backbones differ in more than their grids: {wrong[0]} is "
            f"{shapes.get(wrong[0])} there and {wanted.get(wrong[0])} here."
        )
    model.load_state_dict(state)
