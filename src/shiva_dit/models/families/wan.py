"""Videos by cross attention to text: Wan and its kin, LTX, Allegro."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shiva_dit.models import examples
from shiva_dit.models.examples import Size
from shiva_dit.models.rows import TABLE, Rows
from shiva_dit.models.spec import (
    BlockSpec,
    ModelSpec,
    count_tokens,
    given,
    mean_text,
    text_mean,
)

PICTURE_TOKENS = 257
"""Tokens of a picture to start from, in Wan's models from image to video (CLIP's)."""
SEGMENT = 21
"""Frames of latents that Wan Animate's pipeline makes at a time, by default."""
WITH_PICTURE = 512
"""Text tokens of these models: their attention has the number written in."""


def _picture(model: Any, size: Size) -> Float[Tensor, "pictures N Dp"] | None:
    """A picture to start from, two for models that end in one as well."""
    config = model.config
    if not config.get("image_dim"):
        return None
    if size.text != WITH_PICTURE:
        raise ValueError(
            f"Wan's models that read a picture take {WITH_PICTURE} text tokens, got {size.text}."
        )
    pictures = 2 if config.get("pos_embed_seq_len") else 1
    return size.draw(pictures * size.batch, PICTURE_TOKENS, config.image_dim)


def _frame_rates(model: Any, size: Size) -> list[int] | None:
    return [1] * size.batch if model.config.inject_sample_info else None


def _mean_text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    """The mean of the text, which pipelines give with a dimension more, (B, 1, T, Dc)."""
    text: Tensor = given(model, arguments, "encoder_hidden_states")
    return mean_text(text.flatten(1, -2), arguments.get("encoder_attention_mask"))


def _own_tokens(model: Any) -> int:
    config = model.config
    shape = config.sample_frames, config.sample_height, config.sample_width
    return count_tokens(model, torch.empty((1, config.in_channels, *shape), device="meta"))


def _positions(
    embedding: tuple[Any, tuple[Int[Tensor, "1 N"], ...]],
    chosen: Int[Tensor, "B k"],
    num_tokens: int,
) -> tuple[Any, tuple[Int[Tensor, "B k"], ...]]:
    """Rotary tables by coordinate, and every token's three coordinates: these are gathered."""
    tables, positions = embedding
    return tables, Rows()(positions, chosen, num_tokens)


def _tables_and_positions(model: Any, size: Size) -> tuple[Any, tuple[Int[Tensor, "1 N"], ...]]:
    sides = size.frames, size.height, size.width
    width = model.config.attention_head_dim // 3
    tables = tuple((torch.ones(side, width), torch.zeros(side, width)) for side in sides)
    places = torch.cartesian_prod(*(torch.arange(side) for side in sides))
    return tables, tuple(along[None] for along in places.T.contiguous())


def _poses(model: Any, size: Size) -> Float[Tensor, "B C F H W"]:
    """Of all frames but the first, which is the picture that is brought to life."""
    pose = examples.video("latent_channels")(model, size)
    return pose[:, :, model.config.patch_size[0] :]


def _faces(model: Any, size: Size) -> Float[Tensor, "B 3 F H W"]:
    """Four frames of the face for each of these."""
    side = model.config.motion_encoder_size
    return size.draw(size.batch, 3, 4 * (size.frames - 1), side, side)


def _text_of_cosmos(model: Any, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    """The mean text, which may come with a picture's tokens."""
    if model.config.extra_pos_embed_type == "learnable":
        raise ValueError(
            "Cosmos 1 is not served: it is told the logarithm of its noise, not a time. Cosmos "
            "Predict 2 and 2.5 are."
        )
    text = given(model, arguments, "encoder_hidden_states")
    return mean_text(text[0] if isinstance(text, tuple) else text, arguments.get("attention_mask"))


def _pixels_without_padding(model: Any, size: Size) -> Float[Tensor, "1 1 H W"] | None:
    if not model.config.concat_padding_mask:
        return None
    _, high, wide = model.config.patch_size
    return torch.zeros(1, 1, size.height * high, size.width * wide)


def _text_of_projection(model: Any, size: Size) -> Float[Tensor, "B T Dc"]:
    config = model.config
    name = "crossattn_proj_in_channels" if config.use_crossattn_projection else "text_embed_dim"
    return size.draw(size.batch, size.text, config[name])


BLOCKS = (
    BlockSpec(
        block_class="CosmosTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={
            "image_rotary_emb": TABLE,
            "extra_pos_emb": Rows(),
            "embedded_timestep": Rows(dims=3),
            "temb": Rows(dims=3),
            "controlnet_residual": Rows(),
        },
    ),
    BlockSpec(
        block_class="WanTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"rotary_emb": Rows(), "temb": Rows(dims=4)},
    ),
    BlockSpec(
        block_class="SkyReelsV2TransformerBlock",
        value_modules=("attn1.to_v",),
        rows={
            "rotary_emb": Rows(),
            "temb": Rows(axis=2, dims=4),
            "attention_mask": Rows(axis=(3, 2)),  # the last one contiguous
        },
    ),
    BlockSpec(
        block_class="LTXVideoTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": Rows(), "temb": Rows()},
    ),
    BlockSpec(
        block_class="AllegroTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": _positions, "attention_mask": Rows(axis=-1)},
    ),
)

_WAN = ModelSpec(
    model_class="WanTransformer3DModel",
    name="Wan 2.1 and 2.2",
    block_lists=("blocks",),
    time_embedder="condition_embedder.time_embedder",
    context=text_mean("zeros"),
    text_tokens=512,
    token_times="clean",
    inputs={
        "hidden_states": examples.video(),
        "encoder_hidden_states": examples.text("text_dim"),
        "encoder_hidden_states_image": _picture,
    },
)
MODELS = (
    _WAN,
    replace(_WAN, model_class="ChronoEditTransformer3DModel", name="ChronoEdit"),
    replace(
        _WAN,
        model_class="WanVACETransformer3DModel",
        name="Wan VACE",
        token_times="one",
        inputs={**_WAN.inputs, "control_hidden_states": examples.video("vace_in_channels")},
    ),
    replace(
        _WAN,
        model_class="WanAnimateTransformer3DModel",
        name="Wan Animate",
        token_times="one",
        sizes=lambda model, i: (SEGMENT, 1, i),  # what sees faces costs by frames, not by tokens
        inputs={**_WAN.inputs, "pose_hidden_states": _poses, "face_pixel_values": _faces},
    ),
    replace(
        _WAN,
        model_class="SkyReelsV2Transformer3DModel",
        name="SkyReels V2",
        frame_times=lambda times: times,
        frame_options={"enable_diffusion_forcing": True},
        sizes=lambda model, i: (model.config.num_frame_per_block, 2, 2 * i),
        inputs={**_WAN.inputs, "fps": _frame_rates},
    ),
    ModelSpec(
        model_class="CosmosTransformer3DModel",
        name="Cosmos Predict 2 and 2.5, Anima",
        noise_timestep=1.0,
        time_embedder="time_embed.t_embedder",
        context=_text_of_cosmos,
        text_tokens=512,
        token_times="clean",
        frame_times=lambda times: times[:, None, :, None, None],
        own_tokens=lambda model: None,
        inputs={
            "hidden_states": examples.video(),
            "encoder_hidden_states": _text_of_projection,
            "padding_mask": _pixels_without_padding,
        },
    ),
    ModelSpec(
        model_class="LTXVideoTransformer3DModel",
        name="LTX-Video",
        time_embedder="time_embed.emb.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        guidance="one batch",
        text_tokens=128,
        token_times="several",
        inputs={
            "hidden_states": examples.packed,
            "encoder_hidden_states": examples.text("caption_channels"),
            "encoder_attention_mask": examples.mask(),
            "num_frames": lambda model, size: size.frames,
            "height": lambda model, size: size.height,
            "width": lambda model, size: size.width,
        },
    ),
    ModelSpec(
        model_class="AllegroTransformer3DModel",
        name="Allegro",
        least_tokens=2,  # they drop a dimension of one
        learned_by="diffusion schedule",
        time_embedder="adaln_single.emb.timestep_embedder",
        context=_mean_text,
        guidance="one batch",
        text_tokens=512,
        own_tokens=_own_tokens,
        inputs={
            "hidden_states": examples.video(),
            "encoder_hidden_states": examples.text("caption_channels"),
            "encoder_attention_mask": examples.mask(),
            "image_rotary_emb": _tables_and_positions,
        },
    ),
)
