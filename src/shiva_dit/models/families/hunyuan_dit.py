"""Hunyuan-DiT: self and cross attention, and long skips into its second half, which stays whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.flops import CrossBlockShape, ModelFlops
from shiva_dit.models.rows import after_text
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    given,
    latent_grid,
    mean_text,
    own_square,
)


def _text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    text: Tensor = given(model, arguments, "encoder_hidden_states")
    return mean_text(text, arguments.get("text_embedding_mask"))


def _skipped_into(model: Any) -> tuple[int, ...]:
    """Blocks that first mix in an earlier block's output, for all tokens."""
    return tuple(range(len(model.blocks) // 2 + 1, len(model.blocks)))


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.blocks),
        width=model.inner_dim,
        time_dim=model.inner_dim,
        context_dim=model.config.cross_attention_dim,
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """A block that shifts by time, and one in the second half that takes a skip as well."""

    cross: CrossBlockShape
    skips: bool

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample with `image_tokens` tokens in the block."""
        d2 = self.cross.width * self.cross.width
        own = d2 + (2 * image_tokens * d2 if self.skips else 0)
        return 2 * own + self.cross.flops(image_tokens)


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.inner_dim
    t5, text = config.cross_attention_dim_t5, config.cross_attention_dim
    t5_tokens = text_tokens - config.text_len
    cross = CrossBlockShape(
        width=width,
        text_tokens=text_tokens,
        text_width=text,
        feed_forward=int(width * config.mlp_ratio),
    )
    patch = config.patch_size**2
    macs = num_tokens * patch * (config.in_channels + model.out_channels) * width
    macs += t5_tokens * (4 * t5 * t5 + 4 * t5 * text)
    macs += 256 * width + width * width
    # T5's tokens and their mean are pooled by attention, with a single query.
    pooled = config.pooled_projection_dim
    macs += t5 * t5 + 2 * (t5_tokens + 1) * t5 * t5 + 2 * (t5_tokens + 1) * t5 + t5 * pooled
    extra = pooled + (6 * 256 + width if config.use_style_cond_and_image_meta_size else 0)
    macs += 4 * extra * width + 4 * width * width + 2 * width * width
    full = _skipped_into(model)
    blocks = tuple(_Shape(cross, index in full) for index in range(len(model.blocks)))
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="HunyuanDiTBlock",
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": after_text},
    ),
)

MODELS = (
    ModelSpec(
        model_class="HunyuanDiT2DModel",
        name="Hunyuan-DiT (its first half)",
        context_is="mean of the text",
        block_lists=("blocks",),
        full_blocks=_skipped_into,
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        diffusion=True,
        time_embedder="time_extra_emb.timestep_embedder",
        context=_text,
        guidance="one batch",
        text_tokens=333,
        tokens=latent_grid,
        own_tokens=own_square,
        dims=_dims,
        flops=_flops,
    ),
)
