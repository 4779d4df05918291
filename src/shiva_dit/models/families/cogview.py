"""CogView3-Plus and CogView4: image and text by the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shiva_dit.core.flops import ModelFlops, SharedBlockShape
from shiva_dit.models.rows import after_text
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    latent_grid,
    own_square,
    text_mean,
)


def _dims(model: Any) -> ModelDims:
    config = model.config
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=config.num_attention_heads * config.attention_head_dim,
        time_dim=config.time_embed_dim,
        context_dim=config.text_embed_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, dims = model.config, _dims(model)
    width, time = dims.width, dims.time_dim
    block = SharedBlockShape(width=width, text_tokens=text_tokens, modulation=12 * time * width)
    macs = num_tokens * width * config.patch_size**2 * (config.in_channels + config.out_channels)
    macs += text_tokens * config.text_embed_dim * width
    # Embedders of time (as many sinusoids as the model is wide) and of three sizes.
    macs += width * time + time * time + 6 * config.condition_dim * time + time * time
    macs += 2 * time * width
    blocks = (block,) * len(model.transformer_blocks)
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="CogView3PlusTransformerBlock",
        output=0,
        value_modules=("attn1.to_v",),
    ),
    BlockSpec(
        block_class="CogView4TransformerBlock",
        output=0,
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": after_text},
    ),
)

_COGVIEW4 = ModelSpec(
    model_class="CogView4Transformer2DModel",
    name="CogView4",
    context_is="mean of the text",
    block_lists=("transformer_blocks",),
    sample="hidden_states",
    timestep="timestep",
    noise_timestep=1000.0,
    time_embedder="time_condition_embed.timestep_embedder",
    context=text_mean("attention_mask"),
    text_tokens=1024,
    tokens=latent_grid,
    own_tokens=own_square,
    dims=_dims,
    flops=_flops,
)

MODELS = (
    _COGVIEW4,
    replace(
        _COGVIEW4,
        model_class="CogView3PlusTransformer2DModel",
        name="CogView3-Plus",
        guidance="one batch",
        diffusion=True,
        text_tokens=224,
    ),
)
