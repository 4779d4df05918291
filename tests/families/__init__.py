"""A tiny real model of every supported family, and arguments for one forward."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.norm import NormSelector
from shiva_dit.models import block_hook as seam
from shiva_dit.models.attach import attach
from shiva_dit.models.families import model_spec
from tests import tiny
from tests.families import newer_stills, newest, sound, stills, videos
from tests.families.kit import TEXT, TOKENS, Family, narrow_latents

__all__ = ["FAMILIES", "SHARED", "TEXT", "TOKENS", "narrow_latents"]

SHARED = (
    "img_ids",
    "txt_ids",
    "image_cond_ids",
    "position_ids",
    "image_rotary_emb",
    "rotary_embedding",
)
"""Arguments that are the same for all samples."""
BY_LAYER = "text_encoder_layers", "id_vit_hidden"
"""Arguments that are lists of tensors, one for each layer of an encoder."""
FAMILIES: dict[str, Family] = {
    **stills.FAMILIES,
    **newer_stills.FAMILIES,
    **videos.FAMILIES,
    **newest.FAMILIES,
    **sound.FAMILIES,
}


def made(name: str) -> Any:
    """A tiny model of a family with random weights, for evaluation."""
    model = FAMILIES[name].build()
    tiny.randomize(model, seed=0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if re.search(
                "norm_[qk]|([qk]|query|key)_norm", key
            ):  # else attention is all but even: no test bites
                parameter.fill_(2.0)
            if key.endswith(("attn.to_q.weight", "attn1.to_q.weight")):
                parameter.mul_(FAMILIES[name].queries)
    return model.eval()


def arguments(name: str, batch: int = 2, t: float = 0.5) -> dict[str, Any]:
    """Arguments of one forward; every sample differs."""
    return FAMILIES[name].arguments(batch, t)


def sample_of(given: dict[str, Any], index: int) -> dict[str, Any]:
    """One sample's arguments out of a batch's; tables without a batch stay."""

    def pick(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pick(key, inner) for key, inner in value.items()}
        if name in BY_LAYER:
            return [layer[index : index + 1] for layer in value]
        if value is None or isinstance(value, int) or name in SHARED:
            return value
        return value[index : index + 1]

    return {name: pick(name, value) for name, value in given.items()}


def at_least(counts: list[list[int]], least: int) -> list[list[int]]:
    """The counts, with more tokens where these are too few."""
    return [[max(k, least) for k in row] for row in counts]


def schedule(model: nn.Module, counts: list[list[int]]) -> Schedule:
    """Counts of the four blocks, as the model takes them; further ones can't be pruned."""
    spec = model_spec(model)
    full = len(spec.full_blocks(model))
    return tiny.from_counts([row + [TOKENS] * full for row in at_least(counts, spec.least_tokens)])


def force_permutation(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block gathers all tokens, in an order of chance that differs by sample."""
    generator = torch.Generator().manual_seed(4)

    def permutation(scores: Tensor, k: int) -> Tensor:
        assert k == scores.shape[1] == TOKENS
        return torch.rand(scores.shape, generator=generator).argsort(dim=-1)

    full = model_spec(model).full_blocks(model)
    blocks = len(model_spec(model).blocks(model))
    all_tokens = Schedule.uniform(1.0, num_blocks=blocks, full_blocks=full)
    attach(model, NormSelector(), all_tokens).forwards.always_select = True
    monkeypatch.setattr(seam, "best_tokens", permutation)


def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """One forward."""
    output = model(**given, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


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
