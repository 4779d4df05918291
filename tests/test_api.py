"""The public names, on tiny real transformers and pipelines."""

import copy
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)
from jaxtyping import TypeCheckError
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import shiva_dit
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.norm import NormSelector
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.families import MODELS
from tests import families, tiny

COUNTS = [[64, 5, 30, 17], [64, 33, 1, 48], [64, 63, 20, 9]]

kinds = pytest.mark.parametrize("kind", tiny.KINDS)
backbones = pytest.mark.parametrize("method", ["full", "lora", "dora"])


def adapter_for(model: nn.Module, **options: Any) -> ShivaAdapter:
    return tiny.adapter(model, tiny.from_counts(COUNTS), **options)


@contextmanager
def calls_of(model: Any) -> Iterator[list[dict[str, Any]]]:
    """Within: every call of the model: its batch, layers skipped, and (block, tokens chosen)."""
    calls: list[dict[str, Any]] = []

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batch = len(kwargs["hidden_states"])
        calls.append({"batch": batch, "skip": kwargs.get("skip_layers"), "chosen": []})

    attachment = attachment_of(model)
    assert attachment is not None
    attachment.forwards.observer = lambda block, chosen: calls[-1]["chosen"].append((block, chosen))
    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
        attachment.forwards.observer = None


# --- pipelines ------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_pipeline_runs_unmodified(kind: str, guidance: float) -> None:
    model = tiny.sd3(kind)
    pipe = tiny.pipeline(model)
    dense, before = tiny.generate(pipe, guidance), tiny.footprint(model)
    assert shiva_dit.apply(pipe, adapter_for(model)) is pipe
    with calls_of(model) as calls:
        pruned = tiny.generate(pipe, guidance)
    assert len(calls) == 4
    assert all(call["batch"] == (4 if guidance > 1 else 2) for call in calls)
    # shift = 3 puts the four steps at t = 1, 0.86, 0.60 and 0.01: in the last bin twice.
    table = tiny.from_counts(COUNTS).for_steps([1.0, 0.86, 0.6, 0.01], 64)
    rows = [table.row(t) for t in (1.0, 0.86, 0.6, 0.01)]
    assert sum(map(sum, rows)) == pytest.approx(4 / 3 * sum(map(sum, COUNTS)), abs=1)
    for call, row in zip(calls, rows, strict=True):
        assert [(b, i.shape) for b, i in call["chosen"]] == [
            (b, (call["batch"], row[b])) for b in (1, 2, 3)
        ]
    assert torch.isfinite(pruned).all()
    assert not torch.equal(pruned, dense)
    assert torch.equal(tiny.generate(pipe, guidance), pruned)
    with shiva_dit.disabled(pipe):
        assert torch.equal(tiny.generate(pipe, guidance), dense)
    assert torch.equal(tiny.generate(pipe, guidance), pruned)
    assert shiva_dit.remove(pipe) is pipe
    assert torch.equal(tiny.generate(pipe, guidance), dense)
    assert tiny.footprint(model) == before


@kinds
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_inference_steps": 1},
        {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0},
    ],
    ids=["plain", "one step", "skip-layer guidance"],
)
def test_ratio_one_gives_the_same_images(
    kind: str, guidance: float, options: dict[str, Any]
) -> None:
    model = tiny.sd3(kind)
    pipe = tiny.pipeline(model)
    dense = tiny.generate(pipe, guidance, **options)
    shiva_dit.apply(pipe, adapter_for(model), keep_ratio=1.0)
    assert torch.equal(tiny.generate(pipe, guidance, **options), dense)
    shiva_dit.apply(pipe, adapter_for(model))
    pruned = tiny.generate(pipe, guidance, **options)
    assert torch.isfinite(pruned).all()
    assert not torch.equal(pruned, dense)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_perturbed_attention_guidance_is_refused(guidance: float) -> None:
    """Its batch is of three parts, or of two that are no guidance halves."""
    model = tiny.sd3()
    pipe = tiny.pipeline(model, StableDiffusion3PAGPipeline, pag_applied_layers="blocks.1")
    dense = tiny.generate(pipe, guidance, pag_scale=0.0)
    shiva_dit.apply(pipe, adapter_for(model))
    assert not torch.equal(tiny.generate(pipe, guidance, pag_scale=0.0), dense)
    with pytest.raises(ValueError, match=r"perturbed-attention guidance puts .* pass pag_scale=0"):
        tiny.generate(pipe, guidance, pag_scale=2.0)


@kinds
def test_both_halves_of_guidance_keep_the_same_tokens(kind: str) -> None:
    model = tiny.sd3(kind)
    pipe = tiny.pipeline(model)
    shiva_dit.apply(pipe, adapter_for(model))
    with calls_of(model) as calls:
        tiny.generate(pipe, 5.0)
    for call in calls:
        for _, chosen in call["chosen"]:
            assert torch.equal(chosen[:2], chosen[2:])
    assert any(not torch.equal(c[0], c[1]) for call in calls for _, c in call["chosen"])


@pytest.mark.parametrize("order", ["guided first", "unguided first"])
def test_without_guidance_two_prompts_choose_for_themselves(order: str) -> None:
    """A batch of two looks like two halves: whether it is one is asked, not guessed."""
    model = tiny.sd3()
    pipe = tiny.pipeline(model)
    shiva_dit.apply(pipe, adapter_for(model))
    if order == "guided first":
        tiny.generate(pipe, 5.0)
    with calls_of(model) as calls:
        tiny.generate(pipe, 1.0)
    assert len(calls) == 4
    for call in calls:
        assert any(not torch.equal(c[0], c[1]) for _, c in call["chosen"])


def test_the_skip_layer_pass_shares_nothing() -> None:
    model = tiny.sd3()
    pipe = tiny.pipeline(model)
    shiva_dit.apply(pipe, adapter_for(model))
    with calls_of(model) as calls:
        tiny.generate(pipe, 5.0, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    guided = [call for call in calls if call["skip"] is None]
    skipping = [call for call in calls if call["skip"] is not None]
    assert (len(guided), len(skipping)) == (4, 3)
    for call in guided:
        assert all(torch.equal(c[:2], c[2:]) for _, c in call["chosen"])
    for call in skipping:
        assert call["batch"] == 2
        assert [b for b, _ in call["chosen"]] == [2, 3]
        assert any(not torch.equal(c[0], c[1]) for _, c in call["chosen"])


def test_a_bare_transformer_never_shares() -> None:
    model = tiny.sd3()
    assert shiva_dit.apply(model, adapter_for(model)) is model
    with calls_of(model) as calls:
        tiny.run(model, tiny.inputs(batch=4))
    assert not any(torch.equal(c[:2], c[2:]) for _, c in calls[0]["chosen"])


def test_a_pipeline_can_be_saved_and_loaded_while_applied(tmp_path: Any) -> None:
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, adapter_for(model))
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.run(twin, tiny.inputs()), bare)


# --- apply, remove, disabled ----------------------------------------------------------------


@kinds
def test_apply_and_remove_leave_nothing_behind(kind: str) -> None:
    model = tiny.sd3(kind)
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    keys = list(model.state_dict())
    shiva_dit.apply(model, adapter_for(model))
    assert not torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert list(model.state_dict()) == keys
    shiva_dit.remove(model)
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert shiva_dit.remove(model) is model
    assert tiny.footprint(model) == before


@kinds
def test_applying_again_replaces(kind: str) -> None:
    model = tiny.sd3(kind)
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, adapter_for(model), schedule=tiny.from_counts([[64, 40, 40, 40]]))
    alone = tiny.run(model, tiny.inputs())
    shiva_dit.remove(model)
    shiva_dit.apply(model, adapter_for(model))
    shiva_dit.apply(model, adapter_for(model), schedule=tiny.from_counts([[64, 40, 40, 40]]))
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)
    shiva_dit.remove(model)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


def test_disabled_nests_and_survives_errors() -> None:
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, adapter_for(model))
    pruned = tiny.run(model, tiny.inputs())
    with shiva_dit.disabled(model):
        with shiva_dit.disabled(model):
            assert torch.equal(tiny.run(model, tiny.inputs()), bare)
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert torch.equal(tiny.run(model, tiny.inputs()), pruned)
    with pytest.raises(KeyError), shiva_dit.disabled(model):
        raise KeyError
    assert torch.equal(tiny.run(model, tiny.inputs()), pruned)


@backbones
@pytest.mark.parametrize("removed", [False, True])
def test_what_is_applied_while_disabled_comes_on_when_that_ends(removed: bool, method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    model = tiny.sd3()
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    shiva_dit.apply(model, made, keep_ratio=0.7)
    expected = tiny.run(shiva_dit.apply(tiny.sd3(), made), tiny.inputs())
    with shiva_dit.disabled(model):
        if removed:
            shiva_dit.remove(model)
        with shiva_dit.disabled(model) if not removed else nullcontext():
            shiva_dit.apply(model, made)
            assert torch.equal(tiny.run(model, tiny.inputs()), bare)
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
        shiva_dit.compile(model, backend="eager")
        with pytest.raises(ValueError, match="for num_blocks = 2, the model has"):
            shiva_dit.apply(model, tiny.adapter(tiny.sd3(num_layers=2)))
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    with shiva_dit.disabled(model):
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    shiva_dit.remove(model)
    assert tiny.footprint(model) == before


@pytest.mark.parametrize("keep_ratio", [0.3, 0.75])
def test_a_keep_ratio_moves_the_policy(keep_ratio: float) -> None:
    model = tiny.sd3()
    made = adapter_for(model)
    tiny.randomize(made.policy, seed=2, std=0.2)
    shiva_dit.apply(model, made, keep_ratio=keep_ratio)
    summary = shiva_dit.summary(model)
    # The mean is over 64 bins x 3 blocks of 64 tokens: half a token of one entry.
    assert abs(summary.keep_ratio - keep_ratio) <= 0.5 / (64 * 3 * 64) + 1e-9
    assert len({row for _, row in summary.rows}) > 1  # the policy's shape, not a constant


def test_a_multiple_replaces_the_adapters() -> None:
    model = tiny.sd3()
    made = adapter_for(model, multiple=16)
    shiva_dit.apply(model, made)
    assert {k % 16 for _, row in shiva_dit.summary(model).rows for k in row} == {0}
    shiva_dit.apply(model, made, multiple=1)
    table = attachment_of(model).counts.table(64)  # type: ignore[union-attr]
    assert [list(row) for row in table.counts] == COUNTS


def test_segments_merge_time() -> None:
    model = tiny.sd3()
    shiva_dit.apply(model, adapter_for(model), segments=1)
    attachment = attachment_of(model)
    assert attachment is not None
    table = attachment.counts.table(64)
    assert table.num_bins == len(COUNTS)
    (row,) = set(table.counts)  # each block's mean over time
    for k, column in zip(row, zip(*COUNTS, strict=True), strict=True):
        assert abs(k - sum(column) / len(column)) < 1
    with pytest.raises(ValueError, match="segments must be at least 1, got 0"):
        shiva_dit.apply(model, adapter_for(model), segments=0)


def test_a_folder_can_be_applied(tmp_path: Any) -> None:
    model = tiny.sd3()
    shiva_dit.apply(model, adapter_for(model))
    expected = tiny.run(model, tiny.inputs())
    adapter_for(model).save_pretrained(tmp_path)
    shiva_dit.apply(model, tmp_path)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    shiva_dit.apply(model, str(tmp_path))
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


def test_apply_logs_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.sd3()
    with caplog.at_level(logging.INFO, logger="shiva_dit"):
        shiva_dit.apply(model, adapter_for(model))
    mean = sum(k for row in COUNTS for k in row[1:]) / (9 * 64)
    assert f"3 of 4 blocks of SD3Transformer2DModel pruned, {100 * mean:.1f}%" in caplog.text


# --- adapters that bring a tuned backbone ---------------------------------------------------


def near(found: Tensor, expected: Tensor, bound: float) -> bool:
    return bool((found - expected).norm() <= bound * expected.norm())


def tuned_adapter(method: str, kind: str) -> tuple[ShivaAdapter, Tensor]:
    """An adapter with a tuned backbone that keeps all tokens, and the tuned model's output."""
    made = tiny.adapter(
        tiny.sd3(kind),
        Schedule.uniform(1.0, num_blocks=4, full_blocks=()),
        backbone=method,
        lora_rank=tiny.LORA_RANK,
    )
    made.backbone_weights, output = tiny.tuned(method, kind)
    return made, output


@backbones
@kinds
def test_a_tuned_backbone_comes_and_goes_with_the_adapter(method: str, kind: str) -> None:
    made, tuned = tuned_adapter(method, kind)
    model = tiny.sd3(kind)
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(tuned, bare)

    shiva_dit.apply(model, made)
    on = tiny.run(model, tiny.inputs())
    # Merged weights round otherwise than PEFT's layers. Measured: 1e-6.
    assert torch.equal(on, tuned) if method == "full" else near(on, tuned, 1e-5)
    with shiva_dit.disabled(model):
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert torch.equal(tiny.run(model, tiny.inputs()), on)
    shiva_dit.apply(model, made)  # again: not on top of itself
    assert torch.equal(tiny.run(model, tiny.inputs()), on)
    shiva_dit.apply(model, made, schedule=tiny.from_counts(COUNTS))
    assert not torch.equal(tiny.run(model, tiny.inputs()), on)

    shiva_dit.remove(model)
    assert tiny.footprint(model) == before
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], state[name]) for name in state)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert not hasattr(model, "peft_config")


@backbones
def test_removing_while_disabled_gives_the_models_own_weights_back(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    model = tiny.sd3()
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    shiva_dit.apply(model, made)
    with shiva_dit.disabled(model):
        shiva_dit.remove(model)
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_users_lora_stays_active(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    model: Any = tiny.sd3()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="mine")
    tiny.fill_lora(model, "mine", seed=8)
    alone, keys = tiny.run(model, tiny.inputs()), list(model.state_dict())
    assert not torch.equal(alone, tiny.run(tiny.sd3(), tiny.inputs()))
    shiva_dit.apply(model, made)
    both = tiny.run(model, tiny.inputs())
    assert not torch.equal(both, alone)
    with shiva_dit.disabled(model):
        assert torch.equal(tiny.run(model, tiny.inputs()), alone)
    assert torch.equal(tiny.run(model, tiny.inputs()), both)
    shiva_dit.remove(model)
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)
    assert model.active_adapters() == ["mine"]
    assert list(model.state_dict()) == keys


@backbones
def test_the_users_operations_on_loras_never_reach_the_adapters(method: str) -> None:
    """Fusing, unloading, disabling and hot-swapping with no LoRA of the user's on."""
    made, _ = tuned_adapter(method, "plain")
    pipe = tiny.pipeline(tiny.sd3())
    model: Any = pipe.transformer
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(pipe, made)
    expected = tiny.run(model, tiny.inputs())
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    model.unload_lora()
    model.enable_lora_hotswap(target_rank=4)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    shiva_dit.apply(pipe, made)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    shiva_dit.remove(pipe)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("choice", ["loaded", "chosen", "disabled"])
def test_our_lora_stays_on_whatever_the_user_does_with_others(method: str, choice: str) -> None:
    """A LoRA of zeros changes nothing, and choosing it must not switch the adapter's off."""
    made, _ = tuned_adapter(method, "plain")
    model: Any = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made)
    expected = tiny.run(model, tiny.inputs())
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="mine")
    if choice == "chosen":
        model.set_adapter(["mine"])
    elif choice == "disabled":
        model.disable_adapters()
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    with shiva_dit.disabled(model):
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    shiva_dit.remove(model)
    model.delete_adapters("mine")
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_scale_for_loras_is_for_the_users(scale: float) -> None:
    made, _ = tuned_adapter("lora", "plain")
    model = shiva_dit.apply(tiny.sd3(), made)
    expected = tiny.run(model, tiny.inputs())
    scaled: Any = {**tiny.inputs(), "joint_attention_kwargs": {"scale": scale}}
    assert torch.equal(tiny.run(model, scaled), expected)


def test_a_users_lora_under_a_tuned_backbone_is_no_obstacle_to_its_removal() -> None:
    """PEFT renames the parameters that it wraps."""
    made, _ = tuned_adapter("full", "plain")
    model: Any = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made)
    expected = tiny.run(model, tiny.inputs())
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="mine")
    with shiva_dit.disabled(model):
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    shiva_dit.remove(model)
    model.delete_adapters("mine")
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


@backbones
def test_a_model_that_changes_its_dtype_while_applied_is_whole_afterwards(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    model = tiny.sd3()
    bare = tiny.run(tiny.sd3().double(), {k: v.double() for k, v in tiny.inputs().items()})
    shiva_dit.apply(model, made)
    model.double()
    arguments = {k: v.double() for k, v in tiny.inputs().items()}
    with shiva_dit.disabled(model):
        assert torch.equal(tiny.run(model, arguments), bare)
    shiva_dit.remove(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(tiny.run(model, arguments), bare)


@backbones
def test_replaced_parameters_are_noticed(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made)
    expected = tiny.run(model, tiny.inputs())
    layer = model.transformer_blocks[2].attn.to_q
    tuned = layer.weight.detach().clone()
    layer.weight = nn.Parameter(tuned.clone())  # the same values: all is well
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    layer.weight = nn.Parameter(1.01 * tuned)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"2.attn.to_q.weight was changed while the adapter"):
            tiny.run(model, tiny.inputs())
        with pytest.raises(RuntimeError, match=r"can't be given back: .*2.attn.to_q.weight was ch"):
            shiva_dit.remove(model)
        with pytest.raises(RuntimeError, match=r"can't be given back"), shiva_dit.disabled(model):
            pass
        with pytest.raises(RuntimeError, match=r"can't be given back"):
            shiva_dit.apply(model, made)
    layer.weight = nn.Parameter(tuned)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    shiva_dit.remove(model)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


@backbones
def test_replaced_layers_are_noticed(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    bare = tiny.run(tiny.sd3(), tiny.inputs())
    model = shiva_dit.apply(tiny.sd3(), made)
    attention = model.transformer_blocks[2].attn
    own, attention.to_q = attention.to_q, nn.Linear(32, 32)
    with pytest.raises(RuntimeError, match=r"the layer 'to_q' of a Attention was replaced"):
        tiny.run(model, tiny.inputs())
    attention.to_q = own
    tiny.run(model, tiny.inputs())
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"projections of .*attn were fused.*unfuse_qkv"):
        tiny.run(model, tiny.inputs())
    with pytest.raises(RuntimeError, match=r"hold copies of these.*unfuse_qkv_projections\(\) f"):
        shiva_dit.remove(model)
    model.unfuse_qkv_projections()
    tiny.run(model, tiny.inputs())
    shiva_dit.remove(model)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


def test_replaced_forwards_and_blocks_are_noticed() -> None:
    model: Any = shiva_dit.apply(tiny.sd3(), adapter_for(tiny.sd3()))
    expected = tiny.run(model, tiny.inputs())
    block = model.transformer_blocks[2]
    ours = block.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    block.forward = wrapper  # it leads to ours: all is well
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    block.forward = type(block).forward.__get__(block)
    with pytest.raises(RuntimeError, match="block 2 runs past the adapter"):
        tiny.run(model, tiny.inputs())
    block.forward = ours
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    model.transformer_blocks[2] = copy.deepcopy(tiny.sd3().transformer_blocks[2])
    with pytest.raises(RuntimeError, match="block 2 was replaced"):
        tiny.run(model, tiny.inputs())


def test_wrappers_may_hold_the_forward_in_a_default() -> None:
    model: Any = shiva_dit.apply(tiny.sd3(), adapter_for(tiny.sd3()))
    expected = tiny.run(model, tiny.inputs())
    block = model.transformer_blocks[2]

    def wrapper(*args: Any, _own: Any = block.forward, **kwargs: Any) -> Any:
        return _own(*args, **kwargs)

    block.forward = wrapper
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_wrapper_over_a_layer_with_a_lora_beside_it(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    model: Any = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made, merge=False)
    expected = tiny.run(model, tiny.inputs())
    layer = model.transformer_blocks[2].attn.to_q
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    for _ in range(2):
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)
        with shiva_dit.disabled(model):
            assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    shiva_dit.remove(model)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


@backbones
def test_disabled_that_overlap_last_until_the_last_one_ends(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    model: Any = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made, schedule=tiny.from_counts(COUNTS))
    expected = tiny.run(model, tiny.inputs())
    one, other = shiva_dit.disabled(model), shiva_dit.disabled(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    other.__exit__(None, None, None)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


@backbones
def test_an_apply_that_fails_inside_disabled_leaves_the_dense_model(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    wrong, _ = tuned_adapter(method, "plain")
    name = next(n for n in wrong.backbone_weights if "attn.to_q" in n and "magnitude" not in n)
    wrong.backbone_weights[name] = torch.zeros(7, 5)
    model: Any = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made)
    expected = tiny.run(model, tiny.inputs())
    with shiva_dit.disabled(model):
        with pytest.raises(ValueError, match="fit this model"):
            shiva_dit.apply(model, wrong)
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


def test_what_a_caller_does_to_an_adapter_afterwards_is_nothing_to_the_model() -> None:
    for method in ("lora", "dora", "full"):
        made, _ = tuned_adapter(method, "plain")
        model: Any = tiny.sd3()
        bare = tiny.run(model, tiny.inputs())
        shiva_dit.apply(model, made)
        expected = tiny.run(model, tiny.inputs())
        for value in made.backbone_weights.values():
            value.mul_(2.0)
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)
        shiva_dit.remove(model)
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)


@pytest.mark.parametrize("merge", [True, False])
def test_a_users_lora_learns_on_top_of_what_was_put_on_in_inference_mode(merge: bool) -> None:
    made, _ = tuned_adapter("lora", "plain")
    model: Any = tiny.sd3()
    with torch.inference_mode():
        shiva_dit.apply(model, made, merge=merge)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="mine")
    model(**tiny.inputs()).sample.square().mean().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "mine" in n and "lora_B" in n]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_a_call_past_the_models_hooks_is_refused() -> None:
    model: Any = shiva_dit.apply(tiny.sd3(), adapter_for(tiny.sd3()))
    with pytest.raises(RuntimeError, match=r"call model\(\.\.\.\), not model.forward"):
        model.forward(**tiny.inputs())
    bare = tiny.run(tiny.sd3(), tiny.inputs())
    with shiva_dit.disabled(model), torch.no_grad():
        assert torch.equal(model.forward(**tiny.inputs()).sample, bare)


@backbones
def test_a_model_is_saved_bare_while_applied(method: str, tmp_path: Any) -> None:
    made, _ = tuned_adapter(method, "plain")
    model: Any = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made)
    expected = tiny.run(model, tiny.inputs())
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    twin = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.run(twin, tiny.inputs()), bare)
    shiva_dit.remove(model)
    assert "save_pretrained" not in model.__dict__


@backbones
def test_attaching_over_an_adapter_gives_the_models_own_weights_back(method: str) -> None:
    made, _ = tuned_adapter(method, "plain")
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made)
    attach(model, NormSelector(), Schedule.uniform(1.0, num_blocks=4))
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    shiva_dit.remove(model)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


# --- summary --------------------------------------------------------------------------------


def counted_flops(model: nn.Module) -> int:
    """FLOPs of one forward of one sample, by torch's counter."""

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop(q, k, v)

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        tiny.run(model, tiny.inputs(batch=1, t=0.1))
    return counter.get_total_flops()


@kinds
@pytest.mark.parametrize("counts", [[64, 5, 30, 17], [64, 64, 1, 63]])
@pytest.mark.parametrize("rejected", ["identity", "low_rank"])
def test_summary_states_the_flops_that_a_counter_finds(
    kind: str, counts: list[int], rejected: Any
) -> None:
    model = tiny.sd3(kind)
    dense = counted_flops(model)
    made = adapter_for(model, rejected=rejected).requires_grad_(
        False
    )  # the counter's module tracker trips on views
    shiva_dit.apply(model, made, schedule=tiny.from_counts([counts]))
    summary = shiva_dit.summary(model, text_tokens=tiny.TEXT_TOKENS)
    assert summary.flops_dense == dense
    # The router's score is a product and a sum (2 N d' FLOPs), which the counter passes over.
    scores = sum(2 * 64 * made.config.hidden for k in counts if k < 64)
    assert summary.flops_pruned == counted_flops(model) + scores
    assert summary.flops_saved == pytest.approx(1 - summary.flops_pruned / dense)


def test_summary_averages_over_the_time_bins() -> None:
    model = tiny.sd3()
    each = []
    for row in COUNTS:
        shiva_dit.apply(model, adapter_for(model), schedule=tiny.from_counts([row]))
        each.append(shiva_dit.summary(model).flops_pruned)
    shiva_dit.apply(model, adapter_for(model))
    assert shiva_dit.summary(model).flops_pruned == round(sum(each) / 3)


def test_summary_says_what_is_kept() -> None:
    model = tiny.sd3()
    pipe = tiny.pipeline(model)
    shiva_dit.apply(pipe, adapter_for(model))
    summary = shiva_dit.summary(pipe)
    assert (summary.model_class, summary.num_tokens, summary.text_tokens) == (
        "SD3Transformer2DModel",
        64,
        333,
    )
    assert summary.keep_ratio == pytest.approx(sum(k for r in COUNTS for k in r[1:]) / (9 * 64))
    assert summary.rows == (
        (0.95, tuple(COUNTS[2])),
        (0.75, tuple(COUNTS[2])),
        (0.5, tuple(COUNTS[1])),
        (0.25, tuple(COUNTS[0])),
        (0.05, tuple(COUNTS[0])),
    )
    lines = str(summary).splitlines()
    assert lines[0] == (
        "SD3Transformer2DModel: 3 of 4 blocks pruned, 64 image tokens, 333 text tokens"
    )
    assert lines[1].startswith("kept on average 39.2%; FLOPs ")
    assert lines[1].endswith(f"{summary.flops_saved:.1%} saved")
    assert lines[3:] == [
        " 0.95  64 63 20  9",
        " 0.75  64 63 20  9",
        " 0.50  64 33  1 48",
        " 0.25  64  5 30 17",
        " 0.05  64  5 30 17",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": True}, "num_tokens: expected int"),
        ({"num_tokens": 1.5}, "num_tokens: expected int"),
        ({"text_tokens": -1}, "text_tokens must be at least 0"),
        ({"num_inference_steps": 1.5}, "num_inference_steps: expected int"),
        ({"num_inference_steps": 10**6}, "num_inference_steps must be at most 10000"),
    ],
)
def test_summary_takes_whole_numbers(options: dict[str, Any], message: str) -> None:
    pipe = tiny.pipeline(tiny.sd3())
    shiva_dit.apply(pipe, adapter_for(pipe.transformer))
    try:
        with pytest.raises(ValueError, match=message):
            shiva_dit.summary(pipe, **options)
    except TypeCheckError:
        assert "expected" in message


def test_summary_of_another_resolution() -> None:
    model = tiny.sd3()
    shiva_dit.apply(model, adapter_for(model), schedule=Schedule.uniform(0.5, num_blocks=4))
    summary = shiva_dit.summary(model, num_tokens=1024, text_tokens=10)
    assert summary.num_tokens == 1024
    assert summary.rows[0][1] == (1024, 512, 512, 512)
    assert summary.flops_dense > shiva_dit.summary(model, text_tokens=10).flops_dense


# --- errors ---------------------------------------------------------------------------------


def test_what_needs_an_adapter_says_so() -> None:
    model = tiny.sd3()
    before = tiny.footprint(model)
    message = "no adapter is attached to this SD3Transformer2DModel: call shiva_dit.apply first"
    for target in (model, tiny.pipeline(model)):
        with pytest.raises(ValueError, match=message):
            shiva_dit.compile(target)
        with pytest.raises(ValueError, match=message):
            shiva_dit.summary(target)
        with pytest.raises(ValueError, match=message), shiva_dit.disabled(target):
            pass
    assert tiny.footprint(model) == before


def test_supported_lists_what_can_be_attached_to() -> None:
    found = {model.model_class: model for model in shiva_dit.supported()}
    assert found.keys() == MODELS.keys()
    flux = found["FluxTransformer2DModel"]
    assert (flux.name, flux.guidance, flux.context) == ("Flux.1", "in turn", "pooled text")
    for model in found.values():
        assert hasattr(diffusers, model.model_class)


def test_an_unsupported_model_is_refused() -> None:
    sana = families.unsupported()
    before = tiny.footprint(sana)
    message = "SanaTransformer2DModel can't be served: its feed-forward is a convolution"
    for call in (
        lambda: shiva_dit.apply(sana, adapter_for(tiny.sd3())),
        lambda: shiva_dit.ShivaConfig.for_model(sana),
        lambda: shiva_dit.remove(sana),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert tiny.footprint(sana) == before
    with pytest.raises(ValueError, match="str has no transformer"):
        shiva_dit.apply("a model", adapter_for(tiny.sd3()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_model_class": "FluxTransformer2DModel"}, "adapter is for FluxTransformer2DModel, "
                                                         "the model is a SD3Transformer2DModel"),
        ({"num_blocks": 6, "num_groups": 2}, "adapter is for num_blocks = 6, .*num_blocks = 4"),
        ({"width": 48}, "adapter is for width = 48, the model has width = 32"),
        ({"time_dim": 48}, "adapter is for time_dim = 48, the model has time_dim = 32"),
        ({"context_dim": 21}, "adapter is for context_dim = 21, the model has context_dim = 20"),
        ({"width": 48, "base_model": "me/other"}, r"width = 48 \(me/other\), the model has"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused(options: dict[str, Any], message: str) -> None:
    model = tiny.sd3()
    before = tiny.footprint(model)
    config = replace(tiny.adapter(model).config, **options)
    made = ShivaAdapter(config)
    with pytest.raises(ValueError, match=message):
        shiva_dit.apply(model, made)
    assert tiny.footprint(model) == before


@pytest.mark.parametrize("where", ["router", "policy", "backbone"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(where: str, value: float) -> None:
    made, _ = tuned_adapter("full", "plain")
    tensors = {
        "router": made.router.layer_embedding.weight,
        "policy": made.policy.anchor,
        "backbone": made.backbone_weights["proj_out.bias"],
    }
    name = {
        "router": "router.layer_embedding.weight",
        "policy": "policy.anchor",
        "backbone": "proj_out.bias",
    }[where]
    with torch.no_grad():
        tensors[where].view(-1)[0] = value
    model = tiny.sd3()
    before = tiny.footprint(model)
    with pytest.raises(ValueError, match=f"adapter's {name} holds values that are not finite"):
        shiva_dit.apply(model, made)
    assert tiny.footprint(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio must lie in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.2}, r"keep_ratio must lie in \(0, 1\], got 1.2"),
        ({"keep_ratio": float("nan")}, r"keep_ratio must lie in \(0, 1\], got nan"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"multiple": -8}, "multiple must be at least 1, got -8"),
        ({"keep_ratio": 0.5, "schedule": Schedule.uniform(0.5, num_blocks=4)}, "not both"),
        ({"schedule": Schedule.uniform(0.5, num_blocks=3)}, "schedule is for 3 blocks, .*has 4"),
        ({"timesteps": []}, "timesteps must name at least one step"),
        ({"timesteps": 5}, "timesteps must be a list of numbers, got 5"),
        ({"timesteps": "ab"}, "timesteps must be a list of numbers, got 'ab'"),
        ({"timesteps": [True]}, "timesteps: expected"),
        ({"timesteps": [float("nan")]}, "timesteps: expected a finite number"),
        ({"keep_ratio": True}, "keep_ratio: expected"),
        ({"keep_ratio": "x"}, "keep_ratio: expected"),
        ({"multiple": 1.5}, "multiple: expected int, got 1.5"),
        ({"segments": True}, "segments: expected int"),
        ({"schedule": 3}, "schedule must be a Schedule, got int"),
        ({"merge": False}, 'backbone = "full".*merge=False'),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_options_outside_their_range_change_nothing(
    options: dict[str, Any], message: str, earlier: bool
) -> None:
    made, _ = tuned_adapter("full", "plain")
    model = tiny.sd3()
    if earlier:
        shiva_dit.apply(model, made)
    output, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    on = attachment_of(model)
    try:
        with pytest.raises(ValueError, match=message):
            shiva_dit.apply(model, made, **options)
    except TypeCheckError:  # where annotations are enforced, as in most tests, they come first
        assert "expected" in message or "must be a" in message
    assert attachment_of(model) is on
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, tiny.inputs()), output)


def test_a_multiple_that_the_ratio_does_not_allow_is_refused() -> None:
    model = tiny.sd3()
    shiva_dit.apply(model, adapter_for(model), keep_ratio=0.4, multiple=32)
    with pytest.raises(ValueError, match=r"at least 32 of 64 .* use a multiple of at most 25"):
        tiny.run(model, tiny.inputs())


def test_an_adapter_in_16_bits_is_refused() -> None:
    model = tiny.sd3()
    made = adapter_for(model).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be torch\.float32, got torch\.bfloat16"):
        shiva_dit.apply(model, made)
    assert attachment_of(model) is None


@backbones
def test_a_failure_inside_apply_leaves_nothing_attached(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = tuned_adapter(method, "plain")
    model = tiny.sd3()
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    handles = 0
    real = nn.Module.register_forward_hook

    def fail(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal handles
        handles += 1
        if handles == 2:
            raise OSError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_hook", fail)
    with pytest.raises(OSError, match=r"^$"):
        shiva_dit.apply(model, made)
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


@backbones
def test_a_backbone_of_another_model_leaves_nothing_attached(method: str) -> None:
    made, _ = tuned_adapter(method, "dual")
    model = tiny.sd3("plain")
    before = tiny.footprint(model)
    with pytest.raises(ValueError, match="fit this model"):
        shiva_dit.apply(model, made)
    assert tiny.footprint(model) == before
    assert attachment_of(model) is None


# --- names ----------------------------------------------------------------------------------


def test_importing_the_package_imports_neither_diffusers_nor_torch() -> None:
    code = (
        "import sys, shiva_dit; heavy = {'torch', 'diffusers', 'transformers', 'peft'}; "
        "assert 'apply' in dir(shiva_dit); "
        "print(sorted(heavy & set(sys.modules)), shiva_dit.Schedule.__name__, "
        "'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "Schedule", "False"]


def test_the_public_names() -> None:
    names = [
        "IBTM",
        "Refresh",
        "SDTM",
        "Schedule",
        "ShivaAdapter",
        "ShivaConfig",
        "ToFu",
        "ToMA",
        "ToMeSD",
        "apply",
        "attach_reducer",
        "compile",
        "correct",
        "cuda_graphs",
        "disabled",
        "guided",
        "remove",
        "steps",
        "summary",
        "supported",
    ]
    assert sorted(shiva_dit.__all__) == names
    assert set(names) <= set(dir(shiva_dit))
    assert len(dir(shiva_dit)) == len(set(dir(shiva_dit)))
    for name in names:
        value = getattr(shiva_dit, name)
        assert value.__module__.startswith("shiva_dit")
        assert value.__name__ == name
    with pytest.raises(AttributeError, match="module 'shiva_dit' has no attribute 'appply'"):
        shiva_dit.appply  # type: ignore[attr-defined]  # noqa: B018
    assert isinstance(tiny.pipeline(tiny.sd3()), StableDiffusion3Pipeline)
