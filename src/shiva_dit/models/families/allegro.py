"""Allegro: video, cross attention, positions by which every block looks its rotary tables up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shiva_dit.core.flops import CrossBlockShape, ModelFlops
from shiva_dit.models.rows import key_bias
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    given,
    mean_text,
)


def _tokens(model: Any, sample: Float[Tensor, "B C F H W"]) -> int:
    config = model.config
    frames, height, width = sample.shape[2:]
    patch = config.patch_size
    return (frames // config.patch_size_t) * (height // patch) * (width // patch)


def _text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    """The mean of the text, which pipelines give with a dimension more, (B, 1, T, Dc)."""
    text: Tensor = given(model, arguments, "encoder_hidden_states")
    return mean_text(text.flatten(1, -2), arguments.get("encoder_attention_mask"))


def _own_tokens(model: Any) -> int:
    config = model.config
    shape = config.sample_frames, config.sample_height, config.sample_width
    return _tokens(model, torch.empty((1, config.in_channels, *shape), device="meta"))


def _positions(
    embedding: tuple[Any, tuple[Int[Tensor, "1 N"], ...]],
    chosen: Int[Tensor, "B k"],
    num_tokens: int,
) -> tuple[Any, tuple[Int[Tensor, "B k"], ...]]:
    """Rotary tables by coordinate, and every token's three coordinates: these are gathered."""
    del num_tokens
    tables, positions = embedding
    return tables, tuple(along[0][chosen] for along in positions)


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=model.config.caption_channels,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    block = CrossBlockShape(
        width=width,
        text_tokens=text_tokens,
        text_width=config.cross_attention_dim,
        feed_forward=4 * width,
    )
    macs = num_tokens * width * config.patch_size**2 * (config.in_channels + config.out_channels)
    macs += text_tokens * (config.caption_channels * width + width * width)
    macs += 256 * width + width * width + 6 * width * width
    blocks = (block,) * config.num_layers
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="AllegroTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": _positions, "attention_mask": key_bias},
    ),
)

MODELS = (
    ModelSpec(
        model_class="AllegroTransformer3DModel",
        name="Allegro",
        context_is="mean of the text",
        block_lists=("transformer_blocks",),
        least_tokens=2,  # they drop a dimension of one
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        diffusion=True,
        time_embedder="adaln_single.emb.timestep_embedder",
        context=_text,
        guidance="one batch",
        text_tokens=512,
        tokens=_tokens,
        own_tokens=_own_tokens,
        dims=_dims,
        flops=_flops,
    ),
)
