"""HunyuanVideo and HunyuanImage: double and single blocks as Flux has, the text last, padded."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.flops import JointBlockShape, ModelFlops, SharedBlockShape
from shiva_dit.models.rows import after_text, mask_before_text
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, pooled_text, text_mean

GLYPH_TOKENS = 128
"""Tokens of HunyuanImage's second encoder, as its pipeline pads them."""


def _patch(model: Any) -> tuple[int, int, int]:
    config = model.config
    return config.patch_size_t, config.patch_size, config.patch_size


def _tokens(model: Any, sample: Float[Tensor, "B C F H W"]) -> int:
    sides = zip(sample.shape[2:], _patch(model), strict=True)
    return math.prod(side // patch for side, patch in sides)


def _image_tokens(model: Any, sample: Float[Tensor, "B C ..."]) -> int:
    sides = zip(sample.shape[2:], model.config.patch_size, strict=True)
    return math.prod(side // patch for side, patch in sides)


def _width(model: Any) -> int:
    return model.config.num_attention_heads * model.config.attention_head_dim


def _dims_with(model: Any, context_dim: int) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks) + len(model.single_transformer_blocks),
        width=_width(model),
        time_dim=_width(model),
        context_dim=context_dim,
    )


def _dims(model: Any) -> ModelDims:
    return _dims_with(model, model.config.pooled_projection_dim)


def _image_dims(model: Any) -> ModelDims:
    return _dims_with(model, model.config.text_embed_dim)


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, _width(model)
    times = 2 if config.guidance_embeds else 1
    pooled = config.pooled_projection_dim * width + width * width
    outside = times * (256 * width + width * width) + pooled
    return _with_refiner(
        model, num_tokens, text_tokens, text_tokens, math.prod(_patch(model)), outside
    )


def _image_flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, _width(model)
    times = 1 + bool(config.guidance_embeds) + bool(config.use_meanflow)
    outside = times * (256 * width + width * width)
    refined = text_tokens
    if config.text_embed_2_dim is not None:  # the second encoder's tokens aren't refined
        refined -= GLYPH_TOKENS
        second = config.text_embed_2_dim * 2048 + 2048 * 2048 + 2048 * width
        outside += GLYPH_TOKENS * second
    patch = math.prod(config.patch_size)
    return _with_refiner(model, num_tokens, text_tokens, refined, patch, outside)


def _with_refiner(
    model: Any, num_tokens: int, text_tokens: int, refined: int, patch: int, outside: int
) -> ModelFlops:
    """FLOPs with so many text tokens refined, and multiply-adds of the embedders of all else."""
    config, width = model.config, _width(model)
    d2 = width * width
    inner = int(2 * config.mlp_ratio * d2)  # multiply-adds of the feed-forward, per token
    double = JointBlockShape(width=width, text_tokens=text_tokens, feed_forward=inner)
    single = SharedBlockShape(
        width=width, text_tokens=text_tokens, modulation=3 * d2, feed_forward=inner
    )
    macs = num_tokens * width * patch * (config.in_channels + config.out_channels) + 2 * d2
    # The text is refined first, by blocks of its own with a time and a mean text of their own.
    macs += outside + 256 * width + d2 + config.text_embed_dim * width + d2
    macs += refined * config.text_embed_dim * width
    macs += config.num_refiner_layers * (refined * 12 * d2 + 2 * refined**2 * width + 2 * d2)
    blocks = (double,) * config.num_layers + (single,) * config.num_single_layers
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = tuple(
    BlockSpec(
        block_class=name,
        output=0,
        value_modules=("attn.to_v",),
        values_of_text_last=True,
        rows={table: after_text, "attention_mask": mask_before_text},
    )
    for name, table in (
        ("HunyuanVideoTransformerBlock", "freqs_cis"),
        ("HunyuanVideoSingleTransformerBlock", "image_rotary_emb"),
        ("HunyuanImageTransformerBlock", "image_rotary_emb"),
        ("HunyuanImageSingleTransformerBlock", "image_rotary_emb"),
    )
)

_VIDEO = ModelSpec(
    model_class="HunyuanVideoTransformer3DModel",
    name="HunyuanVideo (text to video)",
    context_is="pooled text",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    sample="hidden_states",
    timestep="timestep",
    noise_timestep=1000.0,
    time_embedder="time_text_embed.timestep_embedder",
    context=pooled_text,
    text_tokens=256,
    tokens=_tokens,
    dims=_dims,
    flops=_flops,
)

MODELS = (
    _VIDEO,
    replace(
        _VIDEO,
        model_class="HunyuanImageTransformer2DModel",
        name="HunyuanImage 2.1",
        context_is="mean of the text",
        time_embedder="time_guidance_embed.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        text_tokens=1000 + GLYPH_TOKENS,
        tokens=_image_tokens,
        dims=_image_dims,
        flops=_image_flops,
    ),
)
