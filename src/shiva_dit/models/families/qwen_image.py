"""Qwen-Image: two streams, complex rotary tables apart for image and text."""

from __future__ import annotations

from typing import Any

from shiva_dit.core.flops import JointBlockShape, ModelFlops
from shiva_dit.models.rows import by_token, image_of_pair
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, packed, text_mean


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=model.config.joint_attention_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    macs = num_tokens * width * (config.in_channels + config.patch_size**2 * model.out_channels)
    macs += text_tokens * config.joint_attention_dim * width
    macs += 256 * width + width * width + 2 * width * width
    if config.zero_cond_t:  # the edit model embeds time 0 as well, and modulates by it
        macs += 256 * width + width * width + 6 * width * width * config.num_layers
    block = JointBlockShape(width=width, text_tokens=text_tokens)
    blocks = (block,) * len(model.transformer_blocks)
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="QwenImageTransformerBlock",
        output=1,
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": image_of_pair, "modulate_index": by_token},
    ),
)

MODELS = (
    ModelSpec(
        model_class="QwenImageTransformer2DModel",
        name="Qwen-Image, Qwen-Image-Edit",
        context_is="mean of the text",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1.0,
        time_embedder="time_text_embed.timestep_embedder",
        context=text_mean("encoder_hidden_states_mask"),
        text_tokens=512,
        tokens=packed,
        dims=_dims,
        flops=_flops,
    ),
)
