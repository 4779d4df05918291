"""LTX-Video: video in packed latents, cross attention to text, rotary tables by sample."""

from __future__ import annotations

from typing import Any

from shiva_dit.core.flops import CrossBlockShape, ModelFlops
from shiva_dit.models.rows import modulation_in_one, of_each
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    packed,
    text_mean,
)


def _dims(model: Any) -> ModelDims:
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=width,
        time_dim=width,
        context_dim=model.config.caption_channels,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, _dims(model).width
    block = CrossBlockShape(
        width=width,
        text_tokens=text_tokens,
        text_width=config.cross_attention_dim,
        feed_forward=4 * width,
    )
    macs = num_tokens * width * (config.in_channels + config.out_channels)
    macs += text_tokens * (config.caption_channels * width + width * width)
    macs += 256 * width + width * width + 6 * width * width
    blocks = (block,) * len(model.transformer_blocks)
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="LTXVideoTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": of_each, "temb": modulation_in_one},
    ),
)

MODELS = (
    ModelSpec(
        model_class="LTXVideoTransformer3DModel",
        name="LTX-Video (text to video)",
        context_is="mean of the text",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        time_embedder="time_embed.emb.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        guidance="one batch",
        text_tokens=128,
        tokens=packed,
        dims=_dims,
        flops=_flops,
    ),
)
