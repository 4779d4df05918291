"""Mochi: video, a narrower stream of text, and time that runs the other way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.flops import ModelFlops
from shiva_dit.models.rows import of_all
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    text_mean,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _BlockShape:
    """Two streams of different widths, with gated feed-forwards."""

    width: int
    text_width: int
    text_tokens: int
    feed_forward: int
    """Inner width of the image's."""
    text_feed_forward: int
    context_pre_only: bool

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample; all text tokens count (the model drops those that are padding)."""
        d, c, a, text = self.width, self.text_width, image_tokens, self.text_tokens
        macs = 4 * d * d + 4 * a * d * d + 3 * text * c * d + 3 * a * d * self.feed_forward
        macs += 2 * (a + text) ** 2 * d
        if self.context_pre_only:
            return 2 * (macs + d * c)
        return 2 * (macs + 4 * d * c + text * d * c + 3 * text * c * self.text_feed_forward)


def _tokens(model: Any, sample: Float[Tensor, "B C F H W"]) -> int:
    frames, height, width = sample.shape[2:]
    patch = model.config.patch_size
    return frames * (height // patch) * (width // patch)


def _dims(model: Any) -> ModelDims:
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=width,
        time_dim=width,
        context_dim=model.config.text_embed_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, _dims(model).width
    text, narrow = config.text_embed_dim, config.pooled_projection_dim
    blocks = tuple(
        _BlockShape(
            width=width,
            text_width=narrow,
            text_tokens=text_tokens,
            feed_forward=block.ff_inner_dim,
            text_feed_forward=block.ff_context_inner_dim,
            context_pre_only=block.context_pre_only,
        )
        for block in model.transformer_blocks
    )
    out_channels = config.out_channels or config.in_channels
    macs = num_tokens * width * config.patch_size**2 * (config.in_channels + out_channels)
    macs += config.time_embed_dim * width + width * width + 2 * width * width
    # The text is pooled by attention: its mean asks itself and all tokens.
    macs += 2 * (text_tokens + 1) * (text * text + text) + text * text + text * width
    macs += text_tokens * text * narrow
    macs += 3 * num_tokens * width // 2  # learned rotary frequencies of three axes
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="MochiTransformerBlock",
        output=0,
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": of_all},
    ),
)

MODELS = (
    ModelSpec(
        model_class="MochiTransformer3DModel",
        name="Mochi",
        context_is="mean of the text",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=0.0,
        clean_timestep=1000.0,
        time_embedder="time_embed.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        guidance="one batch",
        text_tokens=256,
        tokens=_tokens,
        dims=_dims,
        flops=_flops,
    ),
)
