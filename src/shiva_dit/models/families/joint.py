"""Images by joint attention over image and text: SD3, AuraFlow, CogView, Qwen-Image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from shiva_dit.models import examples
from shiva_dit.models.examples import Size
from shiva_dit.models.rows import TABLE, Rows
from shiva_dit.models.spec import BlockSpec, ModelSpec, SitePlace, pooled_text, text_mean


def _image_of_pair(
    tables: tuple[Tensor, Tensor], chosen: Int[Tensor, "B k"], num_tokens: int
) -> tuple[Any, Tensor]:
    """A rotary table of the image, and one of the text, which stays."""
    image, text = tables
    return TABLE(image, chosen, num_tokens), text


def _pair(model: Any, size: Size) -> Tensor:
    """A size or a place in pixels, by sample."""
    return size.draw(size.batch, 2)


def _shapes(model: Any, size: Size) -> list[list[tuple[int, int, int]]]:
    return [[(size.frames, size.height, size.width)]] * size.batch


def _of_layers(model: Any, size: Size) -> Int[Tensor, " B"] | None:
    layered = model.config.get("use_additional_t_cond")
    return torch.zeros(size.batch, dtype=torch.long) if layered else None


BLOCKS = (
    BlockSpec(
        block_class="JointTransformerBlock",
        output=1,
        value_modules=("attn.to_v", "attn2.to_v"),
        sites={
            "attention": (SitePlace("attn", output=0), SitePlace("attn2")),
            "feed_forward": (SitePlace("ff"),),
            "heads": (SitePlace("attn.to_out.0"), SitePlace("attn2.to_out.0")),
            "hidden": (SitePlace("ff.net.2"),),
        },
    ),
    BlockSpec(block_class="AuraFlowJointTransformerBlock", output=1, value_modules=("attn.to_v",)),
    BlockSpec(
        block_class="AuraFlowSingleTransformerBlock", text="first", value_modules=("attn.to_v",)
    ),
    BlockSpec(block_class="CogView3PlusTransformerBlock", output=0, value_modules=("attn1.to_v",)),
    BlockSpec(
        block_class="CogView4TransformerBlock",
        output=0,
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": TABLE},
    ),
    BlockSpec(
        block_class="QwenImageTransformerBlock",
        output=1,
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": _image_of_pair, "modulate_index": Rows()},
    ),
)

_SD3 = ModelSpec(
    model_class="SD3Transformer2DModel",
    name="Stable Diffusion 3 and 3.5",
    context_is="pooled text",
    time_embedder="time_text_embed.timestep_embedder",
    context=pooled_text,
    guidance="one batch",
    text_tokens=333,
    inputs={
        "hidden_states": examples.image,
        "encoder_hidden_states": examples.text("joint_attention_dim"),
        "pooled_projections": examples.vector("pooled_projection_dim"),
    },
)
_COGVIEW4 = ModelSpec(
    model_class="CogView4Transformer2DModel",
    name="CogView4",
    time_embedder="time_condition_embed.timestep_embedder",
    context=text_mean("attention_mask"),
    text_tokens=1024,
    inputs={
        "hidden_states": examples.image,
        "encoder_hidden_states": examples.text("text_embed_dim"),
        "original_size": _pair,
        "target_size": _pair,
        "crop_coords": _pair,
    },
)
MODELS = (
    _SD3,
    ModelSpec(
        model_class="AuraFlowTransformer2DModel",
        name="AuraFlow",  # eight tokens of its own come before the text
        block_lists=("joint_transformer_blocks", "single_transformer_blocks"),
        depths=("num_mmdit_layers", "num_single_dit_layers"),
        noise_timestep=1.0,
        time_embedder="time_step_proj",
        context=text_mean("zeros"),
        guidance="one batch",
        text_tokens=256,
        inputs={
            "hidden_states": examples.image,
            "encoder_hidden_states": examples.text("joint_attention_dim"),
        },
    ),
    _COGVIEW4,
    replace(
        _COGVIEW4,
        model_class="CogView3PlusTransformer2DModel",
        name="CogView3-Plus",
        guidance="one batch",
        diffusion=True,
        text_tokens=224,
    ),
    ModelSpec(
        model_class="QwenImageTransformer2DModel",
        name="Qwen-Image, Qwen-Image-Edit",
        noise_timestep=1.0,
        time_embedder="time_text_embed.timestep_embedder",
        context=text_mean("encoder_hidden_states_mask"),
        text_tokens=512,
        inputs={
            "hidden_states": examples.packed,
            "encoder_hidden_states": examples.text("joint_attention_dim"),
            "encoder_hidden_states_mask": examples.mask(),
            "img_shapes": _shapes,
            "additional_t_cond": _of_layers,
        },
    ),
)
