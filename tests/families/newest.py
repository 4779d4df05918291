"""Tiny models of the families that came with diffusers 0.40 and later."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    ConsisIDTransformer3DModel,
    ErnieImageTransformer2DModel,
    GlmImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    JoyImageEditTransformer3DModel,
    MotifVideoTransformer3DModel,
    QwenImage21Transformer2DModel,
)

from tests.families.kit import TEXT, TOKENS, Family, half_of_rows, narrow_latents, normal, padded


def _glm_image() -> GlmImageTransformer2DModel:
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=20,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=50,
    )


def _glm_image_arguments(batch: int, t: float) -> dict[str, Any]:
    prior = torch.arange(batch * TOKENS).view(batch, TOKENS) * 7 % 50
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "prior_token_id": prior,
        "prior_token_drop": torch.zeros(batch, TOKENS, dtype=torch.bool),
        "timestep": torch.full((batch,), 1000.0 * t),
        "target_size": torch.tensor([[128.0, 128.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


def _narrow_prior(given: dict[str, Any]) -> dict[str, Any]:
    names = "prior_token_id", "prior_token_drop"
    return {**narrow_latents(given), **{name: given[name][:, : TOKENS // 2] for name in names}}


def _joyimage() -> JoyImageEditTransformer3DModel:
    return JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=24,
        num_layers=4,
        rope_dim_list=[4, 6, 6],
    )


def _joyimage_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 4, 1, 8, 8),  # three pictures to go by, and the target
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), 1000.0 * t),
    }


def _bria_fibo() -> BriaFiboTransformer2DModel:
    return BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=12,
    )


def _bria_fibo_arguments(batch: int, t: float) -> dict[str, Any]:
    text = normal(batch, TEXT, 24, seed=1)
    text[0, 4:] = 0.0
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    mask = torch.cat([padded(batch), torch.ones(batch, TOKENS)], dim=1).bool()
    return {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": text,
        "text_encoder_layers": [normal(batch, TEXT, 12, seed=5 + layer) for layer in range(4)],
        "timestep": torch.full((batch,), 1000.0 * t),
        "img_ids": torch.nn.functional.pad(places, (1, 0)).float(),
        "txt_ids": torch.zeros(TEXT, 3),
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None]},
    }


def _narrow_fibo(given: dict[str, Any]) -> dict[str, Any]:
    mask = given["joint_attention_kwargs"]["attention_mask"][..., : TEXT + TOKENS // 2]
    return half_of_rows(
        img_ids=given["img_ids"][: TOKENS // 2], joint_attention_kwargs={"attention_mask": mask}
    )(given)


def _hunyuan_video_15() -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=2,
        text_embed_dim=24,
        text_embed_2_dim=12,
        image_embed_dim=10,
        rope_axes_dim=(4, 6, 6),
    )


def _hunyuan_video_15_arguments(batch: int, t: float) -> dict[str, Any]:
    glyphs = torch.ones(batch, 256, dtype=torch.long)
    glyphs[0, 60:] = 0
    return {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames
        "timestep": torch.full((batch,), 1000.0 * t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch),
        "encoder_hidden_states_2": normal(batch, 256, 12, seed=2),
        "encoder_attention_mask_2": glyphs,
        "image_embeds": torch.zeros(batch, 729, 10),
    }


def _motif_video(decoders: int) -> MotifVideoTransformer3DModel:
    return MotifVideoTransformer3DModel(
        in_channels=5,  # what its pipelines put beside each channel of the latents, and a mask
        out_channels=5,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2 + decoders,
        num_decoder_layers=decoders,
        mlp_ratio=3.0,
        patch_size=2,
        text_embed_dim=24,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


def _motif_video_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 5, 4, 8, 8),  # four frames
        "timestep": torch.full((batch,), 1000.0 * t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch),
    }


def _consisid(face: bool) -> ConsisIDTransformer3DModel:
    return ConsisIDTransformer3DModel(
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
        is_train_face=face,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=10,
        LFE_vit_dim=12,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        LFE_output_dim=21,
        LFE_num_scale=2,
    )


def _consisid_arguments(batch: int, t: float, face: bool = False) -> dict[str, Any]:
    angles = normal(TOKENS, 8, seed=6).repeat_interleave(2, dim=1)
    given = {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames of four channels
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), 1000.0 * t),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    if face:
        given["id_cond"] = normal(batch, 10, seed=7)
        given["id_vit_hidden"] = [normal(batch, 577, 12, seed=8 + layer) for layer in range(2)]
    return given


def _narrow_tables(given: dict[str, Any]) -> dict[str, Any]:
    halves = tuple(table[: TOKENS // 2] for table in given["image_rotary_emb"])
    return {**narrow_latents(given), "image_rotary_emb": halves}


def _ernie_image() -> ErnieImageTransformer2DModel:
    return ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=4,
        ffn_hidden_size=40,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=24,
        rope_axes_dim=(4, 6, 6),
    )


def _ernie_image_arguments(batch: int, t: float) -> dict[str, Any]:
    lengths = torch.full((batch,), TEXT)
    lengths[0] = 4
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 1000.0 * t),
        "text_bth": normal(batch, TEXT, 24, seed=1),
        "text_lens": lengths,
    }


def _qwen_image_21() -> QwenImage21Transformer2DModel:
    return QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_image_21_arguments(batch: int, t: float) -> dict[str, Any]:
    places = torch.arange(TEXT + TOKENS // 4) >= TEXT
    return {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_hidden_states_mask": padded(batch),
        "timestep": torch.full((batch,), t),
        "img_shapes": [[(1, 8, 8)]] * batch,
        "img_mask": places.repeat(batch, 1),
    }


def _narrow_qwen_image_21(given: dict[str, Any]) -> dict[str, Any]:
    batch = len(given["hidden_states"])
    places = given["img_mask"][:, : TEXT + TOKENS // 8]
    return half_of_rows(img_shapes=[[(1, 8, 4)]] * batch, img_mask=places)(given)


FAMILIES: dict[str, Family] = {
    "ernie-image": Family(
        build=_ernie_image,
        arguments=_ernie_image_arguments,
        narrow=narrow_latents,
        text_inside=("ErnieImageSharedAdaLNBlock",),
        rows="rotary_pos_emb",
    ),
    "qwen-image-2.1": Family(
        build=_qwen_image_21,
        arguments=_qwen_image_21_arguments,
        narrow=_narrow_qwen_image_21,
        text_inside=("QwenImage21TransformerBlock",),
        rows="rotary_emb",
    ),
    "glm-image": Family(
        build=_glm_image,
        arguments=_glm_image_arguments,
        narrow=_narrow_prior,
        text_inside=("GlmImageTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "joyimage": Family(
        build=_joyimage,
        arguments=_joyimage_arguments,
        narrow=narrow_latents,
        rows="image_rotary_emb",
    ),
    "bria-fibo": Family(
        build=_bria_fibo,
        arguments=_bria_fibo_arguments,
        narrow=_narrow_fibo,
        text_inside=("BriaFiboSingleTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "hunyuan-video-1.5": Family(
        build=_hunyuan_video_15,
        arguments=_hunyuan_video_15_arguments,
        narrow=narrow_latents,
        rows="freqs_cis",
    ),
    "motif-video": Family(
        build=lambda: _motif_video(decoders=0),
        arguments=_motif_video_arguments,
        narrow=narrow_latents,
        text_inside=("MotifVideoSingleTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "motif-video-decoder": Family(
        build=lambda: _motif_video(decoders=1),
        arguments=_motif_video_arguments,
        narrow=narrow_latents,
        text_inside=("MotifVideoSingleTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "consisid": Family(
        build=lambda: _consisid(face=False),
        arguments=_consisid_arguments,
        narrow=_narrow_tables,
        text_inside=("ConsisIDBlock",),
        rows="image_rotary_emb",
    ),
    "consisid-face": Family(
        build=lambda: _consisid(face=True),
        arguments=lambda batch, t: _consisid_arguments(batch, t, face=True),
        narrow=_narrow_tables,
        text_inside=("ConsisIDBlock",),
        rows="image_rotary_emb",
    ),
}
