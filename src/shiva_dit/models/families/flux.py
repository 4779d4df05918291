"""Flux.1 and its kin: double and single blocks, rotary tables with the text's rows first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shiva_dit.core.flops import JointBlockShape, ModelFlops, SharedBlockShape
from shiva_dit.models.rows import after_text
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    packed,
    pooled_text,
    text_mean,
)


def _dims_with(model: Any, context_dim: int) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks) + len(model.single_transformer_blocks),
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=context_dim,
    )


def _dims(model: Any) -> ModelDims:
    return _dims_with(model, model.config.pooled_projection_dim)


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    # Embedders of pooled text and, in distilled models, of the guidance scale.
    embedders = config.pooled_projection_dim * width + width * width
    if config.guidance_embeds:
        embedders += 256 * width + width * width
    return _with_embedders(model, num_tokens, text_tokens, embedders)


def _longcat_flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    return _with_embedders(model, num_tokens, text_tokens, 0)


def _ovis_flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    gated = 12 * model.inner_dim**2  # a feed-forward with a gate
    return _with_embedders(model, num_tokens, text_tokens, 0, feed_forward=gated)


def _bria_flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    width = model.inner_dim
    guidance = 256 * width + width * width if model.config.guidance_embeds else 0
    return _with_embedders(model, num_tokens, text_tokens, guidance)


def _with_embedders(
    model: Any,
    num_tokens: int,
    text_tokens: int,
    embedders: int,
    feed_forward: int | None = None,
) -> ModelFlops:
    """FLOPs of a model that embeds more than time, image and text for so many multiply-adds."""
    config, width = model.config, model.inner_dim
    double = JointBlockShape(width=width, text_tokens=text_tokens, feed_forward=feed_forward)
    single = SharedBlockShape(
        width=width,
        text_tokens=text_tokens,
        modulation=3 * width * width,
        feed_forward=feed_forward,
    )
    macs = num_tokens * width * (config.in_channels + config.patch_size**2 * model.out_channels)
    macs += text_tokens * config.joint_attention_dim * width
    macs += 256 * width + width * width + embedders + 2 * width * width
    blocks = (double,) * config.num_layers + (single,) * config.num_single_layers
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


def _dims_by_text(model: Any) -> ModelDims:
    return _dims_with(model, model.config.joint_attention_dim)


BLOCKS = tuple(
    BlockSpec(
        block_class=name,
        output=1,
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": after_text},
    )
    for name in (
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "LongCatImageTransformerBlock",
        "LongCatImageSingleTransformerBlock",
        "OvisImageTransformerBlock",
        "OvisImageSingleTransformerBlock",
        "BriaTransformerBlock",
        "BriaSingleTransformerBlock",
    )
)

_FLUX = ModelSpec(
    model_class="FluxTransformer2DModel",
    name="Flux.1",
    context_is="pooled text",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    sample="hidden_states",
    timestep="timestep",
    noise_timestep=1.0,
    time_embedder="time_text_embed.timestep_embedder",
    context=pooled_text,
    text_tokens=512,
    tokens=packed,
    dims=_dims,
    flops=_flops,
)

_LONGCAT = replace(
    _FLUX,
    model_class="LongCatImageTransformer2DModel",
    name="LongCat-Image",
    context_is="mean of the text",
    time_embedder="time_embed.timestep_embedder",
    context=text_mean(),
    dims=_dims_by_text,
    flops=_longcat_flops,
)

MODELS = (
    _FLUX,
    _LONGCAT,
    replace(
        _LONGCAT,
        model_class="OvisImageTransformer2DModel",
        name="Ovis-Image",
        time_embedder="timestep_embedder",
        text_tokens=256,
        flops=_ovis_flops,
    ),
    replace(
        _LONGCAT,
        model_class="BriaTransformer2DModel",
        name="Bria 3",
        noise_timestep=1000.0,
        context=text_mean("zeros"),
        guidance="one batch",
        text_tokens=128,
        flops=_bria_flops,
    ),
)
