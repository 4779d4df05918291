"""Flux.2: double blocks, and single ones that hold the text; modulated from outside the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.flops import JointBlockShape, ModelFlops, SharedBlockShape
from shiva_dit.models.rows import after_text
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, packed, text_mean


def _text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    if arguments.get("kv_cache_mode") is not None:
        raise ValueError(
            "Flux.2 with cached keys of pictures to go by (kv_cache_mode) is not supported: the "
            "cache expects these tokens first in every block. Use Flux2KleinPipeline, which runs "
            "them along."
        )
    return text_mean()(model, arguments)


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks) + len(model.single_transformer_blocks),
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=model.config.joint_attention_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    inner = 3 * width * int(width * config.mlp_ratio)  # a gated feed-forward, per token
    double = JointBlockShape(width=width, text_tokens=text_tokens, modulation=0, feed_forward=inner)
    single = SharedBlockShape(
        width=width, text_tokens=text_tokens, modulation=0, feed_forward=inner
    )
    macs = num_tokens * width * (config.in_channels + config.patch_size**2 * model.out_channels)
    macs += text_tokens * config.joint_attention_dim * width
    times = 2 if config.guidance_embeds else 1
    macs += times * (config.timestep_guidance_channels * width + width * width)
    macs += (6 + 6 + 3 + 2) * width * width  # the modulations of all blocks, and of the output
    blocks = (double,) * config.num_layers + (single,) * config.num_single_layers
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="Flux2TransformerBlock",
        output=1,
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": after_text},
    ),
    BlockSpec(
        block_class="Flux2SingleTransformerBlock",
        text_inside=True,
        value_modules=("attn.to_qkv_mlp_proj",),
        values_fused=True,
        rows={"image_rotary_emb": after_text},
    ),
)

MODELS = (
    ModelSpec(
        model_class="Flux2Transformer2DModel",
        name="Flux.2 (dev, klein)",
        context_is="mean of the text",
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1.0,
        time_embedder="time_guidance_embed.timestep_embedder",
        context=_text,
        text_tokens=512,
        tokens=packed,
        dims=_dims,
        flops=_flops,
    ),
)
