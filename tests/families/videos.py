"""Tiny models of the families that make videos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from tests.families.kit import TEXT, TOKENS, Family, half_of_rows, narrow_latents, normal, padded


def _wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=40,
        num_layers=4,
        rope_max_seq_len=32,
    )


def _wan_arguments(batch: int, t: float) -> dict[str, Any]:
    text = normal(batch, TEXT, 24, seed=1)
    text[0, 4:] = 0.0  # padding
    return {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames
        "encoder_hidden_states": text,
        "timestep": torch.full((batch,), 1000.0 * t),
    }


def _ltx() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=24,
    )


def _ltx_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch),
        "timestep": torch.full((batch,), 1000.0 * t),
        "num_frames": 4,
        "height": 4,
        "width": 4,
    }


def _cogvideox() -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=20,
        text_embed_dim=24,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=13,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )


def _cogvideox_arguments(batch: int, t: float) -> dict[str, Any]:
    angles = normal(TOKENS, 8, seed=6).repeat_interleave(2, dim=1)
    return {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames of four channels
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), 1000.0 * t),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _hunyuan_video() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=2,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
    )


def _hunyuan_video_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch),
        "pooled_projections": normal(batch, 20, seed=2),
        "timestep": torch.full((batch,), 1000.0 * t),
        "guidance": torch.full((batch,), 6000.0),
    }


def _mochi() -> MochiTransformer3DModel:
    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        pooled_projection_dim=28,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=20,
        max_sequence_length=TEXT,
    )


def _mochi_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch).bool(),
        "timestep": torch.full((batch,), 1000.0 * (1.0 - t)),
    }


def _chronoedit() -> ChronoEditTransformer3DModel:
    return ChronoEditTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=40,
        num_layers=4,
        rope_max_seq_len=32,
    )


def _wan_vace() -> WanVACETransformer3DModel:
    return WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=40,
        num_layers=4,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=6,
    )


def _wan_vace_arguments(batch: int, t: float) -> dict[str, Any]:
    control = normal(batch, 6, 4, 8, 8, seed=5)
    return {**_wan_arguments(batch, t), "control_hidden_states": control}


def _narrow_control(given: dict[str, Any]) -> dict[str, Any]:
    control = given["control_hidden_states"]
    return {
        **narrow_latents(given),
        "control_hidden_states": control[..., : control.shape[-1] // 2],
    }


def _skyreels(causal: bool) -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=40,
        num_layers=4,
        rope_max_seq_len=32,
        inject_sample_info=causal,
        num_frame_per_block=2 if causal else 1,
    )


def _skyreels_arguments(batch: int, t: float) -> dict[str, Any]:
    return {**_wan_arguments(batch, t), "fps": [1] * batch}


def _allegro() -> AllegroTransformer3DModel:
    return AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=48,
        sample_height=8,
        sample_width=8,
        sample_frames=4,
        caption_channels=24,
    )


def _allegro_arguments(batch: int, t: float) -> dict[str, Any]:
    angles = normal(3, 8, 8, seed=6)
    positions = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4))
    return {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch),
        "timestep": torch.full((batch,), int(1000 * t)),
        "image_rotary_emb": (
            tuple((along.cos(), along.sin()) for along in angles),
            tuple(along[None] for along in positions.T.contiguous()),
        ),
    }


def _narrow_positions(given: dict[str, Any]) -> dict[str, Any]:
    tables, positions = given["image_rotary_emb"]
    kept = tuple(along[:, : TOKENS // 2] for along in positions)
    return {**narrow_latents(given), "image_rotary_emb": (tables, kept)}


def _easyanimate() -> EasyAnimateTransformer3DModel:
    return EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=4,
        mmdit_layers=4,
        time_embed_dim=20,
        text_embed_dim=24,
    )


def _easyanimate_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), 1000.0 * t),
    }


FAMILIES: dict[str, Family] = {
    "cogvideox": Family(
        build=_cogvideox,
        arguments=_cogvideox_arguments,
        narrow=lambda given: {
            **narrow_latents(given),
            "image_rotary_emb": tuple(table[: TOKENS // 2] for table in given["image_rotary_emb"]),
        },
        text_inside=("CogVideoXBlock",),
        rows="image_rotary_emb",
    ),
    "hunyuan-video": Family(
        build=_hunyuan_video,
        arguments=_hunyuan_video_arguments,
        narrow=narrow_latents,
        text_inside=("HunyuanVideoSingleTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "mochi": Family(
        build=_mochi,
        arguments=_mochi_arguments,
        narrow=narrow_latents,
        rows="image_rotary_emb",
    ),
    "chronoedit": Family(
        build=_chronoedit, arguments=_wan_arguments, narrow=narrow_latents, rows="rotary_emb"
    ),
    "wan": Family(build=_wan, arguments=_wan_arguments, narrow=narrow_latents, rows="rotary_emb"),
    "ltx": Family(
        build=_ltx,
        arguments=_ltx_arguments,
        narrow=half_of_rows(width=2),
        rows="image_rotary_emb",
    ),
    "wan-vace": Family(
        build=_wan_vace,
        arguments=_wan_vace_arguments,
        narrow=_narrow_control,
        rows="rotary_emb",
    ),
    "skyreels": Family(
        build=lambda: _skyreels(causal=False),
        arguments=_wan_arguments,
        narrow=narrow_latents,
        rows="rotary_emb",
    ),
    "skyreels-causal": Family(
        build=lambda: _skyreels(causal=True),
        arguments=_skyreels_arguments,
        narrow=narrow_latents,
        rows="rotary_emb",
    ),
    "allegro": Family(
        build=_allegro,
        arguments=_allegro_arguments,
        narrow=_narrow_positions,
        rows="image_rotary_emb",
    ),
    "easyanimate": Family(
        build=_easyanimate,
        arguments=_easyanimate_arguments,
        narrow=narrow_latents,
        rows="image_rotary_emb",
    ),
}
