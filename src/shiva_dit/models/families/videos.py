"""Videos by joint attention over video and text: CogVideoX, HunyuanVideo, Mochi, Motif, ...

HunyuanImage is HunyuanVideo's kin.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.models import examples
from shiva_dit.models.examples import Size, patches
from shiva_dit.models.rows import TABLE, Rows
from shiva_dit.models.spec import BlockSpec, ModelSpec, pooled_text, text_mean

GLYPH_TOKENS = 128
"""Tokens of HunyuanImage's second encoder, as its pipeline pads them."""
FACE_TOKENS = 577
"""Tokens of a face, in the encoder that ConsisID reads."""


def _cogvideox_tokens(model: Any, sample: Float[Tensor, "B F C H W"]) -> int:
    frames, _, height, width = sample.shape[1:]
    by_time, high, wide = patches(model, 3)
    return -(-frames // by_time) * (height // high) * (width // wide)


def _cogvideox_own(model: Any) -> int:
    config = model.config
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    shape = 1, frames, config.in_channels, config.sample_height, config.sample_width
    return _cogvideox_tokens(model, torch.empty(shape, device="meta"))


def _cogvideox_sizes(model: Any, i: int) -> tuple[int, int, int]:
    """Models that learned their positions take one height and width alone."""
    config, patch = model.config, model.config.patch_size
    if not config.use_learned_positional_embeddings:
        return i, 2, 2
    return i, config.sample_height // patch, config.sample_width // patch


def _frames_first(model: Any, size: Size) -> Float[Tensor, "B F C H W"]:
    return examples.video()(model, size).transpose(1, 2)


def _cogvideox_tables(model: Any, size: Size) -> tuple[Tensor, Tensor] | None:
    if not model.config.use_rotary_positional_embeddings:
        return None
    return examples.angles("attention_head_dim")(model, size)


def _has_glyphs(model: Any) -> bool:
    return model.config.text_embed_2_dim is not None


def _sentences(model: Any, size: Size) -> int:
    """Tokens of HunyuanImage's first encoder, of all T."""
    tokens = size.text - GLYPH_TOKENS if _has_glyphs(model) else size.text
    if tokens < 0:
        raise ValueError(
            f"{GLYPH_TOKENS} of HunyuanImage's text tokens are its second encoder's: text_tokens "
            f"must be {GLYPH_TOKENS} at least, got {size.text}."
        )
    return tokens


def _sentence_text(model: Any, size: Size) -> Float[Tensor, "B T Dc"]:
    return size.draw(size.batch, _sentences(model, size), model.config.text_embed_dim)


def _sentence_mask(model: Any, size: Size) -> Int[Tensor, "B T"]:
    return torch.ones(size.batch, _sentences(model, size), dtype=torch.long)


def _glyph_text(model: Any, size: Size) -> Float[Tensor, "B T Dc"] | None:
    if not _has_glyphs(model):
        return None
    return size.draw(size.batch, GLYPH_TOKENS, model.config.text_embed_2_dim)


def _glyph_mask(model: Any, size: Size) -> Int[Tensor, "B T"] | None:
    return torch.ones(size.batch, GLYPH_TOKENS, dtype=torch.long) if _has_glyphs(model) else None


def _beside_latents(model: Any, size: Size) -> Float[Tensor, "B C F H W"] | None:
    """What EasyAnimate's models for inpainting and control are given beside the latents."""
    config = model.config
    more = config.in_channels - config.out_channels
    return examples.video()(model, size)[:, :more] if more else None


def _second_text(model: Any, size: Size) -> Float[Tensor, "B T Dc"] | None:
    """EasyAnimate's second encoder, where it has one: as many tokens as the first one's."""
    width = model.config.text_embed_dim_t5
    return None if width is None else size.draw(size.batch, size.text, width)


def _decoders(model: Any) -> tuple[int, ...]:
    """The last blocks of Motif-Video read all tokens in the text's place, and change them."""
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    return tuple(range(blocks - model.num_decoder_layers, blocks))


def _faces(model: Any, size: Size) -> Float[Tensor, "B D"] | None:
    """What ConsisID's encoders see of a face: a vector, and their layers' tokens."""
    return size.draw(size.batch, model.config.LFE_id_dim) if model.config.is_train_face else None


def _layers_of_faces(model: Any, size: Size) -> list[Float[Tensor, "B 577 D"]] | None:
    config = model.config
    if not config.is_train_face:
        return None
    shape = size.batch, FACE_TOKENS, config.LFE_vit_dim
    return [size.draw(*shape) for _ in range(config.LFE_num_scale)]


BLOCKS = (
    *(
        BlockSpec(
            block_class=name,
            output=0,
            value_modules=("attn1.to_v",),
            rows={"image_rotary_emb": TABLE},
        )
        for name in ("CogVideoXBlock", "ConsisIDBlock")
    ),
    BlockSpec(
        block_class="HunyuanVideo15TransformerBlock",
        output=0,
        value_modules=("attn.to_v",),
        rows={"freqs_cis": TABLE},
    ),
    *(
        BlockSpec(
            block_class=name,
            output=0,
            value_modules=("attn.to_v",),
            values_of_text_last=True,
            rows={table: TABLE, "attention_mask": Rows(axis=-1, text="last")},
        )
        for name, table in (
            ("HunyuanVideoTransformerBlock", "freqs_cis"),
            ("HunyuanVideoSingleTransformerBlock", "image_rotary_emb"),
            ("HunyuanImageTransformerBlock", "image_rotary_emb"),
            ("HunyuanImageSingleTransformerBlock", "image_rotary_emb"),
            ("MotifVideoTransformerBlock", "image_rotary_emb"),
            ("MotifVideoSingleTransformerBlock", "image_rotary_emb"),
        )
    ),
    BlockSpec(
        block_class="MochiTransformerBlock",
        output=0,
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": Rows(batch="none")},
    ),
    BlockSpec(
        block_class="EasyAnimateTransformerBlock",
        output=0,
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": TABLE},
    ),
)

_HUNYUAN_VIDEO = ModelSpec(
    model_class="HunyuanVideoTransformer3DModel",
    name="HunyuanVideo (text to video)",
    context_is="pooled text",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    time_embedder="time_text_embed.timestep_embedder",
    context=pooled_text,
    told_guidance=1000.0,
    text_tokens=256,
    inputs={
        "hidden_states": examples.video(),
        "encoder_hidden_states": examples.text("text_embed_dim"),
        "encoder_attention_mask": examples.mask(),
        "pooled_projections": examples.vector("pooled_projection_dim"),
        "guidance": examples.number(6000.0, where="guidance_embeds"),
    },
)
_COGVIDEOX = ModelSpec(
    model_class="CogVideoXTransformer3DModel",
    name="CogVideoX",
    channels=2,
    learned_by="diffusion schedule",
    time_embedder="time_embedding",
    context=text_mean(),
    guidance="one batch",
    text_tokens=226,
    for_text=lambda config, text: {"max_text_seq_length": text},
    frame_axis=1,
    tokens=_cogvideox_tokens,
    own_tokens=_cogvideox_own,
    sizes=_cogvideox_sizes,
    inputs={
        "hidden_states": _frames_first,
        "encoder_hidden_states": examples.text("text_embed_dim"),
        "image_rotary_emb": _cogvideox_tables,
        "ofs": examples.number(2.0, where="ofs_embed_dim"),
    },
)
_HUNYUAN_VIDEO_15 = ModelSpec(
    model_class="HunyuanVideo15Transformer3DModel",
    name="HunyuanVideo 1.5",
    time_embedder="time_embed.timestep_embedder",
    context=text_mean("encoder_attention_mask"),
    text_tokens=1000,
    inputs={
        "hidden_states": examples.video(),
        "encoder_hidden_states": examples.text("text_embed_dim"),
        "encoder_attention_mask": examples.mask(),
        "encoder_hidden_states_2": lambda m, s: s.draw(s.batch, 256, m.config.text_embed_2_dim),
        "encoder_attention_mask_2": lambda m, s: torch.ones(s.batch, 256, dtype=torch.long),
        "image_embeds": lambda m, s: torch.zeros(s.batch, 729, m.config.image_embed_dim),
        "timestep_r": examples.number(0.0, where="use_meanflow"),
    },
)
MODELS = (
    _COGVIDEOX,
    replace(
        _COGVIDEOX,
        model_class="ConsisIDTransformer3DModel",
        name="ConsisID",
        by_layer=("id_vit_hidden",),
        inputs={
            "hidden_states": _frames_first,
            "encoder_hidden_states": examples.text("text_embed_dim"),
            "image_rotary_emb": _cogvideox_tables,
            "id_cond": _faces,
            "id_vit_hidden": _layers_of_faces,
        },
    ),
    _HUNYUAN_VIDEO_15,
    ModelSpec(
        model_class="MotifVideoTransformer3DModel",
        name="Motif-Video",
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        full_blocks=_decoders,
        time_embedder="time_text_embed.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        text_tokens=512,
        inputs={
            "hidden_states": examples.video(),
            "encoder_hidden_states": examples.text("text_embed_dim"),
            "encoder_attention_mask": examples.mask(),
        },
    ),
    _HUNYUAN_VIDEO,
    replace(
        _HUNYUAN_VIDEO,
        model_class="HunyuanImageTransformer2DModel",
        name="HunyuanImage 2.1",
        context_is="mean of the text",
        time_embedder="time_guidance_embed.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        text_tokens=1000 + GLYPH_TOKENS,
        inputs={
            "hidden_states": examples.image,
            "encoder_hidden_states": _sentence_text,
            "encoder_attention_mask": _sentence_mask,
            "encoder_hidden_states_2": _glyph_text,
            "encoder_attention_mask_2": _glyph_mask,
            "guidance": examples.number(3500.0, where="guidance_embeds"),
            "timestep_r": examples.number(0.0, where="use_meanflow"),
        },
    ),
    ModelSpec(
        model_class="MochiTransformer3DModel",
        name="Mochi",
        noise_timestep=0.0,
        clean_timestep=1000.0,
        time_embedder="time_embed.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        guidance="one batch",
        text_tokens=256,
        inputs={
            "hidden_states": examples.video(),
            "encoder_hidden_states": examples.text("text_embed_dim"),
            "encoder_attention_mask": examples.mask(torch.bool),
        },
    ),
    ModelSpec(
        model_class="EasyAnimateTransformer3DModel",
        name="EasyAnimate 5.1",
        time_embedder="time_embedding",
        context=text_mean(),
        guidance="one batch",
        text_tokens=256,
        inputs={
            "hidden_states": examples.video("out_channels"),
            "inpaint_latents": _beside_latents,
            "encoder_hidden_states": examples.text("text_embed_dim"),
            "encoder_hidden_states_t5": _second_text,
        },
    ),
)
