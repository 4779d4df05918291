"""Sampling a demo backbone through the stock pipeline, and judging what comes out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.metrics import frechet_distance, kernel_distance
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.clock import Clock, SchedulerTimes
from shiva_dit.models.sampling import listed_times
from shiva_dit.pictures.samplers import FLOW_SOLVERS, Sampler, steps_by

UNNAMED: Sampler = "euler_diffusers"
"""That of records which name none."""
NUM_STEPS = 12
VAE_SCALE = 8  # the stock pipeline divides by this; without an autoencoder a latent is a pixel


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What the judge says of a set of generated images."""

    right: dict[str, float]
    """Share of what the captions ask for that the judge sees, in [0, 1]; "all" and by attribute."""
    frechet: float
    """Frechet distance to all held-out real images in the judge's features."""
    kernel: float
    """Kernel distance (KID) to the same."""


def sample(
    task: DemoTask,
    backbone: nn.Module,
    count: int,
    *,
    seed: int,
    start: int = 0,
    num_steps: int = NUM_STEPS,
    sampler: Sampler = "euler",
    guidance: float = 1.0,
) -> tuple[Float[Tensor, "N C H W"], float]:
    """Images of the task's prompts by the stock SD3 pipeline, and the CPU seconds they took.

    Args:
        task: Gives prompts and pipeline.
        backbone: On its device, with or without an adapter attached.
        count: Number of images.
        seed: Of the initial noise: the same for every method that is compared.
        start: First prompt.
        num_steps: Sampler steps, each a forward.
        sampler: How the steps are made.
        guidance: Guidance scale; 1 is none, the harsher test.

    Returns:
        The images, on the CPU, and the seconds.
    """
    pipe = task.pipeline(backbone)
    began = time.process_time()
    images = sample_through(
        task,
        pipe,
        count,
        seed=seed,
        start=start,
        num_steps=num_steps,
        sampler=sampler,
        guidance=guidance,
    )
    return images, time.process_time() - began


def sample_through(
    task: DemoTask,
    pipe: Any,
    count: int,
    *,
    seed: int,
    start: int,
    num_steps: int,
    sampler: Sampler,
    guidance: float,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "N C H W"]:
    """As `sample`, through a pipeline that is there, whose scheduler is replaced.

    Height and width are the task's by default.
    """
    device = next(pipe.transformer.parameters()).device
    captions = task.prompts(start, count)[0]
    conditioning = {name: value.to(device) for name, value in task.conditioning(captions).items()}
    height, width = size or (task.image_size, task.image_size)
    shape = (count, task.channels, height, width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pipe.scheduler = _scheduler(sampler)
    with following(pipe):
        images = pipe(
            prompt_embeds=conditioning["encoder_hidden_states"],
            pooled_prompt_embeds=conditioning["pooled_projections"],
            negative_prompt_embeds=torch.zeros_like(conditioning["encoder_hidden_states"]),
            negative_pooled_prompt_embeds=torch.zeros_like(conditioning["pooled_projections"]),
            height=VAE_SCALE * height,
            width=VAE_SCALE * width,
            **steps_by(sampler, num_steps),
            guidance_scale=guidance,
            latents=noise.to(device),
            output_type="latent",
        ).images
    return images.cpu()


def noise_seed(seed: int) -> int:
    """Sampling noise of a seed: apart from the training's, the same for all contestants."""
    return 1000 * (seed + 1)


@contextmanager
def following(pipe: Any) -> Iterator[None]:
    """Within: what is attached to a pipeline's model knows the pipeline's steps."""
    attachment = attachment_of(pipe.transformer)
    if attachment is None:
        yield
        return
    counts = attachment.counts
    before, counts.clock = counts.clock, Clock(SchedulerTimes(pipe, pipe.transformer))
    try:
        yield
    finally:
        counts.clock = before


def _scheduler(sampler: Sampler) -> Any:
    solver = FLOW_SOLVERS.get(sampler)
    if solver is not None:
        return solver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
    return FlowMatchEulerDiscreteScheduler()


def sampler_times(num_steps: int, sampler: Sampler = "euler") -> list[float]:
    """The times t that a sampler visits, noisiest first."""
    scheduler = _scheduler(sampler)
    steps = steps_by(sampler, num_steps)
    scheduler.set_timesteps(steps.pop("num_inference_steps", None), **steps)
    return listed_times(scheduler, scheduler.timesteps.tolist())


@torch.no_grad()
def score(task: DemoTask, judge: Judge, images: Float[Tensor, "N C H W"]) -> Score:
    """The judge's verdict on images of the first prompts, as `sample` makes them."""
    features = judge.features(images)
    reference = judge.features(task.held_out_images)
    return Score(
        right=task.right(judge.head(features), task.prompts(0, len(images))[1]),
        frechet=frechet_distance(features, reference),
        kernel=kernel_distance(features, reference),
    )


@torch.no_grad()
def distance_between(
    judge: Judge, images: Float[Tensor, "N C H W"], others: Float[Tensor, "M C H W"]
) -> float:
    """Frechet distance between two sets of images in the judge's features.

    For two sets made from the same noise there is no floor: equal models have distance 0.
    """
    return frechet_distance(judge.features(images), judge.features(others))


@torch.no_grad()
def floors(task: DemoTask, judge: Judge, count: int) -> Score:
    """What `count` real images that are not among the held-out ones would score."""
    images, labels = task.real(count)
    features = judge.features(images)
    reference = judge.features(task.held_out_images)
    return Score(
        right=task.right(judge.head(features), labels),
        frechet=frechet_distance(features, reference),
        kernel=kernel_distance(features, reference),
    )
