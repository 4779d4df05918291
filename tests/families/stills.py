"""Tiny models of the families that make pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
)

from tests import tiny
from tests.families.kit import TEXT, TOKENS, Family, half_of_rows, narrow_latents, normal, padded


def _flux(guidance: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )


def _flux_arguments(batch: int, t: float, guidance: bool = False) -> dict[str, Any]:
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    given = {
        "hidden_states": normal(batch, TOKENS, 4),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "pooled_projections": normal(batch, 20, seed=2),
        "timestep": torch.full((batch,), t),
        "img_ids": torch.cat([torch.zeros(TOKENS, 1), grid], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return {**given, "guidance": torch.full((batch,), 3.5)} if guidance else given


def _pixart(sigma: bool) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=48,
        caption_channels=24,
        sample_size=16,
        use_additional_conditions=not sigma,
    )


def _pixart_arguments(batch: int, t: float, sigma: bool = True) -> dict[str, Any]:
    sizes = {"resolution": torch.tensor([[512.0, 256.0]]), "aspect_ratio": torch.tensor([[2.0]])}
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": padded(batch),
        "timestep": torch.full((batch,), int(1000 * t)),
        "added_cond_kwargs": {
            name: None if sigma else value.expand(batch, -1) for name, value in sizes.items()
        },
    }


def _dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=16,
        num_embeds_ada_norm=1000,
    )


def _dit_arguments(batch: int, t: float) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "timestep": torch.full((batch,), int(1000 * t)),
        "class_labels": torch.arange(batch) + 3,
    }


def _qwen(edit: bool) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=edit,
    )


def _qwen_arguments(batch: int, t: float, edit: bool = False) -> dict[str, Any]:
    """In the edit model, half of the tokens are those of a picture to go by, at time 0."""
    shapes = [(1, 8, 4), (1, 8, 4)] if edit else [(1, 8, 8)]
    return {
        "hidden_states": normal(batch, TOKENS, 8),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "encoder_hidden_states_mask": padded(batch),
        "timestep": torch.full((batch,), t),
        "img_shapes": [shapes] * batch,
    }


def _cogview4() -> CogView4Transformer2DModel:
    return CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=20,
        condition_dim=8,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )


def _cogview4_arguments(batch: int, t: float) -> dict[str, Any]:
    size = torch.tensor([[128.0, 128.0]]).expand(batch, -1)
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "encoder_hidden_states": normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), 1000.0 * t),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
    }


def _chroma() -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=1,
    )


def _chroma_arguments(batch: int, t: float, masked: bool = False) -> dict[str, Any]:
    given = _flux_arguments(batch, t)
    del given["pooled_projections"]
    mask = torch.cat([padded(batch), torch.ones(batch, TOKENS, dtype=torch.long)], dim=1)
    return {**given, "attention_mask": mask.bool()} if masked else given


def _auraflow() -> AuraFlowTransformer2DModel:
    return AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )


def _auraflow_arguments(batch: int, t: float) -> dict[str, Any]:
    text = normal(batch, TEXT, 24, seed=1)
    text[0, 4:] = 0.0  # padding
    return {
        "hidden_states": normal(batch, 4, 16, 16),
        "encoder_hidden_states": text,
        "timestep": torch.full((batch,), t),
    }


def _longcat() -> LongCatImageTransformer2DModel:
    return LongCatImageTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def _longcat_arguments(batch: int, t: float) -> dict[str, Any]:
    given = _flux_arguments(batch, t)
    del given["pooled_projections"]
    return given


def _cogview3plus() -> CogView3PlusTransformer2DModel:
    return CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=20,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=16,
    )


_FLUX: dict[str, Any] = {
    "narrow": lambda given: {
        "hidden_states": given["hidden_states"][:, : TOKENS // 2],
        "img_ids": given["img_ids"][: TOKENS // 2],
    },
    "text_inside": ("FluxSingleTransformerBlock",),
    "rows": "image_rotary_emb",
}

FAMILIES: dict[str, Family] = {
    "sd3": Family(build=tiny.sd3, arguments=tiny.inputs, narrow=narrow_latents),
    "sd35": Family(build=lambda: tiny.sd3("dual"), arguments=tiny.inputs, narrow=narrow_latents),
    "flux": Family(build=lambda: _flux(guidance=False), arguments=_flux_arguments, **_FLUX),
    "flux-dev": Family(
        build=lambda: _flux(guidance=True),
        arguments=lambda batch, t: _flux_arguments(batch, t, guidance=True),
        **_FLUX,
    ),
    "pixart-sigma": Family(
        build=lambda: _pixart(sigma=True), arguments=_pixart_arguments, narrow=narrow_latents
    ),
    "pixart-alpha": Family(
        build=lambda: _pixart(sigma=False),
        arguments=lambda batch, t: _pixart_arguments(batch, t, sigma=False),
        narrow=narrow_latents,
    ),
    "dit": Family(build=_dit, arguments=_dit_arguments, narrow=None, text=0),
    "qwen-image": Family(
        build=lambda: _qwen(edit=False),
        arguments=_qwen_arguments,
        narrow=half_of_rows(img_shapes=[[(1, 8, 4)]] * 2),
        rows="image_rotary_emb",
    ),
    "qwen-image-edit": Family(
        build=lambda: _qwen(edit=True),
        arguments=lambda batch, t: _qwen_arguments(batch, t, edit=True),
        narrow=half_of_rows(img_shapes=[[(1, 4, 4), (1, 4, 4)]] * 2),
        rows="image_rotary_emb",
    ),
    "cogview4": Family(
        build=_cogview4,
        arguments=_cogview4_arguments,
        narrow=narrow_latents,
        text_inside=("CogView4TransformerBlock",),
        rows="image_rotary_emb",
    ),
    "chroma": Family(
        build=_chroma,
        arguments=_chroma_arguments,
        **{**_FLUX, "text_inside": ("ChromaSingleTransformerBlock",)},
    ),
    "chroma-padded": Family(
        build=_chroma,
        arguments=lambda batch, t: _chroma_arguments(batch, t, masked=True),
        **{
            **_FLUX,
            "text_inside": ("ChromaSingleTransformerBlock",),
            "narrow": lambda given: {
                **_FLUX["narrow"](given),
                "attention_mask": given["attention_mask"][:, : TEXT + TOKENS // 2],
            },
            # diffusers 0.42.1 leaves the mask out where it recomputes single blocks.
            "recomputes": False,
        },
    ),
    "auraflow": Family(
        build=_auraflow,
        arguments=_auraflow_arguments,
        narrow=narrow_latents,
        text_inside=("AuraFlowSingleTransformerBlock",),
        own_tokens=8,
    ),
    "longcat": Family(
        build=_longcat,
        arguments=_longcat_arguments,
        **{**_FLUX, "text_inside": ("LongCatImageSingleTransformerBlock",)},
    ),
    "cogview3-plus": Family(
        build=_cogview3plus,
        arguments=_cogview4_arguments,
        narrow=narrow_latents,
        text_inside=("CogView3PlusTransformerBlock",),
    ),
}
