"""CogVideoX: video; image and text by the same weights, rotary tables given with the call."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.flops import ModelFlops, SharedBlockShape
from shiva_dit.models.rows import after_text
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    text_mean,
)


def _frames_per_token(model: Any) -> int:
    return model.config.patch_size_t or 1


def _tokens(model: Any, sample: Float[Tensor, "B F C H W"]) -> int:
    frames, _, height, width = sample.shape[1:]
    patch = model.config.patch_size
    return -(-frames // _frames_per_token(model)) * (height // patch) * (width // patch)


def _own_tokens(model: Any) -> int:
    config = model.config
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    shape = 1, frames, config.in_channels, config.sample_height, config.sample_width
    return _tokens(model, torch.empty(shape, device="meta"))


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
    patch = config.patch_size**2 * _frames_per_token(model)
    macs = num_tokens * width * patch * (config.in_channels + config.out_channels)
    macs += text_tokens * config.text_embed_dim * width
    macs += width * time + time * time + 2 * time * width
    if config.ofs_embed_dim:
        macs += 2 * config.ofs_embed_dim**2
    blocks = (block,) * len(model.transformer_blocks)
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="CogVideoXBlock",
        output=0,
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": after_text},
    ),
)

MODELS = (
    ModelSpec(
        model_class="CogVideoXTransformer3DModel",
        name="CogVideoX",
        context_is="mean of the text",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        diffusion=True,
        time_embedder="time_embedding",
        context=text_mean(),
        guidance="one batch",
        text_tokens=226,
        tokens=_tokens,
        own_tokens=_own_tokens,
        dims=_dims,
        flops=_flops,
    ),
)
