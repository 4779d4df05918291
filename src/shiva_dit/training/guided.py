"""Guidance in training: both passes of a sample in one batch, and what they are combined to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.models.guidance import Pass
from shiva_dit.models.spec import ModelSpec
from shiva_dit.training.data import Batch

TOLD = "guidance"
"""Argument by which a model is told its guidance, where it learned it (Flux)."""


def is_told(model: Any, spec: ModelSpec) -> bool:
    """Whether a model is told its guidance, and then runs in one pass."""
    return TOLD in spec.inputs and bool(getattr(model.config, "guidance_embeds", False))


def passes_in_training(
    model: Any, spec: ModelSpec, guidance: tuple[float, float] | None, sample: Batch
) -> Pass:
    """How a sample's passes go into one batch: as the model's pipelines run them.

    Args:
        model: The transformer.
        spec: Of it.
        guidance: Lowest and highest scale; None without.
        sample: What it is given.

    Raises:
        ValueError: If it has to be told a scale, and nobody does.
    """
    told = is_told(model, spec)
    if guidance is None and told and TOLD not in {**sample.conditioning, **sample.shared}:
        raise ValueError(
            f"{type(model).__name__} is told its guidance: say which scales it is used with, such "
            "as guidance=[1,7]."
        )
    if guidance is None or told:
        return Pass.ALONE
    return Pass.BOTH if spec.guidance == "one batch" else Pass.PAIR


def both_ways(batch: Batch, empty: Mapping[str, Tensor]) -> Batch:
    """Every sample twice: all without a caption, then all with theirs.

    Args:
        batch: B samples.
        empty: Conditioning of "no caption", without a batch dimension; what isn't there is the
            same with a caption and without.

    Returns:
        2 B samples.
    """
    conditioning = {
        name: torch.cat([empty.get(name, value).to(value).expand_as(value), value])
        for name, value in batch.conditioning.items()
    }
    return replace(
        batch,
        latents=batch.latents.repeat(2, *[1] * (batch.latents.ndim - 1)),
        conditioning=conditioning,
    )


def guided(
    prediction: Float[Tensor, "P ..."], scales: Float[Tensor, " B"]
) -> Float[Tensor, "B ..."]:
    """The guided prediction u + g (c - u) of halves without (u) and with (c) a caption.

    >>> guided(torch.tensor([[1.0], [2.0]]), torch.tensor([4.0]))
    tensor([[5.]])
    """
    without, with_caption = prediction.chunk(2)
    g = scales.view(-1, *[1] * (prediction.ndim - 1)).to(prediction)
    return without + g * (with_caption - without)
