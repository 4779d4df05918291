"""Wan 2.1 and 2.2, ChronoEdit: video, cross attention, rotary tables with a batch of one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.flops import CrossBlockShape, ModelFlops
from shiva_dit.models.rows import by_token, of_batch_one
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
    return ModelFlops(blocks=(block,) * len(model.blocks), constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="WanTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"rotary_emb": of_batch_one, "temb": by_token},
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
    lora_scale="attention_kwargs",
    text_tokens=512,
    tokens=_tokens,
    dims=_dims,
    flops=_flops,
)

MODELS = (
    _WAN,
    replace(_WAN, model_class="ChronoEditTransformer3DModel", name="ChronoEdit"),
)
