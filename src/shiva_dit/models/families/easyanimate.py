"""EasyAnimate: video, two streams, rotary tables of the image's tokens alone."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.flops import JointBlockShape, ModelFlops
from shiva_dit.models.rows import after_text
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    text_mean,
)


def _tokens(model: Any, sample: Float[Tensor, "B C F H W"]) -> int:
    frames, height, width = sample.shape[2:]
    patch = model.config.patch_size
    return frames * (height // patch) * (width // patch)


def _width(model: Any) -> int:
    return model.config.num_attention_heads * model.config.attention_head_dim


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=_width(model),
        time_dim=model.config.time_embed_dim,
        context_dim=model.config.text_embed_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width, time = model.config, _width(model), model.config.time_embed_dim
    if config.mmdit_layers < config.num_layers or config.text_embed_dim_t5 is not None:
        raise ValueError(
            "the FLOPs of EasyAnimate models with blocks of one stream or a second text encoder "
            "are not known."
        )
    block = JointBlockShape(width=width, text_tokens=text_tokens, modulation=12 * width * time)
    patch = config.patch_size**2
    macs = num_tokens * width * patch * (config.in_channels + config.out_channels)
    macs += text_tokens * config.text_embed_dim * width
    macs += width * time + time * time + 2 * width * time
    blocks = (block,) * config.num_layers
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="EasyAnimateTransformerBlock",
        output=0,
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": after_text},
    ),
)

MODELS = (
    ModelSpec(
        model_class="EasyAnimateTransformer3DModel",
        name="EasyAnimate 5.1",
        context_is="mean of the text",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        time_embedder="time_embedding",
        context=text_mean(),
        guidance="one batch",
        text_tokens=256,
        tokens=_tokens,
        dims=_dims,
        flops=_flops,
    ),
)
