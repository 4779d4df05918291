"""Flux and its kin: packed rows; double blocks, then single ones that hold image and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.models import examples
from shiva_dit.models.examples import Size
from shiva_dit.models.references import by_places
from shiva_dit.models.rows import TABLE, Rows
from shiva_dit.models.spec import BlockSpec, ModelSpec, pooled_text, text_mean


def _mask_among(
    options: Mapping[str, Any], chosen: Int[Tensor, "B k"], num_tokens: int
) -> dict[str, Any]:
    """The mask among the options of attention, (B, 1, 1, T + N)."""
    masks = {"attention_mask"} & options.keys()
    take = Rows(axis=-1, text="first")
    return {**options, **{name: take(options[name], chosen, num_tokens) for name in masks}}


def _text_by_layer(model: Any, size: Size) -> list[Float[Tensor, "B T Dc"]]:
    config = model.config
    layers = config.num_layers + config.num_single_layers
    return [size.draw(size.batch, size.text, config.text_encoder_dim) for _ in range(layers)]


_MASKED: Mapping[str, Any] = {
    "image_rotary_emb": TABLE,
    "attention_mask": Rows(axis=-1, text="first"),
}
BLOCKS = (
    *(
        BlockSpec(
            block_class=name,
            output=1,
            value_modules=("attn.to_v",),
            rows={"image_rotary_emb": TABLE},
        )
        for name in (
            "FluxTransformerBlock",
            "FluxSingleTransformerBlock",
            "LongCatImageTransformerBlock",
            "LongCatImageSingleTransformerBlock",
            "OvisImageTransformerBlock",
            "OvisImageSingleTransformerBlock",
            "BriaTransformerBlock",
            "BriaSingleTransformerBlock",
        )
    ),
    BlockSpec(
        block_class="Flux2TransformerBlock",
        output=1,
        value_modules=("attn.to_v",),
        counts_references="joint_attention_kwargs",
        rows={"image_rotary_emb": TABLE, "temb_mod_img": Rows(dims=3)},
    ),
    BlockSpec(
        block_class="BriaFiboTransformerBlock",
        output=1,
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": TABLE, "joint_attention_kwargs": _mask_among},
    ),
    BlockSpec(
        block_class="BriaFiboSingleTransformerBlock",
        text="first",
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": TABLE, "joint_attention_kwargs": _mask_among},
    ),
    BlockSpec(
        block_class="Flux2SingleTransformerBlock",
        text="first",
        value_modules=("attn.to_qkv_mlp_proj",),
        values_fused="third",
        counts_references="joint_attention_kwargs",
        rows={"image_rotary_emb": TABLE, "temb_mod": Rows(dims=3, text="first")},
    ),
    BlockSpec(
        block_class="Flux3ModeTransformerBlock",
        value_modules=("attn.to_v",),
        rows={"temb_mod": Rows(), "image_rotary_emb": TABLE},
    ),
    BlockSpec(
        block_class="Flux3SingleTransformerBlock",
        text="last",  # pictures to go by; the text is an argument of its own, and comes first
        output=1,
        value_modules=("attn.to_v",),
        rows_of_all=True,
        rows={"temb_mod": Rows(), "image_rotary_emb": TABLE},
    ),
    BlockSpec(
        block_class="ChromaTransformerBlock",
        output=1,
        value_modules=("attn.to_v",),
        rows=_MASKED,
    ),
    BlockSpec(
        block_class="ChromaSingleTransformerBlock",
        text="first",
        value_modules=("attn.to_v",),
        rows=_MASKED,
    ),
)

_INPUTS: Mapping[str, examples.Input] = {
    "hidden_states": examples.packed,
    "encoder_hidden_states": examples.text("joint_attention_dim"),
    "img_ids": examples.image_ids,
    "txt_ids": examples.text_ids,
    "guidance": examples.number(3.5, where="guidance_embeds"),
}
_IDS_OF_FOUR: Mapping[str, examples.Input] = {
    "img_ids": examples.image_ids_of_four,
    "txt_ids": examples.text_ids_of_four,
}
_FLUX = ModelSpec(
    model_class="FluxTransformer2DModel",
    name="Flux.1",
    context_is="pooled text",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    noise_timestep=1.0,
    time_embedder="time_text_embed.timestep_embedder",
    context=pooled_text,
    text_tokens=512,
    references=by_places(),
    inputs={**_INPUTS, "pooled_projections": examples.vector("pooled_projection_dim")},
)
_LONGCAT = replace(
    _FLUX,
    model_class="LongCatImageTransformer2DModel",
    name="LongCat-Image",
    context_is="mean of the text",
    time_embedder="time_embed.timestep_embedder",
    context=text_mean(),
    inputs=_INPUTS,
)
_BRIA = replace(
    _LONGCAT,
    model_class="BriaTransformer2DModel",
    name="Bria 3",
    noise_timestep=1000.0,
    context=text_mean("zeros"),
    guidance="one batch",
    text_tokens=128,
    references=None,
)
MODELS = (
    _FLUX,
    _LONGCAT,
    _BRIA,
    replace(
        _LONGCAT,
        model_class="OvisImageTransformer2DModel",
        name="Ovis-Image",
        time_embedder="timestep_embedder",
        text_tokens=256,
        references=None,
    ),
    replace(
        _BRIA,
        model_class="BriaFiboTransformer2DModel",
        name="Bria FIBO",
        text_tokens=3000,
        references=by_places(),
        by_layer=("text_encoder_layers",),
        inputs={**_INPUTS, "text_encoder_layers": _text_by_layer},
    ),
    replace(
        _LONGCAT,
        model_class="ChromaTransformer2DModel",
        name="Chroma",
        time_embedder=None,  # one network modulates all blocks
        not_recomputed="attention_mask",  # of single blocks, in 0.42.1
        context=text_mean("attention_mask"),
        references=None,
    ),
    replace(
        _LONGCAT,
        model_class="Flux2Transformer2DModel",
        name="Flux.2 (dev, klein)",
        time_embedder="time_guidance_embed.timestep_embedder",
        references=by_places("kv_cache_mode"),
        caches_references="kv_cache_mode",
        inputs={**_INPUTS, **_IDS_OF_FOUR},
    ),
    replace(
        _LONGCAT,
        model_class="Flux3Transformer2DModel",
        name="Flux.3",
        block_lists=("mode_blocks.image", "single_transformer_blocks"),
        time_embedder=None,  # it embeds the time 0 of text and pictures to go by as well
        text_tokens=512,
        references=None,  # they are no image tokens of its blocks, and run whole
        inputs={
            "hidden_states": examples.packed,
            "encoder_hidden_states": examples.text("joint_attention_dim"),
            **_IDS_OF_FOUR,
            "target_timestep": examples.number(0.0, where="flow_map"),
        },
    ),
)
