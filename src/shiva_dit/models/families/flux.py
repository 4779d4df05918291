"""Flux and its kin: packed rows; double blocks, then single ones that hold image and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.models import examples
from shiva_dit.models.rows import TABLE, Rows
from shiva_dit.models.spec import BlockSpec, ModelSpec, pooled_text, text_mean


def _uncached_text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    if arguments.get("kv_cache_mode") is not None:
        raise ValueError(
            "Flux.2 with cached keys of pictures to go by (kv_cache_mode) is not supported: the "
            "cache expects these tokens first in every block. Use Flux2KleinPipeline, which runs "
            "them along."
        )
    return text_mean()(model, arguments)


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
            "Flux2TransformerBlock",
        )
    ),
    BlockSpec(
        block_class="Flux2SingleTransformerBlock",
        text="first",
        value_modules=("attn.to_qkv_mlp_proj",),
        values_fused=True,
        rows={"image_rotary_emb": TABLE},
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
_FLUX = ModelSpec(
    model_class="FluxTransformer2DModel",
    name="Flux.1",
    context_is="pooled text",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    noise_timestep=1.0,
    time_embedder="time_text_embed.timestep_embedder",
    context=pooled_text,
    text_tokens=512,
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
MODELS = (
    _FLUX,
    _LONGCAT,
    replace(
        _LONGCAT,
        model_class="OvisImageTransformer2DModel",
        name="Ovis-Image",
        time_embedder="timestep_embedder",
        text_tokens=256,
    ),
    replace(
        _LONGCAT,
        model_class="BriaTransformer2DModel",
        name="Bria 3",
        noise_timestep=1000.0,
        context=text_mean("zeros"),
        guidance="one batch",
        text_tokens=128,
    ),
    replace(
        _LONGCAT,
        model_class="ChromaTransformer2DModel",
        name="Chroma",
        time_embedder=None,  # one network modulates all blocks
        not_recomputed="attention_mask",  # of single blocks, in 0.42.1
        context=text_mean("attention_mask"),
    ),
    replace(
        _LONGCAT,
        model_class="Flux2Transformer2DModel",
        name="Flux.2 (dev, klein)",
        time_embedder="time_guidance_embed.timestep_embedder",
        context=_uncached_text,
        inputs={
            **_INPUTS,
            "img_ids": examples.image_ids_of_four,
            "txt_ids": examples.text_ids_of_four,
        },
    ),
)
