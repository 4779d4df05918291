"""Arguments of a model's forward, made for any size from its config: a family lists makers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How large an example is, in tokens."""

    frames: int = 1
    height: int
    width: int
    text: int
    """T."""
    batch: int = 1
    draw: Callable[..., Tensor] = torch.zeros
    """Values for a shape: what is given to it by dimensions."""

    @property
    def tokens(self) -> int:
        """N."""
        return self.frames * self.height * self.width


Input = Callable[[Any, Size], Any]
"""The value of one argument, from the model and the size; None where the model takes none."""


def patches(model: Any, dims: int) -> tuple[int, ...]:
    """Latents per token along each side, by the config; `dims` 2 for images, 3 for videos."""
    patch = model.config.patch_size
    if not isinstance(patch, int):
        return tuple(patch)
    return (patch, patch) if dims == 2 else (model.config.get("patch_size_t") or 1, patch, patch)


def image(model: Any, size: Size) -> Float[Tensor, "B C H W"]:
    """Latents of an image."""
    high, wide = patches(model, 2)
    channels = model.config.in_channels
    return size.draw(size.batch, channels, size.height * high, size.width * wide)


def video(channels: str = "in_channels") -> Input:
    """Latents (B, C, F, H, W) of a video, of as many channels as a setting says."""

    def make(model: Any, size: Size) -> Float[Tensor, "B C F H W"]:
        sides = zip((size.frames, size.height, size.width), patches(model, 3), strict=True)
        return size.draw(size.batch, model.config[channels], *(s * patch for s, patch in sides))

    return make


def packed(model: Any, size: Size) -> Float[Tensor, "B N C"]:
    """Latents as one row per token."""
    return size.draw(size.batch, size.tokens, model.config.in_channels)


def text(*names: str) -> Input:
    """Embeddings (B, T, ...) of the text, as wide as the first of these settings that says it."""

    def make(model: Any, size: Size) -> Float[Tensor, "B T ..."]:
        widths = [model.config[name] for name in names if model.config[name] is not None]
        return size.draw(size.batch, size.text, widths[0])

    return make


def vector(name: str) -> Input:
    """One vector for each sample, as wide as a setting says."""
    return lambda model, size: size.draw(size.batch, model.config[name])


def number(value: float, where: str | None = None) -> Input:
    """A number for each sample; where a setting is named, for models alone that have it on."""

    def make(model: Any, size: Size) -> Tensor | None:
        if where is not None and not model.config.get(where):
            return None
        return torch.full((size.batch,), value)

    return make


def mask(dtype: torch.dtype = torch.long) -> Input:
    """A mask of the text, (B, T), that leaves nothing out."""
    return lambda model, size: torch.ones(size.batch, size.text, dtype=dtype)


def angles(width: str) -> Input:
    """Cosines and sines of the image's positions, (N, width) each, as pipelines hand them over."""
    return lambda model, size: (torch.ones(size.tokens, model.config[width]),) * 2


def image_ids(model: Any, size: Size) -> Float[Tensor, "N 3"]:
    """Row and column of each token, behind a zero."""
    del model
    places = torch.cartesian_prod(
        *(torch.arange(side) for side in (size.frames, size.height, size.width))
    )
    return places.float()


def text_ids(model: Any, size: Size) -> Float[Tensor, "T 3"]:
    """Zeros for each text token."""
    del model
    return torch.zeros(size.text, 3)


def image_ids_of_four(model: Any, size: Size) -> Float[Tensor, "N 4"]:
    """Row and column, between zeros."""
    return torch.nn.functional.pad(image_ids(model, size), (0, 1))


def text_ids_of_four(model: Any, size: Size) -> Float[Tensor, "T 4"]:
    """Zeros for each text token, and its place in the text."""
    return torch.cat([text_ids(model, size), torch.arange(size.text)[:, None]], dim=1)
