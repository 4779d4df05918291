"""PixArt-Alpha and PixArt-Sigma: cross attention to text, no pooled text."""

from __future__ import annotations

from typing import Any

from shiva_dit.core.flops import CrossBlockShape, ModelFlops
from shiva_dit.models.families.basic import BLOCKS as BLOCKS
from shiva_dit.models.spec import (
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
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=config.caption_channels or config.cross_attention_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    block = CrossBlockShape(
        width=width,
        text_tokens=text_tokens,
        text_width=config.cross_attention_dim,
        feed_forward=4 * width,
    )
    patch = config.patch_size**2
    macs = num_tokens * width * patch * (config.in_channels + model.out_channels)
    if config.caption_channels is not None:
        macs += text_tokens * (config.caption_channels * width + width * width)
    # Embedders of time, of two numbers of the resolution and one of the aspect; one modulation.
    macs += 256 * width + width * width + 6 * width * width
    if model.use_additional_conditions:
        size = width // 3
        macs += 3 * (256 * size + size * size)
    return ModelFlops(
        blocks=(block,) * len(model.transformer_blocks),
        constant=2 * macs,
        num_tokens=num_tokens,
    )


MODELS = (
    ModelSpec(
        model_class="PixArtTransformer2DModel",
        name="PixArt-Alpha and -Sigma",
        context_is="mean of the text",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        diffusion=True,
        time_embedder="adaln_single.emb.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        guidance="one batch",
        text_tokens=300,
        tokens=latent_grid,
        own_tokens=own_square,
        dims=_dims,
        flops=_flops,
    ),
)
