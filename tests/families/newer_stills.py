"""Tiny models of later families that make pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaTransformer2DModel,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    OvisImageTransformer2DModel,
    PRXTransformer2DModel,
    ZImageTransformer2DModel,
)

from tests.families.kit import TEXT, TOKENS, Family, narrow_latents, normal, padded


def _flux2(guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def _flux2_arguments(batch: int, t: float, guidance: bool = False) -> dict[str, Any]:
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    zeros = torch.zeros(TOKENS, 1)
    text = torch.cat([torch.zeros(TEXT, 3), torch.arange(TEXT)[:, None]], dim=1)
    given = {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), t),
        "img_ids": torch.cat([zeros, grid, zeros], dim=1),
        "txt_ids": text,
    }
    return {**given, "guidance": torch.full((batch,), 4.0)} if guidance else given


def _z_image() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )


def _z_image_arguments(batch: int, t: float, lengths: tuple[int, ...] = ()) -> dict[str, Any]:
    texts = normal(batch, 40, 24, seed=1)
    return {
        "x": list(normal(batch, 4, 1, 16, 16)),
        "cap_feats": [texts[i, : (lengths or (TEXT,) * batch)[i]] for i in range(batch)],
        "t": torch.full((batch,), 1.0 - t),
    }


def _lumina2() -> Lumina2Transformer2DModel:
    return Lumina2Transformer2DModel(
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=24,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 32, 32),
        cap_feat_dim=24,
    )


def _lumina2_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 1.0 - t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
    }


def _hunyuan_dit(style: bool) -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=6,
        mlp_ratio=3.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=20,
        text_len=3,
        text_len_t5=4,
        use_style_cond_and_image_meta_size=style,
    )


def _hunyuan_dit_arguments(batch: int, t: float, style: bool = True) -> dict[str, Any]:
    angles = normal(TOKENS, 8, seed=6).repeat_interleave(2, dim=1)
    masks = torch.ones(2, batch, 4, dtype=torch.long)
    masks[:, 0, 2:] = 0
    given = {
        "hidden_states": normal(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 1000.0 * t),
        "encoder_hidden_states": normal(batch, 3, 24, seed=1),
        "text_embedding_mask": masks[0, :, :3],
        "encoder_hidden_states_t5": normal(batch, 4, 16, seed=2),
        "text_embedding_mask_t5": masks[1],
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    if style:
        given["image_meta_size"] = torch.tensor([[128.0, 128, 128, 128, 0, 0]]).repeat(batch, 1)
        given["style"] = torch.zeros(batch, dtype=torch.long)
    return given


def _ovis() -> OvisImageTransformer2DModel:
    return OvisImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def _bria() -> BriaTransformer2DModel:
    return BriaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=[4, 6, 6],
    )


def _flux_like_arguments(batch: int, t: float) -> dict[str, Any]:
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    return {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), t),
        "img_ids": torch.cat([torch.zeros(TOKENS, 1), grid], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _bria_arguments(batch: int, t: float) -> dict[str, Any]:
    given = _flux_like_arguments(batch, 1000.0 * t)
    given["encoder_hidden_states"][0, 4:] = 0.0  # padding
    return given


def _hunyuan_image(second: bool) -> HunyuanImageTransformer2DModel:
    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=(2, 2),
        guidance_embeds=second,
        text_embed_dim=24,
        text_embed_2_dim=12 if second else None,
        rope_axes_dim=(8, 8),
    )


def _hunyuan_image_arguments(batch: int, t: float, second: bool = False) -> dict[str, Any]:
    given = {
        "hidden_states": normal(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 1000.0 * t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch),
    }
    if second:
        mask = torch.ones(batch, 128, dtype=torch.long)
        mask[0, 60:] = 0
        given["encoder_hidden_states_2"] = normal(batch, 128, 12, seed=2)
        given["encoder_attention_mask_2"] = mask
        given["guidance"] = torch.full((batch,), 3500.0)
    return given


def _prx(wide: bool) -> PRXTransformer2DModel:
    return PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=32,
        mlp_ratio=3.5,
        num_heads=2,
        depth=4,
        axes_dim=[8, 8],
        bottleneck_size=6 if wide else None,
        resolution_embeds=wide,
    )


def _prx_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "timestep": torch.full((batch,), t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "attention_mask": padded(batch).bool(),
    }


def _krea2() -> Krea2Transformer2DModel:
    return Krea2Transformer2DModel(
        in_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=40,
        timestep_embed_dim=20,
        text_hidden_dim=24,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=28,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


def _krea2_arguments(batch: int, t: float) -> dict[str, Any]:
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    image = torch.cat([torch.zeros(TOKENS, 1), grid], dim=1)
    return {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": normal(batch, TEXT, 3, 24, seed=1),
        "timestep": torch.full((batch,), t),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), image]),
        "encoder_attention_mask": padded(batch).bool(),
    }


def _lumina_next() -> LuminaNextDiT2DModel:
    return LuminaNextDiT2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=24,
        cross_attention_dim=24,
    )


def _lumina_next_arguments(batch: int, t: float) -> dict[str, Any]:
    angles = normal(8, 8, 8, seed=6)
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 1.0 - t),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_mask": padded(batch),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _narrow_tables(given: dict[str, Any]) -> dict[str, Any]:
    tables = tuple(table[: TOKENS // 2] for table in given["image_rotary_emb"])
    return {**narrow_latents(given), "image_rotary_emb": tables}


def _narrow_rows(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": given["hidden_states"][:, : TOKENS // 2],
        "img_ids": given["img_ids"][: TOKENS // 2],
    }


_FLUX2: dict[str, Any] = {
    "narrow": _narrow_rows,
    "text_inside": ("Flux2SingleTransformerBlock",),
    "rows": "image_rotary_emb",
}
_Z_IMAGE: dict[str, Any] = {
    "build": _z_image,
    "narrow": lambda given: {"x": [image[..., :8] for image in given["x"]]},
    "text_inside": ("ZImageTransformerBlock",),
    "rows": "freqs_cis",
}
_HUNYUAN_IMAGE: dict[str, Any] = {
    "text_inside": ("HunyuanImageSingleTransformerBlock",),
    # diffusers 0.42.1 calls its checkpointing function by arguments that this doesn't take.
    "recomputes": False,
    "rows": "image_rotary_emb",
}
_HUNYUAN_DIT: dict[str, Any] = {
    "narrow": _narrow_tables,
    "recomputes": False,  # diffusers 0.42.1 gives the class no gradient checkpointing
    "rows": "image_rotary_emb",
}

FAMILIES: dict[str, Family] = {
    "flux2-klein": Family(
        build=lambda: _flux2(guidance=False), arguments=_flux2_arguments, **_FLUX2
    ),
    "flux2-dev": Family(
        build=lambda: _flux2(guidance=True),
        arguments=lambda batch, t: _flux2_arguments(batch, t, guidance=True),
        **_FLUX2,
    ),
    # Texts are padded to 32 tokens, longer ones to 64.
    "z-image": Family(arguments=_z_image_arguments, own_tokens=32 - TEXT, **_Z_IMAGE),
    "z-image-mixed": Family(
        arguments=lambda batch, t: _z_image_arguments(batch, t, lengths=(TEXT, 40)[:batch]),
        own_tokens=64 - TEXT,
        **_Z_IMAGE,
    ),
    "lumina2": Family(
        build=_lumina2,
        arguments=_lumina2_arguments,
        narrow=narrow_latents,
        text_inside=("Lumina2TransformerBlock",),
        rows="image_rotary_emb",
    ),
    "hunyuan-dit": Family(
        build=lambda: _hunyuan_dit(style=True), arguments=_hunyuan_dit_arguments, **_HUNYUAN_DIT
    ),
    "hunyuan-dit-1.2": Family(
        build=lambda: _hunyuan_dit(style=False),
        arguments=lambda batch, t: _hunyuan_dit_arguments(batch, t, style=False),
        **_HUNYUAN_DIT,
    ),
    "ovis-image": Family(
        build=_ovis,
        arguments=_flux_like_arguments,
        narrow=_narrow_rows,
        text_inside=("OvisImageSingleTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "bria": Family(
        build=_bria,
        arguments=_bria_arguments,
        narrow=_narrow_rows,
        text_inside=("BriaSingleTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "hunyuan-image": Family(
        build=lambda: _hunyuan_image(second=False),
        arguments=_hunyuan_image_arguments,
        narrow=narrow_latents,
        **_HUNYUAN_IMAGE,
    ),
    "hunyuan-image-glyphs": Family(
        build=lambda: _hunyuan_image(second=True),
        arguments=lambda batch, t: _hunyuan_image_arguments(batch, t, second=True),
        narrow=narrow_latents,
        text=TEXT + 128,
        own_tokens=128,
        **_HUNYUAN_IMAGE,
    ),
    "prx": Family(
        build=lambda: _prx(wide=False),
        arguments=_prx_arguments,
        narrow=narrow_latents,
        rows="image_rotary_emb",
    ),
    "prx-7b": Family(
        build=lambda: _prx(wide=True),
        arguments=_prx_arguments,
        narrow=narrow_latents,
        rows="image_rotary_emb",
    ),
    "krea2": Family(
        build=_krea2,
        arguments=_krea2_arguments,
        narrow=lambda given: {
            "hidden_states": given["hidden_states"][:, : TOKENS // 2],
            "position_ids": given["position_ids"][: TEXT + TOKENS // 2],
        },
        text_inside=("Krea2TransformerBlock",),
        rows="image_rotary_emb",
    ),
    "lumina-next": Family(
        build=_lumina_next,
        arguments=_lumina_next_arguments,
        narrow=narrow_latents,
        recomputes=False,  # diffusers 0.42.1 gives the class no gradient checkpointing
        rows="image_rotary_emb",
    ),
}
