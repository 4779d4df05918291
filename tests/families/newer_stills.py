"""Tiny models of later families that make pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    ZImageTransformer2DModel,
)

from tests.families.kit import TEXT, TOKENS, Family, narrow_latents, normal


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


def _narrow_tables(given: dict[str, Any]) -> dict[str, Any]:
    tables = tuple(table[: TOKENS // 2] for table in given["image_rotary_emb"])
    return {**narrow_latents(given), "image_rotary_emb": tables}


_FLUX2: dict[str, Any] = {
    "narrow": lambda given: {
        "hidden_states": given["hidden_states"][:, : TOKENS // 2],
        "img_ids": given["img_ids"][: TOKENS // 2],
    },
    "text_inside": ("Flux2SingleTransformerBlock",),
    "rows": "image_rotary_emb",
}
_Z_IMAGE: dict[str, Any] = {
    "build": _z_image,
    "narrow": lambda given: {"x": [image[..., :8] for image in given["x"]]},
    "text_inside": ("ZImageTransformerBlock",),
    "rows": "freqs_cis",
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
}
