"""Tuned backbone weights on a model: on, off, and gone without a trace."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from shiva_dit.models.backbone import (
    PEFT_NAME,
    TunedBackbone,
    add_lora,
    backbone_weights,
    first_not_finite,
    lora_weights,
    remove_lora,
    set_trainable,
    trainable_parameters,
)
from shiva_dit.models.target import pipeline_transformer
from tests import tiny

RANK = tiny.LORA_RANK
SETTINGS: dict[str, dict[str, Any] | None] = {
    "lora": {"r": RANK, "lora_alpha": RANK, "use_dora": False},
    "dora": {"r": RANK, "lora_alpha": RANK, "use_dora": True},
    "full": None,
}

methods = pytest.mark.parametrize("method", SETTINGS)
low_rank = pytest.mark.parametrize("method", ["lora", "dora"])


def add_users_lora(model: Any, name: str, targets: list[str], seed: int) -> None:
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name=name)
    tiny.fill_lora(model, name, seed)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)


@methods
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_on_off_and_gone(method: str, kind: str) -> None:
    weights, expected = tiny.tuned(method, kind)
    model = tiny.sd3(kind)
    bare, state, before = tiny.run(model, tiny.inputs()), state_of(model), tiny.footprint(model)
    assert not torch.equal(bare, expected)

    backbone = TunedBackbone(model, weights, SETTINGS[method])
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    backbone.enable(False)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    backbone.enable(False)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    backbone.enable(True)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)

    backbone.restore()
    assert same_state(model, state)
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert not hasattr(model, "peft_config")
    assert not any("lora" in type(module).__module__ for module in model.modules())


@methods
def test_restored_while_switched_off(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    state, before = state_of(model), tiny.footprint(model)
    backbone = TunedBackbone(model, weights, SETTINGS[method])
    backbone.enable(False)
    backbone.restore()
    assert same_state(model, state)
    assert tiny.footprint(model) == before
    backbone.enable(True)  # nothing is left to switch on
    assert same_state(model, state)
    assert tiny.footprint(model) == before


def test_no_weights_change_nothing() -> None:
    model = tiny.sd3()
    state, before = state_of(model), tiny.footprint(model)
    backbone = TunedBackbone(model, {}, None)
    backbone.enable(False)
    assert same_state(model, state)
    backbone.restore()
    assert tiny.footprint(model) == before


@methods
def test_weights_that_are_put_on_are_not_changed(method: str) -> None:
    weights, _ = tiny.tuned(method)
    kept = {name: value.clone() for name, value in weights.items()}
    model = tiny.sd3()
    backbone = TunedBackbone(model, weights, SETTINGS[method])
    backbone.enable(False)
    backbone.enable(True)
    backbone.restore()
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


@methods
def test_the_global_generator_is_left_alone(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    before = torch.get_rng_state()
    TunedBackbone(model, weights, SETTINGS[method])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_full_state_takes_the_models_dtype() -> None:
    weights, _ = tiny.tuned("full")
    model = tiny.sd3().to(torch.bfloat16)
    state = state_of(model)
    backbone = TunedBackbone(model, weights, None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].to(torch.bfloat16)), name
    backbone.restore()
    assert same_state(model, state)


# --- what is tuned --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@low_rank
def test_lora_is_on_every_linear_layer_of_attention_and_feed_forward(
    method: str, kind: str
) -> None:
    model = tiny.sd3(kind)
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".attn" in name or ".ff" in name)
    ]
    # Attention: 4 of the image, 4 of the text (3 in the last block), 4 of the second attention in
    # the first two blocks; feed-forward: 2 of each stream (the last block has none for the text).
    assert len(inside) == 3 * 12 + (7 + 2) + (2 * 4 if kind == "dual" else 0)
    settings = SETTINGS[method]
    assert settings is not None
    add_lora(model, settings)
    found = {name.split(".lora_")[0].removeprefix("transformer.") for name in lora_weights(model)}
    assert found == set(inside)


@low_rank
def test_lora_starts_as_the_model_itself(method: str) -> None:
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    settings = SETTINGS[method]
    assert settings is not None
    add_lora(model, settings)
    output = tiny.run(model, tiny.inputs())
    if method == "lora":
        assert torch.equal(output, bare)
    else:  # DoRA divides by the norm that it multiplies with. Measured: 1e-7.
        assert (output - bare).norm() <= 1e-6 * bare.norm()


@pytest.mark.parametrize("method", ["frozen", *SETTINGS])
def test_only_the_tuned_parameters_are_trainable(method: str) -> None:
    model = tiny.sd3()
    own = {name for name, _ in model.named_parameters()}
    settings = SETTINGS.get(method)
    if settings is not None:
        add_lora(model, settings)
    parameters = trainable_parameters(model, method)
    assert not any(p.requires_grad for p in model.parameters())
    set_trainable(parameters.values(), True)
    opened = {name for name, p in model.named_parameters() if p.requires_grad}
    assert opened == set(parameters)
    if method == "frozen":
        assert opened == set()
    elif method == "full":
        assert opened == own
    else:
        added = {name for name, _ in model.named_parameters()} - {
            n.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
            for n in own
        }
        assert opened == added - own
        assert len(backbone_weights(model, method)) == len(opened)


def test_kept_weights_are_copies() -> None:
    model = tiny.sd3()
    weights = backbone_weights(model, "full")
    kept = {name: value.clone() for name, value in weights.items()}
    tiny.randomize(model, seed=11)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert backbone_weights(model, "frozen") == {}


# --- the user's own LoRA --------------------------------------------------------------------


@low_rank
@pytest.mark.parametrize("targets", [["to_q", "to_k"], ["to_q", "proj_out"]])
def test_a_users_lora_stays_active(method: str, targets: list[str]) -> None:
    """Also where it sits on fewer layers than ours, or on others."""
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    add_users_lora(model, "mine", targets, seed=8)
    alone, state, before = tiny.run(model, tiny.inputs()), state_of(model), tiny.footprint(model)

    backbone = TunedBackbone(model, weights, SETTINGS[method])
    both = tiny.run(model, tiny.inputs())
    assert set(model.active_adapters()) == {"mine", PEFT_NAME}
    backbone.enable(False)
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)
    backbone.enable(True)
    assert torch.equal(tiny.run(model, tiny.inputs()), both)
    model.set_adapter(PEFT_NAME)
    ours = tiny.run(model, tiny.inputs())
    assert not torch.equal(both, ours)
    model.set_adapter(["mine", PEFT_NAME])

    backbone.restore()
    assert model.active_adapters() == ["mine"]
    assert set(model.peft_config) == {"mine"}
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)
    assert same_state(model, state)
    assert tiny.footprint(model).keys() == before.keys()


@low_rank
def test_a_users_switched_off_lora_stays_off(method: str) -> None:
    weights, expected = tiny.tuned(method)
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    add_users_lora(model, "mine", ["to_q"], seed=8)
    model.disable_adapters()
    backbone = TunedBackbone(model, weights, SETTINGS[method])
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    backbone.enable(False)
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    backbone.enable(True)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    backbone.restore()
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert set(model.peft_config) == {"mine"}


@low_rank
def test_one_of_two_users_loras_stays_the_active_one(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    add_users_lora(model, "first", ["to_q"], seed=8)
    add_users_lora(model, "second", ["to_v"], seed=9)
    model.set_adapter("first")
    alone = tiny.run(model, tiny.inputs())
    backbone = TunedBackbone(model, weights, SETTINGS[method])
    backbone.restore()
    assert model.active_adapters() == ["first"]
    assert set(model.peft_config) == {"first", "second"}
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)


@low_rank
def test_the_one_that_was_active_before_it_was_switched_off_comes_back(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    add_users_lora(model, "first", ["to_q"], seed=8)
    add_users_lora(model, "second", ["to_v"], seed=9)
    active = tiny.run(model, tiny.inputs())
    assert model.active_adapters() == ["second"]
    model.disable_adapters()
    TunedBackbone(model, weights, SETTINGS[method]).restore()
    model.enable_adapters()
    assert model.active_adapters() == ["second"]
    assert torch.equal(tiny.run(model, tiny.inputs()), active)


def test_a_full_backbone_asks_to_unload_a_lora_first() -> None:
    weights, _ = tiny.tuned("full")
    model = tiny.sd3()
    add_users_lora(model, "mine", ["to_q"], seed=8)
    alone, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    with pytest.raises(ValueError, match=r"doesn't fit this model.*Unload LoRA"):
        TunedBackbone(model, weights, None)
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)


# --- errors ---------------------------------------------------------------------------------


@low_rank
@pytest.mark.parametrize("damage", ["missing", "foreign", "shape"])
def test_lora_weights_of_another_model_are_refused(method: str, damage: str) -> None:
    weights, _ = tiny.tuned(method)
    name = next(iter(sorted(weights)))
    if damage == "missing":
        del weights[name]
    elif damage == "foreign":
        weights["transformer.nowhere.lora_A.weight"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(RANK + 1, 5)
    model = tiny.sd3()
    state, before = state_of(model), tiny.footprint(model)
    with pytest.raises(ValueError, match=r"LoRA weights don't fit this model"):
        TunedBackbone(model, weights, SETTINGS[method])
    assert same_state(model, state)
    assert tiny.footprint(model) == before


@pytest.mark.parametrize("damage", ["missing", "foreign", "shape"])
def test_a_full_backbone_of_another_model_is_refused(damage: str) -> None:
    weights, _ = tiny.tuned("full")
    if damage == "missing":
        del weights["proj_out.weight"]
        message = r"\['proj_out.weight'\] differ"
    elif damage == "foreign":
        weights["nowhere.weight"] = torch.zeros(1)
        message = r"\['nowhere.weight'\] differ"
    else:
        weights["proj_out.weight"] = torch.zeros(3, 5)
        message = r"proj_out.weight has shape \(3, 5\), the model's is \(16, 32\)"
    model = tiny.sd3()
    state, before = state_of(model), tiny.footprint(model)
    with pytest.raises(ValueError, match=message):
        TunedBackbone(model, weights, None)
    assert same_state(model, state)
    assert tiny.footprint(model) == before


def test_a_model_without_attention_gets_no_lora() -> None:
    class Bare(nn.Module):
        pass

    settings = SETTINGS["lora"]
    assert settings is not None
    with pytest.raises(ValueError, match="Bare has no linear layers in attention"):
        add_lora(Bare(), settings)


def test_lora_can_be_added_again_after_removal() -> None:
    settings = SETTINGS["lora"]
    assert settings is not None
    model = tiny.sd3()
    for _ in range(2):
        add_lora(model, settings)
        assert len(lora_weights(model)) == 2 * (3 * 12 + 9)
        remove_lora(model)


def test_a_pipeline_has_a_transformer() -> None:
    model = tiny.sd3()
    assert pipeline_transformer(model) is model
    assert pipeline_transformer(tiny.pipeline(model)) is model
    with pytest.raises(ValueError, match="str has no transformer: pass a diffusers pipeline"):
        pipeline_transformer("a string")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_tensor_that_is_not_finite_is_named(value: float) -> None:
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, value])}
    assert first_not_finite(tensors) == "bad"
    assert first_not_finite({"good": torch.ones(2)}) is None
