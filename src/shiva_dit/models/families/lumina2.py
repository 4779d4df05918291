"""Lumina-Image 2.0: one stream, the text's tokens first; time runs from 0 (noise) to 1."""

from __future__ import annotations

from typing import Any, NoReturn

from shiva_dit.core.flops import ModelFlops, SharedBlockShape
from shiva_dit.models.rows import rows_after_text
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, latent_grid, text_mean


def _refuse_lengths(*_: Any) -> NoReturn:
    raise ValueError(
        "the prompts of one call to Lumina2 must be of one length: where they differ, the image's "
        "tokens lie elsewhere in each sample. Call the model once per prompt."
    )


def _time_dim(model: Any) -> int:
    return min(model.config.hidden_size, 1024)


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.layers),
        width=model.config.hidden_size,
        time_dim=_time_dim(model),
        context_dim=model.config.cap_feat_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.config.hidden_size
    time = _time_dim(model)
    inner = int((config.ffn_dim_multiplier or 1) * 4 * width)
    inner = -(-inner // config.multiple_of) * config.multiple_of
    keys = width // config.num_attention_heads * (config.num_kv_heads or config.num_attention_heads)

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


BLOCKS = (
    BlockSpec(
        block_class="Lumina2TransformerBlock",
        text_inside=True,
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": rows_after_text, "attention_mask": _refuse_lengths},
    ),
)

MODELS = (
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
        lora_scale="attention_kwargs",
        text_tokens=256,
        tokens=latent_grid,
        dims=_dims,
        flops=_flops,
    ),
)
