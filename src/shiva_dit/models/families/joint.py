"""Images by joint attention over image and text: SD3, AuraFlow, CogView, Qwen-Image, ..."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.models import examples
from shiva_dit.models.examples import Size
from shiva_dit.models.references import by_shapes
from shiva_dit.models.rows import TABLE, Rows
from shiva_dit.models.spec import BlockSpec, ModelSpec, SitePlace, given, pooled_text, text_mean


class _ImageOfPair:
    """A rotary table of the image, and one of the text, which stays."""

    def __call__(
        self, tables: tuple[Any, Any], chosen: Int[Tensor, "B k"], num_tokens: int
    ) -> tuple[Any, Any]:
        image, text = tables
        return TABLE(image, chosen, num_tokens), text

    def whole(
        self, tables: tuple[Any, Any], num_own: int, gather: Callable[[Tensor], Tensor]
    ) -> tuple[Any, Any]:
        """As of `Rows`."""
        image, text = tables
        return TABLE.whole(image, num_own, gather), text


_image_of_pair = _ImageOfPair()


def _pair(model: Any, size: Size) -> Tensor:
    """A size or a place in pixels, by sample."""
    return size.draw(size.batch, 2)


def _shapes(model: Any, size: Size) -> list[list[tuple[int, int, int]]]:
    return [[(size.frames, size.height, size.width)]] * size.batch


def _of_layers(model: Any, size: Size) -> Int[Tensor, " B"] | None:
    layered = model.config.get("use_additional_t_cond")
    return torch.zeros(size.batch, dtype=torch.long) if layered else None


def _mean_prior(model: Any, arguments: Mapping[str, Any]) -> Float[Tensor, "B D"]:
    """The mean of GLM-Image's prior: tokens that a language model drew for the prompt."""
    cache = arguments.get("kv_caches")
    if cache is not None and cache[0].mode == "write":
        raise ValueError(
            "GLM-Image with pictures to go by is not supported: the keys of all their tokens are "
            "kept, which pruned blocks don't have. Call it without image."
        )
    prior = model.prior_token_embedding(given(model, arguments, "prior_token_id")).detach()
    dropped = given(model, arguments, "prior_token_drop")[..., None]
    return prior.masked_fill(dropped, 0.0).mean(1)


def _prior(model: Any, size: Size) -> Int[Tensor, "B N"]:
    return torch.zeros(size.batch, size.tokens, dtype=torch.long)


def _pictures_of_one_size(model: Any, size: Size) -> Float[Tensor, "B pictures C 1 H W"]:
    _, high, wide = examples.patches(model, 3)
    sides = size.height * high, size.width * wide
    return size.draw(size.batch, size.frames, model.config.in_channels, 1, *sides)


def _patches(model: Any, size: Size) -> Float[Tensor, "B N C 1 ph pw"]:
    sides = examples.patches(model, 3)
    return size.draw(size.batch, size.tokens, model.config.in_channels, *sides)


def _tokens_of_pictures(model: Any, sample: Tensor) -> int:
    """Of latents (B, C, F, H, W), or of several such of each sample."""
    shape = sample.shape if sample.ndim == 5 else (1, *sample.shape[2:])
    pictures = 1 if sample.ndim == 5 else sample.shape[1]
    patch = math.prod(examples.patches(model, 3))
    return pictures * math.prod(shape[2:]) // patch


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
    BlockSpec(
        block_class="GlmImageTransformerBlock",
        output=0,
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": TABLE},
    ),
    BlockSpec(
        block_class="JoyImageTransformerBlock",
        output=0,
        value_modules=("attn.img_attn_qkv",),
        values_fused="third",
        rows={"image_rotary_emb": _image_of_pair},
    ),
    BlockSpec(
        block_class="JoyImageEditPlusTransformerBlock",
        output=0,
        value_modules=("attn.img_attn_qkv",),
        values_fused="third",
        rows={"image_rotary_emb": Rows(), "attention_mask": Rows(axis=-1, text="last")},
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
_JOYIMAGE = ModelSpec(
    model_class="JoyImageEditTransformer3DModel",
    name="JoyImage-Edit",
    block_lists=("double_blocks",),
    time_embedder="condition_embedder.time_embedder",
    context=text_mean(),
    text_tokens=1024,
    tokens=_tokens_of_pictures,
    inputs={
        "hidden_states": _pictures_of_one_size,
        "encoder_hidden_states": examples.text("text_dim"),
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
        learned_by="diffusion schedule",
        text_tokens=224,
    ),
    ModelSpec(
        model_class="QwenImageTransformer2DModel",
        name="Qwen-Image, Qwen-Image-Edit",
        noise_timestep=1.0,
        time_embedder="time_text_embed.timestep_embedder",
        context=text_mean("encoder_hidden_states_mask"),
        text_tokens=512,
        references=by_shapes,
        inputs={
            "hidden_states": examples.packed,
            "encoder_hidden_states": examples.text("joint_attention_dim"),
            "encoder_hidden_states_mask": examples.mask(),
            "img_shapes": _shapes,
            "additional_t_cond": _of_layers,
        },
    ),
    ModelSpec(
        model_class="GlmImageTransformer2DModel",
        name="GLM-Image (text to image)",
        context_is="mean of the prior's tokens",
        time_embedder="time_condition_embed.timestep_embedder",
        context=_mean_prior,
        text_tokens=32,
        inputs={
            "hidden_states": examples.image,
            "encoder_hidden_states": examples.text("text_embed_dim"),
            "prior_token_id": _prior,
            "prior_token_drop": lambda model, size: _prior(model, size).bool(),
            "target_size": _pair,
            "crop_coords": _pair,
        },
    ),
    _JOYIMAGE,
    replace(
        _JOYIMAGE,
        model_class="JoyImageEditPlusTransformer3DModel",
        name="JoyImage-Edit-Plus",
        context=text_mean("encoder_hidden_states_mask"),
        guidance="one batch",
        tokens=lambda model, sample: sample.shape[1],
        inputs={
            "hidden_states": _patches,
            "encoder_hidden_states": examples.text("text_dim"),
            "encoder_hidden_states_mask": examples.mask(),
            "shape_list": lambda m, s: [[(s.frames, s.height, s.width)]] * s.batch,
        },
    ),
)
