"""Krea 2: one stream, the text's tokens first, each of several layers of its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.flops import ModelFlops, SharedBlockShape
from shiva_dit.models.rows import after_text, mask_after_text
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, given, mean_text, packed


def _text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    layers: Tensor = given(model, arguments, "encoder_hidden_states")  # (B, T, layers, Dc)
    return mean_text(layers.mean(2), arguments.get("encoder_attention_mask"))


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=model.hidden_size,
        time_dim=model.hidden_size,
        context_dim=model.config.text_hidden_dim,
    )


def _shape(
    width: int, heads: int, key_heads: int, feed_forward: int, text_tokens: int
) -> SharedBlockShape:
    """Attention with a gate on its output, and keys and values of fewer heads."""
    keys = width // heads * key_heads
    return SharedBlockShape(
        width=width,
        text_tokens=text_tokens,
        modulation=0,
        feed_forward=3 * width * feed_forward,
        projections=3 * width * width + 2 * width * keys,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.hidden_size
    block = _shape(
        width,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        text_tokens,
    )
    layers, text = config.num_text_layers, config.text_hidden_dim
    heads = config.text_num_attention_heads, config.text_num_key_value_heads
    inner = config.text_intermediate_size
    fusion = (
        config.num_layerwise_text_blocks
        * text_tokens
        * _shape(text, *heads, inner, 0).flops(layers)
    )
    fusion += config.num_refiner_text_blocks * _shape(text, *heads, inner, 0).flops(text_tokens)
    macs = text_tokens * (text * layers + text * width + width * width)
    macs += 2 * num_tokens * config.in_channels * width
    macs += config.timestep_embed_dim * width + width * width + 6 * width * width
    return ModelFlops(
        blocks=(block,) * config.num_layers,
        constant=2 * macs + fusion,
        num_tokens=num_tokens,
    )


BLOCKS = (
    BlockSpec(
        block_class="Krea2TransformerBlock",
        text_inside=True,
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": after_text, "attention_mask": mask_after_text},
    ),
)

MODELS = (
    ModelSpec(
        model_class="Krea2Transformer2DModel",
        name="Krea 2",
        context_is="mean of the text",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1.0,
        time_embedder="time_embed",
        context=_text,
        text_tokens=512,
        tokens=packed,
        dims=_dims,
        flops=_flops,
    ),
)
