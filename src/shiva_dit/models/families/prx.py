"""PRX: one stream of image tokens, whose attention reads the text as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shiva_dit.core.flops import ModelFlops
from shiva_dit.models.rows import of_heads
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    latent_grid,
    text_mean,
)


@dataclass(frozen=True, slots=True)
class _Shape:
    """A block whose queries are the image's, and whose keys and values are the text's, too."""

    width: int
    text_tokens: int
    feed_forward: int

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample with `image_tokens` tokens in the block."""
        d2, a, text = self.width * self.width, image_tokens, self.text_tokens
        macs = 6 * d2 + 4 * a * d2 + 2 * text * d2 + 2 * a * (a + text) * self.width
        return 2 * (macs + 3 * a * self.width * self.feed_forward)


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.blocks),
        width=model.hidden_size,
        time_dim=model.hidden_size,
        context_dim=model.config.context_in_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.hidden_size
    patch, between = model.out_channels, config.bottleneck_size
    embedding = patch * width if between is None else (patch + width) * between
    macs = num_tokens * (embedding + width * patch) + text_tokens * config.context_in_dim * width
    embedders = 2 if config.resolution_embeds else 1
    macs += embedders * (256 * width + width * width) + 2 * width * width
    block = _Shape(width, text_tokens, int(width * config.mlp_ratio))
    blocks = (block,) * len(model.blocks)
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


BLOCKS = (
    BlockSpec(
        block_class="PRXBlock",
        value_modules=("attention.img_qkv_proj",),
        values_fused=True,
        rows={"image_rotary_emb": of_heads},
    ),
)

MODELS = (
    ModelSpec(
        model_class="PRXTransformer2DModel",
        name="PRX",
        context_is="mean of the text",
        block_lists=("blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1.0,
        time_embedder="time_in",
        context=text_mean("attention_mask"),
        guidance="one batch",
        text_tokens=256,
        tokens=latent_grid,
        dims=_dims,
        flops=_flops,
    ),
)
