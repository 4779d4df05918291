"""The specs of all supported models, by class name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shiva_dit.core.flops import JointBlockShape, ModelFlops
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec


def _sd3_tokens(model: Any, sample: Tensor) -> int:
    patch = model.config.patch_size
    return (sample.shape[-2] // patch) * (sample.shape[-1] // patch)


def _sd3_dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=model.config.pooled_projection_dim,
    )


def _sd3_flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
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


BLOCKS: dict[str, BlockSpec] = {
    spec.block_class: spec
    for spec in (
        BlockSpec(
            block_class="JointTransformerBlock",
            output=1,
            value_modules=("attn.to_v", "attn2.to_v"),
        ),
    )
}

MODELS: dict[str, ModelSpec] = {
    spec.model_class: spec
    for spec in (
        ModelSpec(
            model_class="SD3Transformer2DModel",
            block_lists=("transformer_blocks",),
            sample="hidden_states",
            timestep="timestep",
            timestep_scale=1000.0,
            time_embedder="time_text_embed.timestep_embedder",
            context="pooled_projections",
            no_sharing="skip_layers",
            lora_scale="joint_attention_kwargs",
            tokens=_sd3_tokens,
            dims=_sd3_dims,
            flops=_sd3_flops,
        ),
    )
}


def model_spec(model: nn.Module) -> ModelSpec:
    """The spec of a model.

    Raises:
        ValueError: If its class is not supported; the error lists those that are.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in MODELS:
            return MODELS[cls.__name__]
    raise ValueError(
        f"{type(model).__name__} is not supported. Supported: {', '.join(sorted(MODELS))}. "
        "Pass the transformer of a pipeline, or the pipeline itself."
    )


def block_spec(block: nn.Module) -> BlockSpec:
    """The spec of a block.

    Raises:
        ValueError: If its class is not supported.
    """
    for cls in type(block).__mro__:
        if cls.__name__ in BLOCKS:
            return BLOCKS[cls.__name__]
    raise ValueError(
        f"blocks of class {type(block).__name__} are not supported. Supported: "
        f"{', '.join(sorted(BLOCKS))}."
    )
