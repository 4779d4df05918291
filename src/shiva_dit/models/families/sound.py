"""Sound: latents of one line of tokens, in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.models import examples
from shiva_dit.models.examples import Size
from shiva_dit.models.rows import TABLE, Rows
from shiva_dit.models.spec import BlockSpec, ModelSpec, text_mean


def _line(channels: str, patch: str | None = None) -> examples.Input:
    """Latents (B, C, samples), of so many samples per token."""

    def make(model: Any, size: Size) -> Float[Tensor, "B C S"]:
        config = model.config
        each = 1 if patch is None else config[patch]
        return size.draw(size.batch, config[channels], size.tokens * each)

    return make


def _rotary_of_stable_audio(model: Any, size: Size) -> tuple[Tensor, Tensor]:
    """Of one token of times, and the sound's."""
    width = model.config.attention_head_dim // 2
    table = torch.ones(size.tokens + 1, width)
    return table, table


def _durations(model: Any, size: Size) -> Float[Tensor, "B 1 D"]:
    return size.draw(size.batch, 1, model.config.global_states_input_dim)


def _samples_first(channels: str) -> examples.Input:
    """Latents (B, samples, C) of ACE-Step."""

    def make(model: Any, size: Size) -> Float[Tensor, "B S C"]:
        config = model.config
        width = config.audio_acoustic_hidden_dim
        width = width if channels == "own" else config.in_channels - width
        return size.draw(size.batch, size.tokens * config.patch_size, width)

    return make


def _mean_beside_windows(model: Any, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    """ACE-Step's mean text; its windows of attention must be masks."""
    from diffusers.models.transformers.ace_step_transformer import (  # noqa: PLC0415
        _is_flash_attention_backend,
    )

    if _is_flash_attention_backend(model.layers[0].self_attn.processor):
        raise ValueError(
            "ACE-Step under flash attention sees windows of neighbouring places, which tokens that "
            "are left out would move: use another backend (set_attention_backend('native'))."
        )
    return text_mean()(model, arguments)


def _all_of(tokens: str) -> examples.Input:
    return lambda m, s: torch.ones(s.batch, s.tokens if tokens == "N" else s.text).bool()


def _encoded(model: Any, size: Size) -> Float[Tensor, "B T D"]:
    config = model.config
    return size.draw(size.batch, size.text, config.encoder_hidden_size or config.hidden_size)


def _nothing_to_continue(model: Any, size: Size) -> Float[Tensor, "B N C"]:
    return torch.zeros(size.batch, size.tokens, model.config.latent_dim)


def _steps_of_time(model: Any, sample: Tensor) -> int:
    """Tokens of latents (B, C, samples)."""
    return sample.shape[-1] // model.config.get("patch_size", 1)


def _pairs_of_samples(model: Any, sample: Tensor) -> int:
    """Tokens of latents (B, samples, C), the last filled up."""
    return -(-sample.shape[1] // model.config.patch_size)


def _own_length(model: Any) -> int:
    return model.config.sample_size


BLOCKS = (
    BlockSpec(
        block_class="StableAudioDiTBlock",
        text="first",  # one token of when the sound begins and ends
        value_modules=("attn1.to_v",),
        rows={"rotary_embedding": TABLE, "attention_mask": Rows(text="first")},
    ),
    BlockSpec(
        block_class="StableAudio3DiTBlock",
        text="first",  # tokens of its own
        value_modules=("self_attn.to_qkv",),
        values_fused="last",
        rows={"rope": TABLE, "local_seq": Rows()},
    ),
    BlockSpec(
        block_class="MiniMaxMusic3TransformerBlock",
        text="first",  # one token of the time
        value_modules=("attn.to_v",),
        rows={"rotary_emb": TABLE},
    ),
    BlockSpec(
        block_class="AceStepTransformerBlock",
        value_modules=("self_attn.to_v",),
        rows={"position_embeddings": TABLE, "attention_mask": Rows(axis=(3, 2))},
    ),
    BlockSpec(
        block_class="AudioDiTBlock",
        value_modules=("self_attn.to_v",),
        rows={"rope": TABLE, "mask": Rows()},
    ),
)

MODELS = (
    ModelSpec(
        model_class="StableAudioDiTModel",
        name="Stable Audio",
        learned_by="cosine schedule",
        noise_timestep=1.0,
        time_embedder="timestep_proj",
        context=text_mean(),
        guidance="one batch",
        text_tokens=130,
        tokens=_steps_of_time,
        own_tokens=_own_length,
        inputs={
            "hidden_states": _line("in_channels"),
            "encoder_hidden_states": examples.text("cross_attention_input_dim"),
            "global_hidden_states": _durations,
            "rotary_embedding": _rotary_of_stable_audio,
        },
    ),
    ModelSpec(
        model_class="StableAudio3DiTModel",
        name="Stable Audio 3",
        depths=("depth",),
        noise_timestep=1.0,
        time_embedder="to_timestep_embed",
        context=text_mean("encoder_attention_mask"),
        guidance="one batch",
        text_tokens=257,
        tokens=_steps_of_time,
        own_tokens=lambda model: None,
        inputs={
            "hidden_states": _line("io_channels", patch="patch_size"),
            "encoder_hidden_states": examples.text("cond_token_dim"),
            "encoder_attention_mask": examples.mask(),
            "global_hidden_states": examples.vector("global_cond_dim"),
        },
    ),
    ModelSpec(
        model_class="MiniMaxMusic3Transformer1DModel",
        name="MiniMax Music 3",
        context_is="mean of what each token is told",
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="time_embed",
        context=text_mean(),
        text_tokens=0,  # each token is told its own share
        tokens=_steps_of_time,
        own_tokens=lambda model: None,
        inputs={
            "hidden_states": _line("in_channels"),
            "encoder_hidden_states": lambda m, s: s.draw(s.batch, s.tokens, m.config.condition_dim),
        },
    ),
    ModelSpec(
        model_class="AceStepTransformer1DModel",
        name="ACE-Step 1.5",
        block_lists=("layers",),
        depths=("num_hidden_layers",),
        same_times=("timestep_r",),
        noise_timestep=1.0,
        time_embedder="time_embed.linear_2",
        context=_mean_beside_windows,
        guidance="one batch",
        text_tokens=1024,
        tokens=_pairs_of_samples,
        own_tokens=lambda model: None,
        inputs={
            "hidden_states": _samples_first("own"),
            "context_latents": _samples_first("beside"),
            "encoder_hidden_states": _encoded,
        },
    ),
    ModelSpec(
        model_class="LongCatAudioDiTTransformer",
        name="LongCat-Audio",
        block_lists=("blocks",),
        depths=("dit_depth",),
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="time_embed",
        context=text_mean("encoder_attention_mask"),
        text_tokens=512,
        own_tokens=lambda model: None,
        inputs={
            "hidden_states": lambda m, s: s.draw(s.batch, s.tokens, m.config.latent_dim),
            "encoder_hidden_states": examples.text("dit_text_dim"),
            "encoder_attention_mask": _all_of("T"),
            "attention_mask": _all_of("N"),
            "latent_cond": _nothing_to_continue,
        },
    ),
)
