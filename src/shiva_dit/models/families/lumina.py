"""Lumina: Next (cross attention), and Image 2.0 (the text's tokens first); 0 is noise, 1 clean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from jaxtyping import Int, Shaped
from torch import Tensor

from shiva_dit.core.flops import ModelFlops, SharedBlockShape
from shiva_dit.models.rows import by_token, of_batch_one, rows_after_text
from shiva_dit.models.spec import (
    BlockSpec,
    ModelDims,
    ModelSpec,
    latent_grid,
    own_square,
    text_mean,
)


def _refuse_lengths(*_: Any) -> NoReturn:
    raise ValueError(
        "the prompts of one call to Lumina2 must be of one length: where they differ, the image's "
        "tokens lie elsewhere in each sample. Call the model once per prompt."
    )


def _time_dim(model: Any) -> int:
    return min(model.config.hidden_size, 1024)


def _key_width(config: Any, width: int) -> int:
    heads = config.num_attention_heads
    return width // heads * (config.num_kv_heads or heads)


def _dims_with(model: Any, context_dim: int) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.layers),
        width=model.config.hidden_size,
        time_dim=_time_dim(model),
        context_dim=context_dim,
    )


def _dims(model: Any) -> ModelDims:
    return _dims_with(model, model.config.cap_feat_dim)


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.config.hidden_size
    time = _time_dim(model)
    inner = int((config.ffn_dim_multiplier or 1) * 4 * width)
    inner = -(-inner // config.multiple_of) * config.multiple_of
    keys = _key_width(config, width)

    def block(text_tokens: int, modulation: int) -> SharedBlockShape:
        return SharedBlockShape(
            width=width,
            text_tokens=text_tokens,
            modulation=modulation,
            feed_forward=3 * width * inner,
            projections=2 * width * (width + keys),
        )

    modulation = 4 * width * time
    patch = config.patch_size**2
    macs = num_tokens * patch * config.in_channels * width
    macs += text_tokens * config.cap_feat_dim * width + 256 * time + time * time
    out = patch * model.out_channels
    macs += width * time + (num_tokens + text_tokens) * width * out  # the text's, too
    refined = block(0, modulation).flops(num_tokens) + block(text_tokens, 0).flops(0)
    return ModelFlops(
        blocks=(block(text_tokens, modulation),) * config.num_layers,
        constant=2 * macs + config.num_refiner_layers * refined,
        num_tokens=num_tokens,
    )


@dataclass(frozen=True, slots=True)
class _NextShape:
    """Self and cross attention side by side, with keys of fewer heads and one output."""

    width: int
    keys: int
    text_tokens: int
    text_width: int
    feed_forward: int
    modulation: int

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample with `image_tokens` tokens in the block."""
        width, a, text = self.width, image_tokens, self.text_tokens
        macs = self.modulation + 3 * a * width * width + 2 * a * width * self.keys
        macs += 2 * text * self.text_width * self.keys + 2 * a * (a + text) * width
        return 2 * (macs + 3 * a * width * self.feed_forward)


def _next_dims(model: Any) -> ModelDims:
    return _dims_with(model, model.config.cross_attention_dim)


def _next_flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width, time = model.config, model.hidden_size, _time_dim(model)
    inner = int((config.ffn_dim_multiplier or 1) * int(4 * 2 * width / 3))
    block = _NextShape(
        width=width,
        keys=_key_width(config, width),
        text_tokens=text_tokens,
        text_width=config.cross_attention_dim,
        feed_forward=-(-inner // config.multiple_of) * config.multiple_of,
        modulation=4 * width * time,
    )
    patch = config.patch_size**2
    macs = num_tokens * width * patch * (config.in_channels + model.out_channels)
    macs += 256 * time + time * time + config.cross_attention_dim * time + width * time
    blocks = (block,) * config.num_layers
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


def _rotary(
    table: Shaped[Tensor, "1 N d"], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B k d"]:
    return of_batch_one((table,), chosen, num_tokens)[0]


BLOCKS = (
    BlockSpec(
        block_class="LuminaNextDiTBlock",
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": _rotary, "attention_mask": by_token},
    ),
    BlockSpec(
        block_class="Lumina2TransformerBlock",
        text_inside=True,
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": rows_after_text, "attention_mask": _refuse_lengths},
    ),
)

MODELS = (
    ModelSpec(
        model_class="LuminaNextDiT2DModel",
        name="Lumina-Next",
        context_is="mean of the text",
        block_lists=("layers",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="time_caption_embed.timestep_embedder",
        context=text_mean("encoder_mask"),
        guidance="one batch",
        text_tokens=256,
        tokens=latent_grid,
        own_tokens=own_square,
        dims=_next_dims,
        flops=_next_flops,
    ),
    ModelSpec(
        model_class="Lumina2Transformer2DModel",
        name="Lumina-Image 2.0",
        context_is="mean of the text",
        block_lists=("layers",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="time_caption_embed.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        text_tokens=256,
        tokens=latent_grid,
        own_tokens=own_square,
        dims=_dims,
        flops=_flops,
    ),
)
