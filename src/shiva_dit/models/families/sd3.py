"""Stable Diffusion 3 and 3.5, with plain and dual attention."""

from __future__ import annotations

from typing import Any

from shiva_dit.core.flops import JointBlockShape, ModelFlops
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    latent_grid,
    own_square,
    pooled_text,
)


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=model.config.pooled_projection_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    patch = config.patch_size**2
    blocks = tuple(
        JointBlockShape(
            width=width,
            text_tokens=text_tokens,
            dual_attention=bool(block.use_dual_attention),
            context_pre_only=bool(block.context_pre_only),
        )
        for block in model.transformer_blocks
    )
    macs = num_tokens * width * patch * (config.in_channels + model.out_channels)
    macs += text_tokens * config.joint_attention_dim * config.caption_projection_dim
    # Embedders of time (256 sinusoids) and pooled text, and the final modulation.
    macs += 256 * width + width * width + config.pooled_projection_dim * width + width * width
    macs += 2 * width * width
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="JointTransformerBlock",
        output=1,
        value_modules=("attn.to_v", "attn2.to_v"),
    ),
)

MODELS = (
    ModelSpec(
        model_class="SD3Transformer2DModel",
        name="Stable Diffusion 3 and 3.5",
        context_is="pooled text",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        time_embedder="time_text_embed.timestep_embedder",
        context=pooled_text,
        guidance="one batch",
        text_tokens=333,
        tokens=latent_grid,
        own_tokens=own_square,
        dims=_dims,
        flops=_flops,
    ),
)
