"""One method of the quickstart with one seed: train it, sample, judge."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm import tqdm

from shiva_dit.core.flops import condition_flops
from shiva_dit.core.schedule import Schedule
from shiva_dit.demo.base import load_backbone, load_judge
from shiva_dit.demo.digits import MAX_WORDS, DigitsTask
from shiva_dit.demo.maps import kept_maps
from shiva_dit.demo.scoring import NUM_STEPS, Score, sample, score
from shiva_dit.methods.random_tokens import RandomSelector
from shiva_dit.methods.shiva import ShivaSelector
from shiva_dit.models.attach import Attachment, attach
from shiva_dit.models.backbone import TunedBackbone
from shiva_dit.models.families import model_spec
from shiva_dit.modules import LAYER_DIM
from shiva_dit.training.recipe import Method, TrainConfig
from shiva_dit.training.trainer import Trainer

NAMES: dict[str, str] = {
    "dense": "unpruned",
    "random": "random, no training",
    "shiva": "Shiva",
    "random_tuned": "random + fine-tuning",
    "centre_tuned": "fixed centre map + fine-tuning",
    "fixed_map_tuned": "fixed learned map + fine-tuning",
    "norm_tuned": "feature norm + fine-tuning",
    "dense_tuned": "unpruned, fine-tuned",
    "fewer_steps": "unpruned, fewer steps",
}
CONTROLS: dict[str, Method] = {
    "random_tuned": "random",
    "centre_tuned": "centre",
    "fixed_map_tuned": "fixed_map",
    "norm_tuned": "norm",
    "dense_tuned": "dense",
}

MIN_COUNT = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """One run of `shiva-dit quickstart`."""

    keep_ratio: float = 0.4
    """Mean share of tokens kept in the pruned blocks, in (0, 1)."""
    seeds: tuple[int, ...] = (0,)
    """Each trains and samples everything once; the table then gives mean and spread."""
    all_controls: bool = False
    """Also: fixed maps, feature norm, the dense model fine-tuned, fewer steps."""
    count: int = 300
    """Images that are judged, per method and seed."""
    workers: int = 2
    """Methods that run at a time, each in a process of one thread."""
    recipe: TrainConfig = field(default_factory=TrainConfig)
    """How the adapter and the controls are trained."""

    def __post_init__(self) -> None:
        if self.count < MIN_COUNT:
            raise ValueError(
                f"count must be at least {MIN_COUNT} (the picture shows ten digits, and a distance "
                f"needs more), got {self.count}."
            )
        if not self.seeds:
            raise ValueError("seeds must be at least 1.")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}.")
        if self.recipe.backbone == "frozen":
            raise ValueError(
                "the controls are compared after fine-tuning: a frozen backbone leaves them "
                'nothing to train. Use backbone = "full", "lora" or "dora".'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One method's result for one seed."""

    score: Score
    flops: float
    """FLOPs per image, all sampler steps."""
    train_s: float
    """CPU seconds of training, 0 for none."""
    images: Tensor
    """All that were judged: a zero to a nine, and again."""
    keep_ratio: float = 1.0
    """Executed mean over the sampler's steps and the pruned blocks."""
    maps: Tensor | None = None
    """Kept tokens of the first ten, (L, T, 10, N): ours only."""


def start_worker(lock: Any) -> None:
    """Set up a process that runs tasks; the lock keeps progress bars apart."""
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # each process would repeat the libraries' notices


def run_task(task: tuple[QuickstartConfig, str, int]) -> Outcome:
    """One method with one seed: train it if it is trained, then sample."""
    config, method, seed = task
    digits = DigitsTask()
    backbone = load_backbone(digits)
    if method == "dense":
        return sample_and_judge(config, method, seed, digits, backbone, None)
    if method == "random":
        schedule = Schedule.uniform(config.keep_ratio, num_blocks=digits.num_blocks)
        selector = RandomSelector(torch.Generator().manual_seed(seed))
        attachment = attach(backbone, selector, schedule)
        return sample_and_judge(config, method, seed, digits, backbone, attachment)
    with tempfile.TemporaryDirectory() as out:
        recipe = dataclasses.replace(
            config.recipe,
            method=CONTROLS.get(method, "shiva"),
            keep_ratio=config.keep_ratio,
            seed=seed,
            out=Path(out),
        )
        trainer = Trainer(recipe, load_backbone(digits), digits)
        start = time.process_time()
        trained = trainer.run(description=_label("train", config, method, seed), position=_place())
        seconds = time.process_time() - start
        trainer.close()
    TunedBackbone(backbone, trained.backbone_weights, trained.lora)
    attachment = None
    if trained.selector is not None:
        attachment = attach(backbone, trained.selector, trained.schedule)
    outcome = sample_and_judge(config, method, seed, digits, backbone, attachment)
    maps = None
    if method == "shiva" and attachment is not None:
        maps = kept_maps(digits, attachment, 10, seed=_noise_seed(seed))
    return dataclasses.replace(outcome, train_s=seconds, maps=maps)


def sample_and_judge(
    config: QuickstartConfig,
    method: str,
    seed: int,
    task: DigitsTask,
    backbone: Any,
    attachment: Attachment | None,
    num_steps: int = NUM_STEPS,
) -> Outcome:
    """Sample and judge; the noise is the same for all methods of a seed."""
    sizes = [100] * (config.count // 100) + [config.count % 100] * bool(config.count % 100)
    parts, seconds = [], 0.0
    label = _label("sample", config, method, seed)
    for part, size in enumerate(
        tqdm(sizes, desc=label, unit="x100", position=_place(), leave=False)
    ):
        noise_seed = _noise_seed(seed) + part
        images, cpu_s = sample(task, backbone, size, seed=noise_seed, num_steps=num_steps)
        parts.append(images)
        seconds += cpu_s
    images = torch.cat(parts)
    keep_ratio = 1.0
    if attachment is not None:
        table = attachment.table(task.num_tokens)
        keep_ratio = table.mean_keep_ratio_at(sampler_times(num_steps))
    return Outcome(
        score=score(task, load_judge(task), images, seconds),
        flops=flops_per_image(backbone, attachment, num_steps),
        train_s=0.0,
        images=images,
        keep_ratio=keep_ratio,
    )


def _label(what: str, config: QuickstartConfig, method: str, seed: int) -> str:
    name = f"{what:6} {NAMES[method]}"
    return f"{name}, seed {seed}" if len(config.seeds) > 1 else name


def _place() -> int:
    """Line of this process's progress bar."""
    identity = multiprocessing.current_process()._identity
    return (identity[0] - 1) if identity else 0


def flops_per_image(backbone: Any, attachment: Attachment | None, num_steps: int) -> float:
    """True FLOPs of one image: every sampler step with its own number of tokens."""
    spec = model_spec(backbone)
    num_tokens = (backbone.config.sample_size // backbone.config.patch_size) ** 2
    flops = spec.flops(backbone, num_tokens, MAX_WORDS)
    if attachment is None:
        return float(num_steps * flops.dense())
    hidden = condition = 0
    if isinstance(attachment.selector, ShivaSelector):
        dims = spec.dims(backbone)
        hidden = attachment.selector.router.hidden
        condition = condition_flops(dims.time_dim, dims.context_dim, LAYER_DIM, hidden)
    table = attachment.table(num_tokens)
    rows = [table.row(t) for t in sampler_times(num_steps)]
    return float(sum(flops.pruned(row, hidden, condition) for row in rows))


def sampler_times(num_steps: int) -> list[float]:
    """The times t that the demo's sampler visits, noisiest first."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    return (scheduler.timesteps / scheduler.config.num_train_timesteps).tolist()


def _noise_seed(seed: int) -> int:
    """Sampling noise of a seed: apart from the training's, the same for all methods."""
    return 1000 * (seed + 1)
