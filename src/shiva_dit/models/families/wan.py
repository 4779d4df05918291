"""Wan and its kin: video, cross attention, rotary tables with a batch of one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.flops import CrossBlockShape, ModelFlops
from shiva_dit.models.rows import modulation, modulation_tokens_third, of_batch_one, of_pairs
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, text_mean


def _tokens(model: Any, sample: Float[Tensor, "B C F H W"]) -> int:
    sides = zip(sample.shape[2:], model.config.patch_size, strict=True)
    return math.prod(side // patch for side, patch in sides)


def _dims(model: Any) -> ModelDims:
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return ModelDims(
        num_blocks=len(model.blocks),
        width=width,
        time_dim=width,
        context_dim=model.config.text_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, _dims(model).width
    if config.image_dim is not None:
        raise ValueError(
            "the FLOPs of Wan models that read an image beside the text are not known."
        )
    block = CrossBlockShape(
        width=width, text_tokens=text_tokens, text_width=width, feed_forward=config.ffn_dim
    )
    patch = math.prod(config.patch_size)
    macs = num_tokens * width * patch * (config.in_channels + config.out_channels)
    macs += text_tokens * (config.text_dim * width + width * width)
    macs += config.freq_dim * width + width * width + 6 * width * width
    if getattr(config, "inject_sample_info", False):  # SkyReels embeds the frame rate
        macs += width * width + width * 6 * width
    constant = 2 * macs
    if hasattr(model, "vace_blocks"):  # they read what blocks never touch, so they stay whole
        sides = len(model.vace_blocks)
        projections = (1 + sides) * num_tokens * width * width
        embedding = num_tokens * width * patch * config.vace_in_channels
        constant += sides * block.flops(num_tokens) + 2 * (projections + embedding)
    return ModelFlops(blocks=(block,) * len(model.blocks), constant=constant, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="WanTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"rotary_emb": of_batch_one, "temb": modulation},
    ),
    BlockSpec(
        block_class="SkyReelsV2TransformerBlock",
        value_modules=("attn1.to_v",),
        rows={
            "rotary_emb": of_batch_one,
            "temb": modulation_tokens_third,
            "attention_mask": of_pairs,
        },
    ),
)

_WAN = ModelSpec(
    model_class="WanTransformer3DModel",
    name="Wan 2.1 and 2.2 (text to video)",
    context_is="mean of the text",
    block_lists=("blocks",),
    sample="hidden_states",
    timestep="timestep",
    noise_timestep=1000.0,
    time_embedder="condition_embedder.time_embedder",
    context=text_mean("zeros"),
    text_tokens=512,
    tokens=_tokens,
    dims=_dims,
    flops=_flops,
)

MODELS = (
    _WAN,
    replace(_WAN, model_class="ChronoEditTransformer3DModel", name="ChronoEdit"),
    replace(_WAN, model_class="WanVACETransformer3DModel", name="Wan VACE"),
    replace(_WAN, model_class="SkyReelsV2Transformer3DModel", name="SkyReels V2"),
)
