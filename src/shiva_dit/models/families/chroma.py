"""Chroma: Flux's blocks, modulated by one network for all; the single ones hold text and image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shiva_dit.core.flops import JointBlockShape, ModelFlops, SharedBlockShape
from shiva_dit.models.rows import after_text, mask_after_text
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, packed, text_mean
from shiva_dit.modules.context import TIME_FEATURES


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks) + len(model.single_transformer_blocks),
        width=model.inner_dim,
        time_dim=TIME_FEATURES,
        context_dim=model.config.joint_attention_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    joint = JointBlockShape(width=width, text_tokens=text_tokens, modulation=0)
    single = SharedBlockShape(width=width, text_tokens=text_tokens, modulation=0)
    macs = num_tokens * width * (config.in_channels + config.patch_size**2 * model.out_channels)
    macs += text_tokens * config.joint_attention_dim * width
    hidden, layers = config.approximator_hidden_dim, config.approximator_layers
    rows = 3 * config.num_single_layers + 12 * config.num_layers + 2
    per_row = config.approximator_num_channels * hidden + 2 * layers * hidden**2 + hidden * width
    macs += rows * per_row
    blocks = (joint,) * config.num_layers + (single,) * config.num_single_layers
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


ROWS: Mapping[str, Any] = {"image_rotary_emb": after_text, "attention_mask": mask_after_text}
BLOCKS = (
    BlockSpec(
        block_class="ChromaTransformerBlock",
        output=1,
        value_modules=("attn.to_v",),
        rows=ROWS,
    ),
    BlockSpec(
        block_class="ChromaSingleTransformerBlock",
        text_inside=True,
        value_modules=("attn.to_v",),
        rows=ROWS,
    ),
)

MODELS = (
    ModelSpec(
        model_class="ChromaTransformer2DModel",
        name="Chroma",
        context_is="mean of the text",
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1.0,
        time_embedder=None,
        context=text_mean("attention_mask"),
        text_tokens=512,
        tokens=packed,
        dims=_dims,
        flops=_flops,
    ),
)
