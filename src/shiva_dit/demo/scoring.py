"""Sampling a demo backbone through the stock pipeline, and judging what comes out."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.demo.digits import DigitsTask, balanced_labels
from shiva_dit.demo.judge import Judge
from shiva_dit.metrics import frechet_distance

NUM_STEPS = 12
VAE_SCALE = 8  # the stock pipeline divides by this; without an autoencoder a latent is a pixel


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What the judge says of a set of generated digits."""

    correct: float
    """Share that the judge reads as the digit of the caption, in [0, 1]."""
    frechet: float
    """Frechet distance to all held-out real digits in the judge's features."""
    cpu_s: float
    """CPU seconds of sampling."""


def sample(
    task: DigitsTask,
    backbone: nn.Module,
    count: int,
    *,
    seed: int,
    num_steps: int = NUM_STEPS,
    guidance: float = 1.0,
) -> tuple[Float[Tensor, "N C H W"], float]:
    """Digits 0, 1, ..., 9, 0, ... by the stock SD3 pipeline, and the CPU seconds they took.

    Args:
        task: The digits.
        backbone: With or without an adapter attached.
        count: Number of images.
        seed: Of the initial noise: the same for every method that is compared.
        num_steps: Euler steps.
        guidance: Guidance scale; 1 is none, the harsher test.
    """
    labels = balanced_labels(count).tolist()
    conditioning = task.conditioning([task.caption(label) for label in labels])
    noise = torch.randn(
        count, 1, task.image_size, task.image_size, generator=torch.Generator().manual_seed(seed)
    )
    start = time.process_time()
    images = task.pipeline(backbone)(
        prompt_embeds=conditioning["encoder_hidden_states"],
        pooled_prompt_embeds=conditioning["pooled_projections"],
        negative_prompt_embeds=torch.zeros_like(conditioning["encoder_hidden_states"]),
        negative_pooled_prompt_embeds=torch.zeros_like(conditioning["pooled_projections"]),
        height=VAE_SCALE * task.image_size,
        width=VAE_SCALE * task.image_size,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
    ).images
    return images, time.process_time() - start


@torch.no_grad()
def score(
    task: DigitsTask, judge: Judge, images: Float[Tensor, "N C H W"], cpu_s: float = 0.0
) -> Score:
    """The judge's verdict on images made by `sample`."""
    labels = balanced_labels(len(images))
    return Score(
        correct=float((judge(images).argmax(1) == labels).double().mean()),
        frechet=distance_between(judge, images, task.held_out_images),
        cpu_s=cpu_s,
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
def frechet_floor(task: DigitsTask, judge: Judge, count: int, *, seed: int = 0) -> float:
    """Frechet distance of `count` real training digits to the held-out ones: the floor."""
    picked = torch.randperm(len(task), generator=torch.Generator().manual_seed(seed))[:count]
    return distance_between(judge, task.images[picked], task.held_out_images)
