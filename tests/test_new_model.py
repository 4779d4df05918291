"""The family that docs/new-model.md shows, as it stands there: ten minutes' work, no arithmetic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel

from shiva_dit.models.families import BLOCKS, MODELS
from tests import families, test_families
from tests.families.kit import TEXT, Family, narrow_latents, normal, padded

PAGE = Path(__file__).parents[1] / "docs" / "new-model.md"
NAME = "hunyuan-video-1.5"


def code() -> str:
    match = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return match[1]


def build() -> HunyuanVideo15Transformer3DModel:
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


def arguments(batch: int, t: float) -> dict[str, Any]:
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


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's family among the served ones."""
    found: dict[str, Any] = {}
    exec(code(), found)
    monkeypatch.setitem(BLOCKS, found["BLOCK"].block_class, found["BLOCK"])
    monkeypatch.setitem(MODELS, found["MODEL"].model_class, found["MODEL"])
    made = Family(build=build, arguments=arguments, narrow=narrow_latents, rows="freqs_cis")
    monkeypatch.setitem(families.FAMILIES, NAME, made)


def test_a_family_is_25_lines_at_most_and_no_arithmetic() -> None:
    lines = [line for line in code().splitlines() if line and not re.match(r"import|from", line)]
    assert len(lines) <= 25
    assert not re.search(r" [-+*/]{1,2} ", code())


@pytest.mark.parametrize(
    "test",
    [
        test_families.test_ratio_one_is_the_bare_model_to_the_bit,
        test_families.test_exactly_k_tokens_run_in_every_block,
        test_families.test_a_batch_equals_its_samples_alone,
        test_families.test_detaching_leaves_nothing_behind,
        test_families.test_flops_are_what_the_counter_counts,
        test_families.test_what_a_lora_beside_the_layers_costs_is_counted,
        test_families.test_another_resolution_runs_too,
        test_families.test_odd_grids_run_too,
    ],
)
def test_what_holds_for_every_family_holds_for_it(test: Any) -> None:
    test(NAME)


@pytest.mark.parametrize("batch", [1, 2])
def test_its_rows_are_gathered(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    test_families.test_gathering_all_tokens_in_any_order_changes_nothing(NAME, batch, monkeypatch)
    test_families.test_rows_that_stay_behind_are_noticed(NAME, batch, monkeypatch)


@pytest.mark.parametrize("kv_gate", [False, True])
def test_its_routers_learn(kv_gate: bool) -> None:
    test_families.test_gradients_reach_the_router_with_checkpointing_and_without(
        NAME, kv_gate=kv_gate
    )
