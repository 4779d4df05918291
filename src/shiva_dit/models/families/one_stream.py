"""Images by one stream of text and image, or one that reads the text: Z-Image, Lumina 2, ..."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from shiva_dit.models import examples
from shiva_dit.models.examples import Size
from shiva_dit.models.rows import TABLE, Rows, alike
from shiva_dit.models.spec import BlockSpec, ModelSpec, given, mean_text, text_mean

MULTIPLE = 32
"""Z-Image pads image and text to a multiple of so many tokens each."""


def _padded_tokens(model: Any, sample: Sequence[Any] | Tensor) -> int:
    """Image tokens of pictures (C, F, H, W), padding included.

    Args:
        model: Z-Image.
        sample: A list of them as pipelines pass it, or a batch.

    Raises:
        ValueError: If images differ in size, or others are there to go by (omni mode).
    """
    if not all(isinstance(image, Tensor) for image in sample):
        raise ValueError("Z-Image with pictures to go by (omni mode) is not supported.")
    shapes = {tuple(image.shape) for image in sample}
    if len(shapes) > 1:
        raise ValueError(
            f"the images of one call must be of one size, got {sorted(shapes)}: a block keeps as "
            "many tokens of each. Call the model once per size."
        )
    _, frames, height, width = shapes.pop()
    patch, frame_patch = model.config.all_patch_size[0], model.config.all_f_patch_size[0]
    tokens = (frames // frame_patch) * (height // patch) * (width // patch)
    return -(-tokens // MULTIPLE) * MULTIPLE


def _mean_of_each(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    return torch.stack([text.mean(0) for text in given(model, arguments, "cap_feats")])


def _mean_of_layers(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    layers: Tensor = given(model, arguments, "encoder_hidden_states")  # (B, T, layers, Dc)
    return mean_text(layers.mean(2), arguments.get("encoder_attention_mask"))


def _refuse_lengths(*_: Any) -> NoReturn:
    raise ValueError(
        "the prompts of one call to Lumina2 must be of one length: where they differ, the image's "
        "tokens lie elsewhere in each sample. Call the model once per prompt."
    )


def _pictures(model: Any, size: Size) -> list[Float[Tensor, "C F H W"]]:
    patch, frame_patch = model.config.all_patch_size[0], model.config.all_f_patch_size[0]
    sides = size.frames * frame_patch, size.height * patch, size.width * patch
    return list(size.draw(size.batch, model.config.in_channels, *sides))


def _mean_of_lengths(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    text: Tensor = given(model, arguments, "text_bth")
    places = torch.arange(text.shape[1], device=text.device)
    return mean_text(text, places < given(model, arguments, "text_lens")[:, None])


OF_TEXT, OF_PICTURE = 3, 2
"""What Ideogram 4 calls its tokens."""
_COUNTED: Any = WeakIdKeyDictionary()


def _tokens_of_picture(arguments: Mapping[str, Any]) -> int:
    """N of Ideogram 4, whose rows say what they are: read once for all steps of a run."""
    said: Tensor = arguments["indicator"]
    if said not in _COUNTED:
        _COUNTED[said] = int((said[0] == OF_PICTURE).sum())
    return _COUNTED[said]


def _joint_rows(width: str) -> examples.Input:
    """Rows of text and picture."""
    return lambda m, s: s.draw(s.batch, s.text + s.tokens, m.config[width])


def _said(model: Any, size: Size) -> Int[Tensor, "B S"]:
    said = torch.full((size.batch, size.text + size.tokens), OF_PICTURE)
    said[:, : size.text] = OF_TEXT
    return said


def _lengths(model: Any, size: Size) -> Int[Tensor, " B"]:
    return torch.full((size.batch,), size.text)


SLOT = 4
"""Tokens of the target for each place that Qwen-Image 2.1's language model keeps for them."""


def _places_of_target(model: Any, size: Size) -> Bool[Tensor, "B S"]:
    """Which places of text and picture are the picture's."""
    of_text = torch.zeros(size.batch, size.text, dtype=torch.bool)
    return torch.cat([of_text, torch.ones(size.batch, size.tokens // SLOT).bool()], dim=1)


def _refuse_flex(*_: Any) -> NoReturn:
    raise ValueError(
        "QwenImage21FlexAttnProcessor masks by places in all tokens, of which pruned blocks have "
        "some: set QwenImage21AttnProcessor (transformer.set_attn_processor)."
    )


def _mask_of_keys(mask: Any, chosen: Int[Tensor, "B k"], num_tokens: int) -> Any:
    if not isinstance(mask, Tensor):
        _refuse_flex()
    return Rows(axis=-1, text="first")(mask, chosen, num_tokens)


def _position_ids(model: Any, size: Size) -> Float[Tensor, "S 3"]:
    return torch.cat([examples.text_ids(model, size), examples.image_ids(model, size)])


def _layers_of_text(model: Any, size: Size) -> Float[Tensor, "B T layers Dc"]:
    config = model.config
    return size.draw(size.batch, size.text, config.num_text_layers, config.text_hidden_dim)


BLOCKS = (
    BlockSpec(
        block_class="ZImageTransformerBlock",
        hidden="x",
        text="last",
        value_modules=("attention.to_v",),
        values_of_text_last=True,
        rows={"freqs_cis": Rows(text="last"), "attn_mask": Rows(axis=-1, text="last")},
    ),
    BlockSpec(
        block_class="Lumina2TransformerBlock",
        text="first",
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": Rows(text="first"), "attention_mask": _refuse_lengths},
    ),
    BlockSpec(
        block_class="PRXBlock",
        value_modules=("attention.img_qkv_proj",),
        values_fused="third",
        rows={"image_rotary_emb": Rows(axis=2)},
    ),
    BlockSpec(
        block_class="Krea2TransformerBlock",
        text="first",
        value_modules=("attn.to_v",),
        rows={"image_rotary_emb": TABLE, "attention_mask": Rows(axis=-1, text="first")},
    ),
    BlockSpec(
        block_class="ErnieImageSharedAdaLNBlock",
        hidden="x",
        text="last",
        tokens_first=True,
        value_modules=("self_attention.to_v",),
        values_of_text_last=True,
        rows={
            "rotary_pos_emb": Rows(text="last"),
            "temb": alike(0),
            "attention_mask": Rows(axis=-1, text="last"),
        },
    ),
    BlockSpec(
        block_class="Ideogram4TransformerBlock",
        text="first",
        value_modules=("attention.to_v",),
        rows={
            "attention_mask": Rows(axis=(3, 2), text="first"),
            "image_rotary_emb": Rows(text="first"),
        },
    ),
    BlockSpec(
        block_class="QwenImage21TransformerBlock",
        text="first",
        value_modules=("attn.to_v",),
        rows={
            "rotary_emb": TABLE,
            "attention_mask": _mask_of_keys,
            "target_token_mask": alike(0),
            "key_valid": Rows(text="first"),
        },
    ),
)

MODELS = (
    ModelSpec(
        model_class="ZImageTransformer2DModel",
        name="Z-Image",
        block_lists=("layers",),
        depths=("n_layers",),
        sample="x",
        timestep="t",
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="t_embedder",
        context=_mean_of_each,
        guidance="one batch",
        text_tokens=512,
        tokens=_padded_tokens,
        sizes=lambda model, i: (1, 8, 4 * i),
        for_text=lambda config, text: {"axes_lens": (text + 2 * MULTIPLE, 64, 64)},
        inputs={
            "x": _pictures,
            "cap_feats": lambda model, size: list(examples.text("cap_feat_dim")(model, size)),
        },
    ),
    ModelSpec(
        model_class="Lumina2Transformer2DModel",
        name="Lumina-Image 2.0",
        block_lists=("layers",),
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="time_caption_embed.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        text_tokens=256,
        inputs={
            "hidden_states": examples.image,
            "encoder_hidden_states": examples.text("cap_feat_dim"),
            "encoder_attention_mask": examples.mask(),
        },
    ),
    ModelSpec(
        model_class="PRXTransformer2DModel",
        name="PRX",
        block_lists=("blocks",),
        depths=("depth",),
        noise_timestep=1.0,
        time_embedder="time_in",
        context=text_mean("attention_mask"),
        guidance="one batch",
        text_tokens=256,
        inputs={
            "hidden_states": examples.image,
            "encoder_hidden_states": examples.text("context_in_dim"),
            "attention_mask": examples.mask(torch.bool),
        },
    ),
    ModelSpec(
        model_class="Krea2Transformer2DModel",
        name="Krea 2",
        noise_timestep=1.0,
        time_embedder="time_embed",
        context=_mean_of_layers,
        text_tokens=512,
        inputs={
            "hidden_states": examples.packed,
            "encoder_hidden_states": _layers_of_text,
            "position_ids": _position_ids,
            "encoder_attention_mask": examples.mask(torch.bool),
        },
    ),
    ModelSpec(
        model_class="ErnieImageTransformer2DModel",
        name="Ernie-Image",
        block_lists=("layers",),
        time_embedder="time_embedding",
        context=_mean_of_lengths,
        guidance="one batch",
        text_tokens=256,
        inputs={
            "hidden_states": examples.image,
            "text_bth": examples.text("text_in_dim"),
            "text_lens": _lengths,
        },
    ),
    ModelSpec(
        model_class="Ideogram4Transformer2DModel",
        name="Ideogram 4",
        block_lists=("layers",),
        padded_like="encoder_hidden_states",
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="t_embedding",
        context=text_mean("zeros"),
        text_tokens=2048,
        called_tokens=_tokens_of_picture,
        returns_text=True,
        own_tokens=lambda model: None,
        inputs={
            "hidden_states": _joint_rows("in_channels"),
            "encoder_hidden_states": _joint_rows("llm_features_dim"),
            "position_ids": lambda m, s: torch.zeros(s.batch, s.text + s.tokens, 3),
            "segment_ids": lambda m, s: torch.ones(s.batch, s.text + s.tokens, dtype=torch.long),
            "indicator": _said,
        },
    ),
    ModelSpec(
        model_class="QwenImage21Transformer2DModel",
        name="Qwen-Image 2.1",
        noise_timestep=1.0,
        time_embedder="time_text_embed.timestep_embedder",
        context=text_mean("encoder_hidden_states_mask"),
        text_tokens=512,
        called_tokens=lambda arguments: math.prod(arguments["img_shapes"][0][-1]),
        returns_text=True,
        sizes=lambda model, i: (1, 2, 4 * i),
        inputs={
            "hidden_states": examples.packed,
            "encoder_hidden_states": examples.text("context_in_dim"),
            "img_shapes": lambda m, s: [[(s.frames, s.height, s.width)]] * s.batch,
            "img_mask": _places_of_target,
        },
    ),
)
