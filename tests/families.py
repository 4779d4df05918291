"""A tiny real model of every supported family, and arguments for one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
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
        if value is None:
            return None
        return value[index : index + 1] if name not in ("img_ids", "txt_ids") else value

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
    mask = torch.ones(batch, TEXT)
    mask[0, 4:] = 0  # padding, in the first sample alone
    sizes = {"resolution": torch.tensor([[512.0, 256.0]]), "aspect_ratio": torch.tensor([[2.0]])}
    return {
        "hidden_states": _normal(batch, 4, 16, 16),
        "encoder_hidden_states": _normal(batch, TEXT, 24, seed=1),
        "encoder_attention_mask": mask,
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


FAMILIES: dict[str, Family] = {
    "sd3": Family(build=tiny.sd3, arguments=tiny.inputs),
    "sd35": Family(build=lambda: tiny.sd3("dual"), arguments=tiny.inputs),
    "flux": Family(
        build=lambda: _flux(guidance=False), arguments=_flux_arguments, rows="image_rotary_emb"
    ),
    "flux-dev": Family(
        build=lambda: _flux(guidance=True),
        arguments=lambda batch, t: _flux_arguments(batch, t, guidance=True),
        rows="image_rotary_emb",
    ),
    "pixart-sigma": Family(build=lambda: _pixart(sigma=True), arguments=_pixart_arguments),
    "pixart-alpha": Family(
        build=lambda: _pixart(sigma=False),
        arguments=lambda batch, t: _pixart_arguments(batch, t, sigma=False),
    ),
    "dit": Family(build=_dit, arguments=_dit_arguments),
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
