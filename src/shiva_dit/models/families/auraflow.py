"""AuraFlow: two streams, then one of text and image; eight tokens of its own come first."""

from __future__ import annotations

from typing import Any

from shiva_dit.core.flops import JointBlockShape, ModelFlops, SharedBlockShape
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    latent_grid,
    own_square,
    text_mean,
)


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.joint_transformer_blocks) + len(model.single_transformer_blocks),
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=model.config.joint_attention_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    text = text_tokens + model.register_tokens.shape[1]
    inner = model.single_transformer_blocks[0].ff.linear_1.out_features
    feed_forward = 3 * width * inner
    joint = JointBlockShape(width=width, text_tokens=text, feed_forward=feed_forward)
    single = SharedBlockShape(
        width=width, text_tokens=text, modulation=6 * width * width, feed_forward=feed_forward
    )
    macs = num_tokens * width * config.patch_size**2 * (config.in_channels + model.out_channels)
    macs += text_tokens * config.joint_attention_dim * config.caption_projection_dim
    macs += 256 * width + width * width + 2 * width * width
    blocks = (joint,) * config.num_mmdit_layers + (single,) * config.num_single_dit_layers
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(block_class="AuraFlowJointTransformerBlock", output=1, value_modules=("attn.to_v",)),
    BlockSpec(
        block_class="AuraFlowSingleTransformerBlock",
        text_inside=True,
        value_modules=("attn.to_v",),
    ),
)

MODELS = (
    ModelSpec(
        model_class="AuraFlowTransformer2DModel",
        name="AuraFlow",
        context_is="mean of the text",
        block_lists=("joint_transformer_blocks", "single_transformer_blocks"),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1.0,
        time_embedder="time_step_proj",
        context=text_mean("zeros"),
        guidance="one batch",
        text_tokens=256,
        tokens=latent_grid,
        own_tokens=own_square,
        dims=_dims,
        flops=_flops,
    ),
)
