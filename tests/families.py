"""A tiny real model of every supported family, and arguments for one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LongCatImageTransformer2DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from tests import tiny

TOKENS = 64
TEXT = 7


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a tiny model of a family is built and called."""

    build: Callable[[], Any]
    """The model, its weights not yet random."""
    arguments: Callable[[int, float], dict[str, Any]]
    """Arguments of one forward, from a batch size and a time in [0, 1]."""
    narrow: Callable[[dict[str, Any]], dict[str, Any]] | None
    """What changes for half as many tokens; None for a model that takes squares alone."""
    text_inside: tuple[str, ...] = ()
    """Classes of its blocks in which text and image run through the same layers."""
    own_tokens: int = 0
    """Tokens that the model puts before the text."""
    recomputes: bool = True
    """Whether gradient checkpointing gives the model's own gradients."""
    rows: str | None = None
    """An argument of its blocks that holds a row per image token, if there is one."""


def made(name: str) -> Any:
    """A tiny model of a family with random weights, for evaluation."""
    model = FAMILIES[name].build()
    tiny.randomize(model, seed=0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm_q" in key or "norm_k" in key:  # else attention is all but even: no test bites
                parameter.fill_(2.0)
    return model.eval()


def arguments(name: str, batch: int = 2, t: float = 0.5) -> dict[str, Any]:
    """Arguments of one forward; every sample differs."""
    return FAMILIES[name].arguments(batch, t)


def sample_of(given: dict[str, Any], index: int) -> dict[str, Any]:
    """One sample's arguments out of a batch's; tables without a batch stay."""

    def pick(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pick(key, inner) for key, inner in value.items()}
        shared = "img_ids", "txt_ids", "image_rotary_emb"
        if value is None or isinstance(value, int) or name in shared:
            return value
        return value[index : index + 1]

    return {name: pick(name, value) for name, value in given.items()}


def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """One forward."""
    return model(**given, return_dict=False)[0]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
        "hidden_states": _normal(batch, TOKENS, 4),
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
        "pooled_projections": _normal(batch, 20, seed=2),
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
        "hidden_states": _normal(batch, 4, 16, 16),
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": _padded(batch),
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
        "hidden_states": _normal(batch, 4, 16, 16),
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
        "hidden_states": _normal(batch, TOKENS, 8),
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
        "encoder_hidden_states_mask": _padded(batch),
        "timestep": torch.full((batch,), t),
        "img_shapes": [shapes] * batch,
    }


def _padded(batch: int) -> Tensor:
    """A mask of the text: the first sample has padding."""
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[0, 4:] = 0
    return mask


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
        "hidden_states": _normal(batch, 4, 16, 16),
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
        "timestep": torch.full((batch,), 1000.0 * t),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
    }


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
    text = _normal(batch, TEXT, 24, seed=1)
    text[0, 4:] = 0.0  # padding
    return {
        "hidden_states": _normal(batch, 4, 4, 8, 8),  # four frames
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
        "hidden_states": _normal(batch, TOKENS, 4),
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": _padded(batch),
        "timestep": torch.full((batch,), 1000.0 * t),
        "num_frames": 4,
        "height": 4,
        "width": 4,
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
    mask = torch.cat([_padded(batch), torch.ones(batch, TOKENS, dtype=torch.long)], dim=1)
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
    text = _normal(batch, TEXT, 24, seed=1)
    text[0, 4:] = 0.0  # padding
    return {
        "hidden_states": _normal(batch, 4, 16, 16),
        "encoder_hidden_states": text,
        "timestep": torch.full((batch,), t),
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
    angles = _normal(TOKENS, 8, seed=6).repeat_interleave(2, dim=1)
    return {
        "hidden_states": _normal(batch, 4, 4, 8, 8),  # four frames of four channels
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
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
        "hidden_states": _normal(batch, 4, 4, 8, 8),  # four frames
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": _padded(batch),
        "pooled_projections": _normal(batch, 20, seed=2),
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
        "hidden_states": _normal(batch, 4, 4, 8, 8),  # four frames
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": _padded(batch).bool(),
        "timestep": torch.full((batch,), 1000.0 * (1.0 - t)),
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


def _narrow_latents(given: dict[str, Any]) -> dict[str, Any]:
    """Half of the width."""
    latents = given["hidden_states"]
    return {"hidden_states": latents[..., : latents.shape[-1] // 2]}


def _half_of_rows(**others: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Half of the rows of packed latents, and what else says how many there are."""
    return lambda given: {"hidden_states": given["hidden_states"][:, : TOKENS // 2], **others}


_FLUX: dict[str, Any] = {
    "narrow": lambda given: {
        "hidden_states": given["hidden_states"][:, : TOKENS // 2],
        "img_ids": given["img_ids"][: TOKENS // 2],
    },
    "text_inside": ("FluxSingleTransformerBlock",),
    "rows": "image_rotary_emb",
}

FAMILIES: dict[str, Family] = {
    "sd3": Family(build=tiny.sd3, arguments=tiny.inputs, narrow=_narrow_latents),
    "sd35": Family(build=lambda: tiny.sd3("dual"), arguments=tiny.inputs, narrow=_narrow_latents),
    "flux": Family(build=lambda: _flux(guidance=False), arguments=_flux_arguments, **_FLUX),
    "flux-dev": Family(
        build=lambda: _flux(guidance=True),
        arguments=lambda batch, t: _flux_arguments(batch, t, guidance=True),
        **_FLUX,
    ),
    "pixart-sigma": Family(
        build=lambda: _pixart(sigma=True), arguments=_pixart_arguments, narrow=_narrow_latents
    ),
    "pixart-alpha": Family(
        build=lambda: _pixart(sigma=False),
        arguments=lambda batch, t: _pixart_arguments(batch, t, sigma=False),
        narrow=_narrow_latents,
    ),
    "dit": Family(build=_dit, arguments=_dit_arguments, narrow=None),
    "qwen-image": Family(
        build=lambda: _qwen(edit=False),
        arguments=_qwen_arguments,
        narrow=_half_of_rows(img_shapes=[[(1, 8, 4)]] * 2),
        rows="image_rotary_emb",
    ),
    "qwen-image-edit": Family(
        build=lambda: _qwen(edit=True),
        arguments=lambda batch, t: _qwen_arguments(batch, t, edit=True),
        narrow=_half_of_rows(img_shapes=[[(1, 4, 4), (1, 4, 4)]] * 2),
        rows="image_rotary_emb",
    ),
    "cogview4": Family(
        build=_cogview4,
        arguments=_cogview4_arguments,
        narrow=_narrow_latents,
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
        narrow=_narrow_latents,
        text_inside=("AuraFlowSingleTransformerBlock",),
        own_tokens=8,
    ),
    "cogvideox": Family(
        build=_cogvideox,
        arguments=_cogvideox_arguments,
        narrow=lambda given: {
            **_narrow_latents(given),
            "image_rotary_emb": tuple(table[: TOKENS // 2] for table in given["image_rotary_emb"]),
        },
        text_inside=("CogVideoXBlock",),
        rows="image_rotary_emb",
    ),
    "hunyuan-video": Family(
        build=_hunyuan_video,
        arguments=_hunyuan_video_arguments,
        narrow=_narrow_latents,
        text_inside=("HunyuanVideoSingleTransformerBlock",),
        rows="image_rotary_emb",
    ),
    "mochi": Family(
        build=_mochi,
        arguments=_mochi_arguments,
        narrow=_narrow_latents,
        rows="image_rotary_emb",
    ),
    "longcat": Family(
        build=_longcat,
        arguments=_longcat_arguments,
        **{**_FLUX, "text_inside": ("LongCatImageSingleTransformerBlock",)},
    ),
    "cogview3-plus": Family(
        build=_cogview3plus,
        arguments=_cogview4_arguments,
        narrow=_narrow_latents,
        text_inside=("CogView3PlusTransformerBlock",),
    ),
    "chronoedit": Family(
        build=_chronoedit, arguments=_wan_arguments, narrow=_narrow_latents, rows="rotary_emb"
    ),
    "wan": Family(build=_wan, arguments=_wan_arguments, narrow=_narrow_latents, rows="rotary_emb"),
    "ltx": Family(
        build=_ltx,
        arguments=_ltx_arguments,
        narrow=_half_of_rows(width=2),
        rows="image_rotary_emb",
    ),
}


def unsupported() -> SanaTransformer2DModel:
    """A model that can't be served: its feed-forward is a convolution over the whole grid."""
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
