"""What a pruned backbone does to held-out images: its error, and which tokens it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from shiva_dit.demo.task import DemoTask
from shiva_dit.models.attachment import Attachment
from shiva_dit.training.objective import interpolate

NUM_TIMES = 16
IMAGES_PER_TIME = 32
Captions = Literal["true", "empty", "swapped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Means over held-out images and times."""

    error: float | None = None
    """Squared error of the predicted velocity to the unpruned model's: the distillation error; None
    where what a model predicts depends on the steps before."""
    ink_kept: float | None = None
    """Share of the tokens with ink that the pruned blocks keep; None where nothing is pruned."""
    cosine: float | None = None
    """Cosine of that velocity to the unpruned model's, mean over images; None in older records."""


@torch.no_grad()
def held_out(task: DemoTask, dense: Any, pruned: Any, attachment: Attachment | None) -> HeldOut:
    """Compare a model with the unpruned one on held-out images with their captions.

    16 times, the middles of equal strata, with 32 images each; noise and images are always the
    same, so that two calls differ by the models alone.

    Args:
        task: Gives the images.
        dense: The unpruned model.
        pruned: The other one, on the same device.
        attachment: What is attached to it, if anything.
    """
    device = next(dense.parameters()).device
    errors, cosines, kept = [], [], []
    for index in range(NUM_TIMES):
        first = index * IMAGES_PER_TIME
        images = [i % len(task.held_out_images) for i in range(first, first + IMAGES_PER_TIME)]
        arguments = noisy_arguments(task, images, (index + 0.5) / NUM_TIMES, "true")
        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        with recorded(attachment) as chosen:
            ours = pruned(**arguments)[0]
        theirs = dense(**arguments)[0]
        errors.append(float((ours - theirs).square().mean()))
        cosines.append(float(F.cosine_similarity(ours.flatten(1), theirs.flatten(1)).mean()))
        ink = task.ink(images)
        kept += [float(mask[ink].double().mean()) for mask in masks(chosen, ink.shape[1])]
    return HeldOut(
        error=sum(errors) / len(errors),
        ink_kept=sum(kept) / len(kept) if kept else None,
        cosine=sum(cosines) / len(cosines),
    )


def noisy_arguments(
    task: DemoTask, images: list[int], t: float, captions: Captions
) -> dict[str, Any]:
    """What a model is called with: held-out images at time t.

    Args:
        task: Gives images and captions.
        images: Indices of held-out images.
        t: Time in [0, 1]; at 1 nothing of the image is left.
        captions: "true": the image's own; "empty": none; "swapped": the next image's.
    """
    own = task.held_out_captions(images)
    texts = {"true": own, "empty": [""] * len(own), "swapped": own[1:] + own[:1]}[captions]
    clean = task.held_out_images[images]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(images[0]))
    times = torch.full((len(images),), t)
    return {
        "hidden_states": interpolate(clean, noise, times),
        "timestep": 1000.0 * times,
        "return_dict": False,
        **task.conditioning(texts),
    }


@contextmanager
def recorded(attachment: Attachment | None) -> Iterator[list[tuple[int, Tensor]]]:
    """Within: each pruned block's index and chosen tokens (B, k) are appended to the list."""
    chosen: list[tuple[int, Tensor]] = []
    if attachment is not None:
        attachment.forwards.observer = lambda block, tokens: chosen.append((block, tokens))
    try:
        yield chosen
    finally:
        if attachment is not None:
            attachment.forwards.observer = None


def masks(chosen: list[tuple[int, Tensor]], num_tokens: int) -> list[Bool[Tensor, "B N"]]:
    """Chosen tokens as masks on the CPU, one per pruned block."""
    return [
        torch.zeros(len(tokens), num_tokens, dtype=torch.bool).scatter(1, tokens.cpu(), True)
        for _, tokens in chosen
    ]
