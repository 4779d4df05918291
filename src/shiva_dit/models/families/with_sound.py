"""Videos with sound: the video's tokens are selected, the sound's run whole."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.models import examples
from shiva_dit.models.examples import Size
from shiva_dit.models.rows import Rows
from shiva_dit.models.spec import BlockSpec, ModelSpec, pooled_text, text_mean

SOUND_TOKENS = 126
"""Tokens of five seconds, the length that LTX-2's pipeline makes by default."""


def _mask_of_pairs(mask: Tensor, chosen: Int[Tensor, "B k"], num_tokens: int) -> Tensor:
    """A mask over pairs of tokens, (B, N, N), or over keys alone."""
    axes = (-1, -2) if mask.shape[-2] == num_tokens else -1
    return Rows(axis=axes)(mask, chosen, num_tokens)


def _sound(channels: str) -> examples.Input:
    return lambda model, size: size.draw(size.batch, SOUND_TOKENS, model.config[channels])


def _text_of_ltx2(part: str) -> examples.Input:
    def make(model: Any, size: Size) -> Float[Tensor, "B T Dc"]:
        config = model.config
        own = f"{part}cross_attention_dim"
        name = "caption_channels" if config.use_prompt_embeddings else own
        return size.draw(size.batch, size.text, config[name])

    return make


def _channels_last(model: Any, size: Size) -> Float[Tensor, "B F H W C"]:
    config = model.config
    times, high, wide = config.patch_size
    channels = config.in_visual_dim
    channels = 2 * channels + 1 if config.visual_cond else channels
    sides = size.frames * times, size.height * high, size.width * wide
    return size.draw(size.batch, *sides, channels)


def _tokens_of_channels_last(model: Any, sample: Tensor) -> int:
    times, high, wide = model.config.patch_size
    frames, height, width = sample.shape[1:4]
    return (frames // times) * (height // high) * (width // wide)


BLOCKS = (
    BlockSpec(
        block_class="LTX2VideoTransformerBlock",
        output=0,
        value_modules=("attn1.to_v", "video_to_audio_attn.to_v"),
        rows={
            "temb": Rows(),
            "temb_ca_scale_shift": Rows(),
            "temb_ca_gate": Rows(),
            "video_rotary_emb": Rows(axis=-2),
            "ca_video_rotary_emb": Rows(axis=-2),
            "self_attention_mask": _mask_of_pairs,
        },
    ),
    BlockSpec(
        block_class="Kandinsky6FusedTransformerDecoderBlock",
        hidden="vis",
        output=0,
        value_modules=("video_dec_block.self_attention.to_value", "av_cross_attention.to_value"),
        rows={"vis_rope": Rows(batch="none")},
    ),
)

MODELS = (
    ModelSpec(
        model_class="LTX2VideoTransformer3DModel",
        name="LTX-2 (video; the sound runs whole)",
        same_times=("sigma",),
        noised=("audio_hidden_states",),
        noised_times=("audio_timestep",),
        time_embedder="time_embed.emb.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        guidance="one batch",
        text_tokens=1024,
        token_times="several",
        inputs={
            "hidden_states": examples.packed,
            "audio_hidden_states": _sound("audio_in_channels"),
            "encoder_hidden_states": _text_of_ltx2(""),
            "audio_encoder_hidden_states": _text_of_ltx2("audio_"),
            "num_frames": lambda model, size: size.frames,
            "height": lambda model, size: size.height,
            "width": lambda model, size: size.width,
            "audio_num_frames": lambda model, size: SOUND_TOKENS,
        },
    ),
    ModelSpec(
        model_class="Kandinsky6Transformer3DModel",
        name="Kandinsky 6 (video; the sound runs whole)",
        context_is="pooled text",
        block_lists=("visual_transformer_blocks",),
        depths=("num_visual_blocks",),
        channels=4,
        noised=("audio_hidden_states",),
        time_embedder="video_time_embeddings.timestep_embedder",
        context=pooled_text,
        text_tokens=512,
        tokens=_tokens_of_channels_last,
        own_tokens=lambda model: None,
        inputs={
            "hidden_states": _channels_last,
            "encoder_hidden_states": examples.text("in_text_dim"),
            "pooled_projections": examples.vector("in_text_dim2"),
            "audio_hidden_states": _sound("in_audio_dim"),
        },
    ),
)
