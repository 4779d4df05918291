"""Every transformer class of the installed diffusers has an answer: served, or why it isn't."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import diffusers.models.transformers as package
import pytest
import torch
from diffusers import MiniMaxH3Transformer3DModel, ModelMixin
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer

import shiva_dit
from shiva_dit.models.families import MODELS, model_spec
from shiva_dit.models.families.refused import OUT_OF_SCOPE, REFUSED
from tests import families, tiny


def below(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from below(each)


def classes() -> set[str]:
    """Of models, in diffusers' package of transformers."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return {c.__name__ for c in below(ModelMixin) if c.__module__.startswith(package.__name__)}


def test_every_class_has_one_answer() -> None:
    answers = [*MODELS, *REFUSED, *OUT_OF_SCOPE]
    assert len(answers) == len(set(answers))
    assert set(answers) == classes()
    assert len(MODELS) >= 48


@pytest.mark.parametrize("name", [*REFUSED, *OUT_OF_SCOPE])
def test_a_class_that_is_not_served_is_told_why(name: str) -> None:
    kind = type(name, (torch.nn.Module,), {})
    why = {**REFUSED, **OUT_OF_SCOPE}[name]
    with pytest.raises(ValueError, match=r"can't be served|no transformer to serve") as error:
        model_spec(kind())
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_attached_to_a_class_that_is_not_served() -> None:
    sana = families.unsupported()
    before = tiny.footprint(sana)
    with pytest.raises(ValueError, match="can't be served: its feed-forward is a convolution"):
        shiva_dit.apply(sana, tiny.adapter(tiny.sd3()))
    assert tiny.footprint(sana) == before


# --- reasons that were found, on diffusers' own modules -----------------------------------------


def test_hidream_runs_its_experts_without_gradients_and_not_in_one_graph() -> None:
    layer = MOEFeedForwardSwiGLU(8, 16, num_routed_experts=4, num_activated_experts=2).eval()
    tokens = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    chosen, weights, _ = layer.gate(tokens)
    routed = layer.moe_infer(tokens.view(-1, 8), chosen.view(-1), weights.view(-1, 1))
    assert not routed.requires_grad
    with pytest.raises(Exception, match=r"[Gg]raph break|numpy|data.dependent|Unsupported"):
        torch.compile(layer, fullgraph=True, backend="eager")(tokens.detach())


def test_nucleus_gives_a_token_another_update_where_others_are_left_out() -> None:
    layer = NucleusMoELayer(
        hidden_size=8,
        moe_intermediate_dim=8,
        num_experts=4,
        capacity_factor=1.0,
        use_sigmoid=False,
        route_scale=1.0,
    ).eval()
    tiny.randomize(layer, seed=0)
    tokens = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
    times = torch.zeros(1, 8)
    with torch.no_grad():
        every, half = layer(tokens, tokens, times), layer(tokens[:, :8], tokens[:, :8], times)
    assert (every[:, :8] - half).abs().max() > 0.05 * every.abs().max()


def test_minimax_h3_lists_times_that_are_no_samples() -> None:
    """One sample, rows of text, sound and video, and two times: nothing says which is whose."""
    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        ffn_dim=40,
        in_channels=4,
        audio_in_channels=3,
        text_dim=24,
        freq_dim=8,
        time_embed_hidden_dim=16,
        time_embed_dim=12,
        rope_freq_dim=2,
    ).eval()
    text, sound, video = torch.arange(3), torch.arange(3, 8), torch.arange(8, 24)
    tags = torch.cat(
        [torch.full_like(part, kind) for kind, part in enumerate((text, sound, video))]
    )
    times = torch.tensor([0.0, 500.0])
    with torch.no_grad():
        found, heard = model(
            hidden_states=torch.zeros(1, 16, 16),
            audio_hidden_states=torch.zeros(1, 5, 3),
            encoder_hidden_states=torch.zeros(1, 3, 24),
            timestep=times,
            timestep_indices=(tags > 0).long(),
            token_tags=tags,
            position_ids=torch.zeros(24, 3, dtype=torch.long),
            video_indices=video,
            audio_indices=sound,
            text_indices=text,
            return_dict=False,
        )
    assert found.shape == (1, 16, 16)
    assert heard.shape == (1, 5, 3)
    assert len(times) != len(found)
