"""Tiny models of the families that make sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AceStepTransformer1DModel,
    LongCatAudioDiTTransformer,
    MiniMaxMusic3Transformer1DModel,
    StableAudio3DiTModel,
    StableAudioDiTModel,
)

from tests.families.kit import TEXT, TOKENS, Family, half_of_rows, normal, padded

MEMORY = 5


def _stable_audio() -> StableAudioDiTModel:
    return StableAudioDiTModel(
        sample_size=TOKENS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=48,
        cross_attention_input_dim=24,
    )


def _stable_audio_arguments(batch: int, t: float) -> dict[str, Any]:
    angles = torch.outer(torch.arange(TOKENS + 1.0), torch.tensor([0.8, 0.3, 0.1, 0.05])).repeat(
        1, 2
    )
    return {
        "hidden_states": normal(batch, 4, TOKENS),
        "timestep": torch.full((batch,), t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "global_hidden_states": normal(batch, 1, 48, seed=2),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def _narrow_stable_audio(given: dict[str, Any]) -> dict[str, Any]:
    tables = tuple(table[: TOKENS // 2 + 1] for table in given["rotary_embedding"])
    return {
        "hidden_states": given["hidden_states"][..., : TOKENS // 2],
        "rotary_embedding": tables,
    }


def _stable_audio_3(differential: bool) -> StableAudio3DiTModel:
    return StableAudio3DiTModel(
        io_channels=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        cond_token_dim=24,
        global_cond_dim=20,
        local_add_cond_dim=3,
        timestep_features_dim=8,
        ff_mult=2.0,
        num_memory_tokens=MEMORY,
        use_differential_attention=differential,
    )


def _stable_audio_3_arguments(batch: int, t: float, painted: bool = False) -> dict[str, Any]:
    given = {
        "hidden_states": normal(batch, 4, TOKENS),
        "timestep": torch.full((batch,), t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch),
        "global_hidden_states": normal(batch, 20, seed=2),
    }
    if painted:
        given["local_add_cond"] = normal(batch, 3, TOKENS, seed=3)
    return given


def _narrow_line(given: dict[str, Any]) -> dict[str, Any]:
    names = {"hidden_states", "local_add_cond"} & given.keys()
    return {name: given[name][..., : TOKENS // 2] for name in names}


def _ace_step() -> AceStepTransformer1DModel:
    return AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=8,
        encoder_hidden_size=24,
    )


def _ace_step_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 2 * TOKENS, 4),
        "context_latents": normal(batch, 2 * TOKENS, 8, seed=3),
        "timestep": torch.full((batch,), t),
        "timestep_r": torch.full((batch,), t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
    }


def _narrow_ace_step(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name][:, :TOKENS] for name in ("hidden_states", "context_latents")}


def _longcat_audio() -> LongCatAudioDiTTransformer:
    return LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=4, dit_heads=2, dit_text_dim=24, latent_dim=4, ff_mult=2.0
    )


def _longcat_audio_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch).bool(),
        "timestep": torch.full((batch,), 1.0 - t),
        "attention_mask": torch.ones(batch, TOKENS, dtype=torch.bool),
        "latent_cond": normal(batch, TOKENS, 4, seed=3),
    }


def _narrow_longcat_audio(given: dict[str, Any]) -> dict[str, Any]:
    others = {name: given[name][:, : TOKENS // 2] for name in ("attention_mask", "latent_cond")}
    return half_of_rows(**others)(given)


def _minimax_music3() -> MiniMaxMusic3Transformer1DModel:
    return MiniMaxMusic3Transformer1DModel(
        in_channels=4,
        condition_dim=6,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=40,
        rotary_dim=8,
        fourier_embedding_dim=8,
    )


def _minimax_music3_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, TOKENS),
        "timestep": torch.full((batch,), 1.0 - t),
        "encoder_hidden_states": normal(batch, TOKENS, 6, seed=1),
    }


def _narrow_minimax_music3(given: dict[str, Any]) -> dict[str, Any]:
    told = given["encoder_hidden_states"][:, : TOKENS // 2]
    return {**_narrow_line(given), "encoder_hidden_states": told}


FAMILIES: dict[str, Family] = {
    "minimax-music3": Family(
        build=_minimax_music3,
        arguments=_minimax_music3_arguments,
        narrow=_narrow_minimax_music3,
        text_inside=("MiniMaxMusic3TransformerBlock",),
        own_tokens=1 - TEXT,
        queries=20.0,
        rows="rotary_emb",
    ),
    "stable-audio": Family(
        build=_stable_audio,
        arguments=_stable_audio_arguments,
        queries=20.0,
        narrow=_narrow_stable_audio,
        text_inside=("StableAudioDiTBlock",),
        own_tokens=1 - TEXT,
        rows="rotary_embedding",
    ),
    "stable-audio-3": Family(
        build=lambda: _stable_audio_3(differential=True),
        arguments=_stable_audio_3_arguments,
        narrow=_narrow_line,
        text_inside=("StableAudio3DiTBlock",),
        own_tokens=MEMORY - TEXT,
        rows="rope",
    ),
    "stable-audio-3-painting": Family(
        build=lambda: _stable_audio_3(differential=False),
        arguments=lambda batch, t: _stable_audio_3_arguments(batch, t, painted=True),
        counted=False,
        narrow=_narrow_line,
        text_inside=("StableAudio3DiTBlock",),
        own_tokens=MEMORY - TEXT,
        rows="rope",
    ),
    "ace-step": Family(
        build=_ace_step,
        arguments=_ace_step_arguments,
        narrow=_narrow_ace_step,
        rows="position_embeddings",
    ),
    "longcat-audio": Family(
        build=_longcat_audio,
        arguments=_longcat_audio_arguments,
        narrow=_narrow_longcat_audio,
        recomputes=False,
        rows="rope",
    ),
}
