"""HunyuanVideo: double and single blocks as Flux has, the text last and padded."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.flops import JointBlockShape, ModelFlops, SharedBlockShape
from shiva_dit.models.rows import after_text, mask_before_text
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, pooled_text


def _patch(model: Any) -> tuple[int, int, int]:
    config = model.config
    return config.patch_size_t, config.patch_size, config.patch_size


def _tokens(model: Any, sample: Float[Tensor, "B C F H W"]) -> int:
    sides = zip(sample.shape[2:], _patch(model), strict=True)
    return math.prod(side // patch for side, patch in sides)


def _dims(model: Any) -> ModelDims:
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    return ModelDims(
        num_blocks=len(model.transformer_blocks) + len(model.single_transformer_blocks),
        width=width,
        time_dim=width,
        context_dim=config.pooled_projection_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, _dims(model).width
    d2 = width * width
    inner = int(2 * config.mlp_ratio * d2)  # multiply-adds of the feed-forward, per token
    double = JointBlockShape(width=width, text_tokens=text_tokens, feed_forward=inner)
    single = SharedBlockShape(
        width=width, text_tokens=text_tokens, modulation=3 * d2, feed_forward=inner
    )
    channels = config.in_channels + config.out_channels
    macs = num_tokens * width * math.prod(_patch(model)) * channels + 2 * d2
    time = 256 * width + d2
    macs += (2 if config.guidance_embeds else 1) * time + config.pooled_projection_dim * width + d2
    # The text is refined first, by blocks of its own with a time and a mean text of their own.
    macs += time + config.text_embed_dim * width + d2
    macs += text_tokens * config.text_embed_dim * width
    refiner = text_tokens * 12 * d2 + 2 * text_tokens**2 * width + 2 * d2
    macs += config.num_refiner_layers * refiner
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
    )
)

MODELS = (
    ModelSpec(
        model_class="HunyuanVideoTransformer3DModel",
        name="HunyuanVideo (text to video)",
        context_is="pooled text",
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        time_embedder="time_text_embed.timestep_embedder",
        context=pooled_text,
        lora_scale="attention_kwargs",
        text_tokens=256,
        tokens=_tokens,
        dims=_dims,
        flops=_flops,
    ),
)
