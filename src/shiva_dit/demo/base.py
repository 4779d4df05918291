"""Training a demo backbone and its judge from scratch, and loading the shipped ones."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch.nn.functional import interpolate as resized
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from shiva_dit.config import LARGEST_SEED, check_types, whole_number
from shiva_dit.core.budget import logit_normal, stratified
from shiva_dit.demo.judge import Judge, JudgeTraining, shift, train_judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import TASKS, load_task
from shiva_dit.ownership import owned
from shiva_dit.provenance import load_tensors, provenance, write_atomically, write_json
from shiva_dit.signals import undisturbed
from shiva_dit.training.data import ShuffledIndices, drop_captions
from shiva_dit.training.objective import denoising_loss, interpolate

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


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseTraining:
    """How a demo backbone is trained from scratch (`recipes/*-base.toml`)."""

    task: str = "digits"
    """"digits", "scenes" or "scenes64"."""
    seed: int = 0
    """Of initial weights, data order and noise."""
    start: str | None = None
    """The task whose shipped backbone it starts from, its places spread over this task's grid; None
    starts from random weights."""
    steps: int = 2500
    """Optimizer steps."""
    batch_size: int = 16
    """Images per step. Small: at equal cost, more steps with fewer images draw better digits."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW; risen to, held, then decayed linearly to 0."""
    warmup_steps: int = 60
    """Steps over which the rate rises."""
    decay_share: float = 0.6
    """Share of the steps over which the rate decays, in (0, 1]."""
    ema: float = 0.997
    """Decay of the exponential moving average of the weights, which is what is kept, in [0, 1)."""
    caption_dropout: float = 0.1
    """Probability of training a sample without its caption, in [0, 1]."""
    moved_share: float = 0.4
    """Share of the steps, from the first, whose images are moved by up to a pixel, in [0, 1]. It
    makes more of few images; but moved digits are no real ones, so the last word is theirs."""
    judge: JudgeTraining = field(default_factory=JudgeTraining)
    """The judge's own training."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("seed", self.seed, least=0, most=LARGEST_SEED)
        if self.start is not None and self.start not in TASKS:
            raise ValueError(f"start: there is no task {self.start!r}; known: {', '.join(TASKS)}.")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 < self.learning_rate < 1.0:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}.")
        if not 0.0 < self.decay_share <= 1.0:
            raise ValueError(f"decay_share must lie in (0, 1], got {self.decay_share}.")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}.")
        for name in ("caption_dropout", "moved_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, as a share of the peak."""
        rise = (step + 1) / max(self.warmup_steps, 1)
        fall = (self.steps - step) / (self.steps * self.decay_share)
        return min(1.0, rise, fall)


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


def train_base(
    task: DemoTask, config: BaseTraining, out: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Train a backbone and a judge, and write both with the record of how they were made.

    Args:
        task: The task that gives data and architectures.
        config: The recipe.
        out: Folder for the two safetensors files (fp16) and their record; made if needed.
        device: Where both are trained; pictures are drawn on the CPU.

    Returns:
        The record: accuracy of the judge on unseen real images, CPU seconds, configuration.

    Raises:
        ValueError: If the folder holds weights already, another process is at work in it, or there
            is no such device.
        FloatingPointError: If the loss is not finite; nothing is written then.
    """
    place = usable_device(device)
    with owned(out):
        for name in (backbone_file(task), judge_file(task), record_file(task)):
            if (out / name).exists():
                raise ValueError(
                    f"{out} holds {name} already: train into another folder, or move it away."
                )
        record, backbone, judge = _trained(task, config, place)
        modules = {backbone_file(task): backbone, judge_file(task): judge}
        try:
            for name, module in modules.items():
                write_atomically(out / name, partial(save_file, _half(module)))
            write_json(out / record_file(task), {**record, "device": device})
        except BaseException:
            with undisturbed():
                for name in (*modules, record_file(task)):
                    (out / name).unlink(missing_ok=True)
            raise
    return {**record, "device": device}


def _trained(
    task: DemoTask, config: BaseTraining, place: torch.device
) -> tuple[dict[str, Any], torch.nn.Module, Judge]:
    """The record, the backbone and the judge."""
    start = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        judge = task.build_judge().to(place)
        generator = torch.Generator().manual_seed(config.seed)
        train_judge(judge, task.judge_batch, task.judge_loss, config.judge, generator)
        judge = judge.cpu()
        accuracy = judge_accuracy(judge, task)
        judge_seconds = time.process_time() - start
        torch.manual_seed(config.seed)  # of its own: the judge's training must not change it
        backbone, final_loss = _train_backbone(task, config, place)
    record: dict[str, Any] = {
        "what": f"{task.name}-base",
        "config": config,
        "judge_accuracy_on_held_out": accuracy,
        "judge_cpu_s": judge_seconds,
        "backbone_cpu_s": time.process_time() - start - judge_seconds,
        "final_loss": final_loss,
        "num_parameters": sum(p.numel() for p in backbone.parameters()),
        "provenance": provenance(),
    }
    return record, backbone, judge


def _half(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's state in half precision, to save."""
    return {
        key: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for key, value in sorted(module.state_dict().items())
    }


def _train_backbone(
    task: DemoTask, config: BaseTraining, device: torch.device
) -> tuple[torch.nn.Module, float]:
    generator = torch.Generator().manual_seed(config.seed)
    model: Any = task.build_backbone()
    if config.start is not None:
        _start_from(model, load_backbone(load_task(config.start)))
    model.train().to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate)
    indices = ShuffledIndices(len(task), config.seed)
    unconditional = task.unconditional()
    running = 0.0
    bar = tqdm(range(config.steps), desc=f"{task.name} backbone", unit="step")
    for step in bar:
        batch = task.batch(indices.take(config.batch_size), generator)
        if step < config.moved_share * config.steps:
            batch = dataclasses.replace(batch, latents=shift(batch.latents, generator))
        batch = drop_captions(batch, unconditional, config.caption_dropout, generator)
        t = logit_normal(stratified(config.batch_size, generator))
        noise = torch.randn(batch.latents.shape, generator=generator)
        batch, t, noise = batch.to(device), t.to(device), noise.to(device)
        prediction = model(
            hidden_states=interpolate(batch.latents, noise, t),
            timestep=t * 1000.0,
            return_dict=False,
            **batch.conditioning,
        )[0]
        loss = denoising_loss(prediction, noise - batch.latents)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is not finite at step {step}: lower learning_rate. Nothing was written."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
    return average.module.eval(), running


@torch.no_grad()
def _start_from(model: Any, other: Any) -> None:
    """Give a backbone another's weights, its places spread over this one's grid.

    Raises:
        ValueError: If they differ in more than their grids.
    """
    state = other.state_dict()
    places = model.pos_embed.pos_embed  # (1, N, D)
    side, old = (math.isqrt(p.shape[1]) for p in (places, other.pos_embed.pos_embed))
    grid = other.pos_embed.pos_embed.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = resized(grid, size=(side, side), mode="bicubic", align_corners=False)
    state["pos_embed.pos_embed"] = grid.flatten(2).transpose(1, 2)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"start: the backbones differ in more than their grids: {error}"
        ) from error


@torch.no_grad()
def judge_accuracy(judge: Judge, task: DemoTask) -> dict[str, float]:
    """Share of unseen real images that the judge reads right, in [0, 1], by attribute."""
    return task.right(judge(task.held_out_images), task.held_out_labels)


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
