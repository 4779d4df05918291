"""Tiny models of the families that came with diffusers 0.40 and later."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    ErnieImageTransformer2DModel,
    Flux3Transformer2DModel,
    GlmImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Kandinsky6Transformer3DModel,
    LTX2VideoTransformer3DModel,
    MotifVideoTransformer3DModel,
    QwenImage21Transformer2DModel,
    WanAnimateTransformer3DModel,
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
        in_channels=5,  # two of the latents, two of a picture to go by, and a mask
        out_channels=2,
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


def _flux3() -> Flux3Transformer2DModel:
    return Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux3_arguments(batch: int, t: float, pictures: int = 0) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    words = torch.zeros(TEXT, 4)
    words[:, 3] = torch.arange(TEXT)
    given = {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), t),
        "img_ids": torch.nn.functional.pad(places, (1, 1)).float(),
        "txt_ids": words,
    }
    if pictures:
        given["image_cond_hidden_states"] = normal(batch, pictures, 4, seed=2)
        given["image_cond_ids"] = torch.nn.functional.pad(
            places[:pictures], (1, 1), value=1
        ).float()
    return given


def _narrow_flux3(given: dict[str, Any]) -> dict[str, Any]:
    return half_of_rows(img_ids=given["img_ids"][: TOKENS // 2])(given)


def _wan_animate() -> WanAnimateTransformer3DModel:
    return WanAnimateTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=40,
        num_layers=4,
        image_dim=None,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 4, "8": 4},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def _wan_animate_arguments(batch: int, t: float) -> dict[str, Any]:
    text = normal(batch, TEXT, 24, seed=1)
    text[0, 4:] = 0.0  # padding
    return {
        "hidden_states": normal(batch, 12, 4, 8, 8),  # four frames
        "encoder_hidden_states": text,
        "timestep": torch.full((batch,), 1000.0 * t),
        "pose_hidden_states": normal(batch, 4, 3, 8, 8, seed=5),
        "face_pixel_values": normal(batch, 3, 12, 8, 8, seed=6),
    }


def _narrow_wan_animate(given: dict[str, Any]) -> dict[str, Any]:
    return {**narrow_latents(given), "pose_hidden_states": given["pose_hidden_states"][..., :4]}


def _ltx2(rope: str) -> LTX2VideoTransformer3DModel:
    later = rope == "split"  # LTX-2.3
    return LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=3,
        audio_out_channels=3,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=4,
        caption_channels=24,
        rope_type=rope,
        use_prompt_embeddings=not later,
        gated_attn=later,
        cross_attn_mod=later,
        audio_gated_attn=later,
        audio_cross_attn_mod=later,
    )


def _ltx2_arguments(batch: int, t: float, later: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, TOKENS, 4),
        "audio_hidden_states": normal(batch, 126, 3, seed=4),
        "encoder_hidden_states": normal(batch, TEXT, 32 if later else 24, seed=1),
        "audio_encoder_hidden_states": normal(batch, TEXT, 16 if later else 24, seed=2),
        "encoder_attention_mask": padded(batch),
        "timestep": torch.full((batch,), 1000.0 * t),
        "sigma": torch.full((batch,), 1000.0 * t),
        "num_frames": 4,
        "height": 4,
        "width": 4,
        "audio_num_frames": 126,
    }


def _kandinsky6() -> Kandinsky6Transformer3DModel:
    return Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=12,
        model_dim=32,
        ff_dim=40,
        num_text_blocks=1,
        num_visual_blocks=4,
        axes_dims=(4, 6, 6),
        visual_cond=True,
        in_audio_dim=3,
        out_audio_dim=3,
    )


def _kandinsky6_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 8, 8, 9),  # four frames; channels last
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "pooled_projections": normal(batch, 20, seed=2),
        "timestep": torch.full((batch,), 1000.0 * t),
        "audio_hidden_states": normal(batch, 126, 3, seed=4),
    }


def _narrow_kandinsky6(given: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_states": given["hidden_states"][:, :, :, :4]}


def _joyimage_plus() -> JoyImageEditPlusTransformer3DModel:
    return JoyImageEditPlusTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=24,
        num_layers=4,
        rope_dim_list=[4, 6, 6],
    )


def _joyimage_plus_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, TOKENS, 4, 1, 2, 2),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_hidden_states_mask": padded(batch),
        "timestep": torch.full((batch,), 1000.0 * t),
        "shape_list": [[(1, 6, 8), (1, 4, 4)]] * batch,  # the target, and a picture to go by
    }


def _ideogram4() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=40,
        adaln_dim=12,
        llm_features_dim=24,
        rope_theta=10000,
        mrope_section=(4, 2, 2),
    )


def _ideogram4_arguments(batch: int, t: float) -> dict[str, Any]:
    every = TEXT + TOKENS
    text = normal(batch, every, 24, seed=1)
    text[:, TEXT:] = 0.0
    latents = normal(batch, every, 4)
    latents[:, :TEXT] = 0.0
    said = torch.full((batch, every), 2)
    said[:, :TEXT] = 3
    segments = torch.ones(batch, every, dtype=torch.long)
    segments[0, :3] = 0  # padding
    said[0, :3] = 0
    text[0, :3] = 0.0
    places = torch.zeros(batch, every, 3)
    places[:, :TEXT] = torch.arange(TEXT)[:, None]
    places[:, TEXT:, 1:] = torch.cartesian_prod(torch.arange(8), torch.arange(8)).float()
    return {
        "hidden_states": latents,
        "timestep": torch.full((batch,), 1.0 - t),
        "encoder_hidden_states": text,
        "position_ids": places,
        "segment_ids": segments,
        "indicator": said,
    }


def _narrow_ideogram4(given: dict[str, Any]) -> dict[str, Any]:
    names = given.keys() - {"timestep"}
    return {name: given[name][:, : TEXT + TOKENS // 2] for name in names}


def _cosmos() -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=8,
        max_size=(8, 16, 16),
        concat_padding_mask=False,  # with it torchvision is needed
        extra_pos_embed_type=None,
    )


def _cosmos_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 4, 8, 8),  # four frames
        "timestep": torch.full((batch,), t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
    }


FAMILIES: dict[str, Family] = {
    "joyimage-plus": Family(
        build=_joyimage_plus,
        arguments=_joyimage_plus_arguments,
        narrow=lambda given: {
            "hidden_states": given["hidden_states"][:, : TOKENS // 2],
            "shape_list": [[(1, 4, 8)]] * len(given["hidden_states"]),
        },
        rows="image_rotary_emb",
    ),
    "ideogram4": Family(
        build=_ideogram4,
        arguments=_ideogram4_arguments,
        narrow=_narrow_ideogram4,
        text_inside=("Ideogram4TransformerBlock",),
        rows="image_rotary_emb",
    ),
    "cosmos": Family(
        build=_cosmos,
        arguments=_cosmos_arguments,
        narrow=narrow_latents,
        rows="image_rotary_emb",
    ),
    "ltx2": Family(
        build=lambda: _ltx2("interleaved"),
        arguments=_ltx2_arguments,
        narrow=half_of_rows(width=2),
        rows="video_rotary_emb",
    ),
    "ltx2.3": Family(
        build=lambda: _ltx2("split"),
        arguments=lambda batch, t: _ltx2_arguments(batch, t, later=True),
        narrow=half_of_rows(width=2),
        rows="video_rotary_emb",
    ),
    "kandinsky6": Family(
        build=_kandinsky6,
        arguments=_kandinsky6_arguments,
        narrow=_narrow_kandinsky6,
        rows="vis_rope",
    ),
    "flux3": Family(
        build=_flux3,
        arguments=_flux3_arguments,
        narrow=_narrow_flux3,
        text_inside=("Flux3SingleTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "flux3-pictures": Family(
        build=_flux3,
        arguments=lambda batch, t: _flux3_arguments(batch, t, pictures=9),
        narrow=_narrow_flux3,
        text_inside=("Flux3SingleTransformerBlock",),
        own_tokens=9,
        counted=False,
        rows="image_rotary_emb",
    ),
    "wan-animate": Family(
        build=_wan_animate,
        arguments=_wan_animate_arguments,
        narrow=_narrow_wan_animate,
        counted=False,  # `test_flops_of_a_segment_of_wan_animate`
        rows="rotary_emb",
    ),
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
