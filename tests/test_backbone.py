"""Tuned backbone weights on a model: on, off, and gone without a trace."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from shiva_dit.models.backbone import (
    LORA_TARGETS,
    PEFT_NAME,
    add_lora,
    backbone_weights,
    first_not_finite,
    lora_weights,
    remove_lora,
    set_trainable,
    trainable_parameters,
)
from shiva_dit.models.families import model_spec
from shiva_dit.models.target import pipeline_transformer
from shiva_dit.models.tuned import TunedBackbone
from shiva_dit.models.watch import Watch
from tests import families, tiny

RANK = tiny.LORA_RANK
SETTINGS: dict[str, dict[str, Any] | None] = {
    "lora": {"r": RANK, "lora_alpha": RANK, "use_dora": False},
    "dora": {"r": RANK, "lora_alpha": RANK, "use_dora": True},
    "full": None,
}

methods = pytest.mark.parametrize("method", SETTINGS)
low_rank = pytest.mark.parametrize("method", ["lora", "dora"])


def put(model: Any, weights: Mapping[str, Tensor], lora: Mapping[str, Any] | None) -> TunedBackbone:
    backbone = TunedBackbone(model, weights, lora)
    backbone.put_on()
    return backbone


def add_users_lora(model: Any, name: str, targets: list[str], seed: int) -> None:
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name=name)
    tiny.fill_lora(model, name, seed)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)


def near(found: Tensor, expected: Tensor, bound: float = 1e-5) -> bool:
    """Merged weights round otherwise than PEFT's layers. Measured: 1e-6."""
    return bool((found - expected).norm() <= bound * expected.norm())


@methods
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_on_off_and_gone(method: str, kind: str, merge: bool) -> None:
    weights, expected = tiny.tuned(method, kind)
    model = tiny.sd3(kind)
    bare, state, before = tiny.run(model, tiny.inputs()), state_of(model), tiny.footprint(model)
    assert not near(bare, expected, 0.1)

    backbone = TunedBackbone(model, weights, SETTINGS[method], merge=merge)
    backbone.put_on()
    tuned = tiny.run(model, tiny.inputs())
    assert torch.equal(tuned, expected) if method == "full" else near(tuned, expected)
    for _ in range(2):
        backbone.enable(False)
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    backbone.enable(True)
    assert torch.equal(tiny.run(model, tiny.inputs()), tuned)
    assert list(model.state_dict()) == list(state)

    backbone.restore()
    assert same_state(model, state)
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    backbone.put_on()
    assert torch.equal(tiny.run(model, tiny.inputs()), tuned)


@methods
def test_restored_while_switched_off(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    state, before = state_of(model), tiny.footprint(model)
    backbone = put(model, weights, SETTINGS[method])
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
    backbone = put(model, {}, None)
    backbone.enable(False)
    assert same_state(model, state)
    backbone.restore()
    assert tiny.footprint(model) == before


@methods
def test_weights_that_are_put_on_are_not_changed(method: str) -> None:
    weights, _ = tiny.tuned(method)
    kept = {name: value.clone() for name, value in weights.items()}
    model = tiny.sd3()
    backbone = put(model, weights, SETTINGS[method])
    backbone.enable(False)
    backbone.enable(True)
    backbone.restore()
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


@methods
def test_the_global_generator_is_left_alone(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    before = torch.get_rng_state()
    put(model, weights, SETTINGS[method])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_full_state_takes_the_models_dtype() -> None:
    weights, _ = tiny.tuned("full")
    model = tiny.sd3().to(torch.bfloat16)
    state = state_of(model)
    backbone = put(model, weights, None)
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


@methods
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("targets", [["to_q", "to_k"], ["to_q", "proj_out"]])
def test_a_users_lora_lies_on_top(method: str, targets: list[str], merge: bool) -> None:
    """Put on before or after, on fewer layers than ours or on others, it acts on tuned weights."""
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    backbone = TunedBackbone(model, weights, SETTINGS[method], merge=merge)
    backbone.put_on()
    add_users_lora(model, "mine", targets, seed=8)
    afterwards = tiny.run(model, tiny.inputs())

    model = tiny.sd3()
    add_users_lora(model, "mine", targets, seed=8)
    alone, state, before = tiny.run(model, tiny.inputs()), state_of(model), tiny.footprint(model)
    backbone = TunedBackbone(model, weights, SETTINGS[method], merge=merge)
    backbone.put_on()
    assert torch.equal(tiny.run(model, tiny.inputs()), afterwards)
    assert model.active_adapters() == ["mine"]
    backbone.enable(False)
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)
    backbone.enable(True)
    assert torch.equal(tiny.run(model, tiny.inputs()), afterwards)
    backbone.restore()
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)
    assert same_state(model, state)
    assert tiny.footprint(model) == before


@methods
def test_a_users_switched_off_lora_stays_off(method: str) -> None:
    weights, expected = tiny.tuned(method)
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    add_users_lora(model, "mine", ["to_q"], seed=8)
    model.disable_adapters()
    backbone = put(model, weights, SETTINGS[method])
    assert near(tiny.run(model, tiny.inputs()), expected)
    backbone.restore()
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert set(model.peft_config) == {"mine"}


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig, OFTConfig])
@low_rank
def test_other_kinds_of_the_users_stay(method: str, kind: Any) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    options = {"r": 2} if kind is not OFTConfig else {"oft_block_size": 4, "r": 0}
    model.add_adapter(kind(target_modules=["to_q"], **options), adapter_name="mine")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mine" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
                parameter.copy_(0.3 * noise)
    alone = tiny.run(model, tiny.inputs())
    backbone = put(model, weights, SETTINGS[method])
    assert not near(tiny.run(model, tiny.inputs()), alone, 0.05)
    backbone.restore()
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@low_rank
def test_in_16_bits_merged_weights_are_no_further_from_float32(
    method: str, dtype: torch.dtype
) -> None:
    """Than PEFT's layers are, on the weights of 16 bits. Measured: 0.94 to 0.97 of these."""
    weights, _ = tiny.tuned(method)
    given = {n: v if n == "timestep" else v.to(dtype) for n, v in tiny.inputs().items()}
    off: dict[str, list[float]] = {"merged": [], "PEFT's": []}
    for seed in range(6):
        truth = tiny.sd3(seed=seed).to(dtype).float()
        put(truth, weights, SETTINGS[method])
        exact = tiny.run(truth, {name: value.float() for name, value in given.items()})
        merged, peft = tiny.sd3(seed=seed).to(dtype), tiny.sd3(seed=seed)
        put(merged, weights, SETTINGS[method])
        settings = SETTINGS[method]
        assert settings is not None
        add_lora(peft, settings)
        names = {name.removeprefix("transformer."): value for name, value in weights.items()}
        set_peft_model_state_dict(peft, names, adapter_name=PEFT_NAME)
        for name, model in (("merged", merged), ("PEFT's", peft.to(dtype))):
            found = tiny.run(model, given).float()
            off[name].append(float((found - exact).norm() / exact.norm()))
    assert sum(off["merged"]) <= 1.1 * sum(off["PEFT's"])  # the draws of rounding differ
    assert sum(off["merged"]) > 0


@pytest.mark.parametrize("method", ["lora", "full"])  # DoRA divides by its norms
def test_weights_that_the_dtype_cannot_hold_are_refused(method: str) -> None:
    weights, _ = tiny.tuned(method)
    name = next(n for n in weights if n.endswith(("lora_B.weight", "ff.net.2.weight")))
    weights[name] = torch.full_like(weights[name], 7e4)
    model = tiny.sd3().half()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"aren't finite as torch.float16: .*bfloat16"):
        put(model, weights, SETTINGS[method])
    assert same_state(model, before)


# --- LoRAs of the user that are fused ---------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "merge"), [("lora", True), ("lora", False), ("dora", True), ("full", True)]
)
@pytest.mark.parametrize("fused_first", [True, False])
def test_a_users_fused_lora_stays_fused(method: str, merge: bool, fused_first: bool) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    add_users_lora(model, "mine", ["to_q", "to_k"], seed=8)
    unfused = tiny.run(model, tiny.inputs())
    expected = TunedBackbone(model, weights, SETTINGS[method], merge=merge)
    expected.put_on()
    both = tiny.run(model, tiny.inputs())
    expected.restore()

    backbone = TunedBackbone(model, weights, SETTINGS[method], merge=merge)
    if fused_first:
        model.fuse_lora()
        bare = tiny.run(model, tiny.inputs())
        backbone.put_on()
    else:
        backbone.put_on()
        model.fuse_lora()
    assert near(tiny.run(model, tiny.inputs()), both)  # fused weights round otherwise
    backbone.enable(False)
    off = tiny.run(model, tiny.inputs())
    assert torch.equal(off, bare) if fused_first else near(off, unfused)
    backbone.enable(True)
    assert near(tiny.run(model, tiny.inputs()), both)
    backbone.restore()
    assert torch.equal(tiny.run(model, tiny.inputs()), off)
    model.unfuse_lora()
    assert near(tiny.run(model, tiny.inputs()), unfused)
    model.unload_lora()
    assert near(tiny.run(model, tiny.inputs()), tiny.run(tiny.sd3(), tiny.inputs()))


def test_a_fused_lora_under_a_dora_beside_is_refused() -> None:
    weights, _ = tiny.tuned("dora")
    model = tiny.sd3()
    add_users_lora(model, "mine", ["to_q", "to_k"], seed=8)
    backbone = TunedBackbone(model, weights, SETTINGS["dora"], merge=False)
    backbone.put_on()
    watch = Watch(backbone.watch)
    watch.check()
    model.fuse_lora()
    for again in (watch.check, watch.check, backbone.put_on):
        with pytest.raises(ValueError, match=r"fused into .*attn.to_[qk].*unfuse_lora\(\) first"):
            again()
    model.unfuse_lora()
    watch.check()


@methods
def test_a_lora_that_was_fused_before_may_be_unfused_while_on(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    add_users_lora(model, "mine", ["to_q", "to_k"], seed=8)
    unfused = tiny.run(model, tiny.inputs())
    model.fuse_lora()
    backbone = put(model, weights, SETTINGS[method])
    both = tiny.run(model, tiny.inputs())
    model.unfuse_lora()
    assert near(tiny.run(model, tiny.inputs()), both)
    backbone.restore()
    assert near(tiny.run(model, tiny.inputs()), unfused)


@methods
def test_a_lora_fused_and_unloaded_keeps_the_adapter_on(method: str) -> None:
    """What it changed can't be told from the adapter's weights any more."""
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    backbone = put(model, weights, SETTINGS[method])
    add_users_lora(model, "mine", ["to_q", "to_k"], seed=8)
    model.fuse_lora()
    model.unload_lora()
    expected = tiny.run(model, tiny.inputs())
    for off in (lambda: backbone.enable(False), backbone.restore):
        with pytest.raises(RuntimeError, match=r"can't be given back.*was changed.*unloaded"):
            off()
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)


@methods
@pytest.mark.parametrize("odd", [{"lora_bias": True}, {"use_dora": True}])
def test_what_does_more_than_add_to_a_weight_must_be_unfused(
    method: str, odd: dict[str, Any]
) -> None:
    weights, _ = tiny.tuned(method)
    for fused_first in (True, False):
        model = tiny.sd3()
        config = LoraConfig(r=2, target_modules=["to_q"], **odd)
        model.add_adapter(config, adapter_name="mine")
        tiny.fill_lora(model, "mine", seed=8)
        unfused = tiny.run(model, tiny.inputs())
        backbone = TunedBackbone(model, weights, SETTINGS[method])
        if fused_first:
            model.fuse_lora()
            with pytest.raises(RuntimeError, match=r"LoRA 'mine' with a variant .* Unfuse"):
                backbone.put_on()
        else:
            backbone.put_on()
            model.fuse_lora()
            with pytest.raises(RuntimeError, match=r"LoRA 'mine' with a variant .* fused into it"):
                backbone.restore()
        model.unfuse_lora()
        backbone.restore()
        assert near(tiny.run(model, tiny.inputs()), unfused)


@methods
@pytest.mark.parametrize("change", ["deleted", "rescaled"])
def test_a_fused_lora_that_is_deleted_or_rescaled_is_noticed(method: str, change: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    add_users_lora(model, "mine", ["to_q", "to_k"], seed=8)
    add_users_lora(model, "other", ["to_q"], seed=9)
    backbone = put(model, weights, SETTINGS[method])
    model.fuse_lora(adapter_names=["mine"])
    fused = tiny.run(model, tiny.inputs())
    if change == "deleted":
        model.delete_adapters("mine")
    else:
        model.set_adapters("mine", [0.3])
    with pytest.raises(RuntimeError, match="can't be given back"):
        backbone.enable(False)
    assert torch.equal(tiny.run(model, tiny.inputs()), fused)


# --- layers that aren't plain -----------------------------------------------------------------


class Quantised(nn.Module):
    """A linear layer of 8-bit weights, as quantisers put it in a plain one's place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Quantised(child))


@low_rank
def test_beside_quantised_layers(method: str) -> None:
    weights, expected = tiny.tuned(method)
    model = tiny.sd3()
    dense = tiny.run(model, tiny.inputs())
    quantise(model)
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    off = float((bare - dense).norm() / dense.norm())
    assert 1e-4 < off < 0.05
    backbone = put(model, weights, SETTINGS[method])
    assert near(tiny.run(model, tiny.inputs()), expected, 4 * off)
    backbone.restore()
    assert tiny.footprint(model) == before


@low_rank
def test_layers_that_are_quantised_after_a_lora_was_put_beside_them(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model, expected = tiny.sd3(), tiny.sd3()
    quantise(expected)
    bare = tiny.run(expected, tiny.inputs())
    put(expected, weights, SETTINGS[method])
    backbone = TunedBackbone(model, weights, SETTINGS[method], merge=False)
    backbone.put_on()
    watch = Watch(backbone.watch)
    quantise(model)
    with pytest.raises(RuntimeError, match=r"was replaced while .*call shiva_dit.apply again"):
        watch.check()
    backbone.restore()
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    backbone.put_on()
    watch = Watch(backbone.watch)
    watch.check()
    assert torch.equal(tiny.run(model, tiny.inputs()), tiny.run(expected, tiny.inputs()))


@low_rank
def test_a_wrapper_over_a_layer_outlives_what_was_beside_it(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    layer = model.transformer_blocks[1].attn.to_q
    bare, names = tiny.run(model, tiny.inputs()), set(layer.__dict__)
    backbone = TunedBackbone(model, weights, SETTINGS[method], merge=False)
    backbone.put_on()
    below, calls = layer.forward, []

    def wrapper(x: Tensor) -> Tensor:
        calls.append(1)
        return below(x)

    layer.forward = wrapper
    tiny.run(model, tiny.inputs())
    backbone.restore()
    assert set(layer.__dict__) == {*names, "forward"}
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert len(calls) == 2


@low_rank
def test_layers_that_share_a_weight_or_have_a_forward_of_their_own(method: str) -> None:
    """Merging would change the one twice, and the other as it doesn't run."""
    weights, _ = tiny.tuned(method)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, 2.0 * self.weight, self.bias)

    def changed(doubled: bool) -> Any:
        model = tiny.sd3()
        attention = model.transformer_blocks[1].attn
        if doubled:
            own = attention.to_q
            attention.to_q = Doubled(32, 32)
            attention.to_q.load_state_dict({**own.state_dict(), "weight": own.weight / 2})
        else:
            attention.to_k.weight = attention.to_q.weight
        return model

    for doubled in (True, False):
        model, reference = changed(doubled), changed(doubled)
        before, state = tiny.run(model, tiny.inputs()), state_of(model)
        backbone = put(model, weights, SETTINGS[method])
        assert len(backbone.beside) == (1 if doubled else 2)
        apart = TunedBackbone(reference, weights, SETTINGS[method], merge=False)
        apart.put_on()
        assert near(tiny.run(model, tiny.inputs()), tiny.run(reference, tiny.inputs()))
        backbone.restore()
        assert same_state(model, state)
        assert torch.equal(tiny.run(model, tiny.inputs()), before)


@methods
def test_offloading_to_disk_keeps_copies(method: str, tmp_path: Any) -> None:
    weights, expected = tiny.tuned(method)
    model, cpu = tiny.sd3(), torch.device("cpu")
    bare = tiny.run(model, tiny.inputs())
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path / "first")}
    model.enable_group_offload(cpu, cpu, **options)
    if method == "lora":
        backbone = put(model, weights, SETTINGS[method])
        assert near(tiny.run(model, tiny.inputs()), expected)
        backbone.restore()
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    else:
        with pytest.raises(ValueError, match="group offloading to disk"):
            put(model, weights, SETTINGS[method])
    model = tiny.sd3()
    backbone = put(model, weights, SETTINGS[method])
    options["offload_to_disk_path"] = str(tmp_path / "second")
    model.enable_group_offload(cpu, cpu, **options)
    assert near(tiny.run(model, tiny.inputs()), expected)
    with pytest.raises(RuntimeError, match="can't be exchanged under group offloading to disk"):
        backbone.restore()


def test_a_whole_backbone_on_layers_that_are_not_plain_is_refused() -> None:
    weights, _ = tiny.tuned("full")
    model = tiny.sd3()
    weight: Any = model.proj_out.weight
    model.proj_out.weight = TwoTensors(weight.data)
    with pytest.raises(ValueError, match=r"proj_out.weight is quantised \(TwoTensors\).*plain"):
        put(model, weights, None)
    model.proj_out.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
    with pytest.raises(ValueError, match=r"proj_out.weight is on the meta device"):
        put(model, weights, None)


class TwoTensors(nn.Parameter):
    """A parameter of a kind of its own, as quantised ones are."""


@methods
def test_fused_projections_are_refused(method: str) -> None:
    weights, _ = tiny.tuned(method)
    model = tiny.sd3()
    backbone = TunedBackbone(model, weights, SETTINGS[method])
    model.fuse_qkv_projections()
    message = "differ" if method == "full" else r"blocks.0.attn are fused.*unfuse_qkv_projections"
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        backbone.put_on()
    assert same_state(model, before)
    model.unfuse_qkv_projections()
    if method != "full":  # diffusers leaves the fused layers of SD3 in place
        backbone.put_on()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_linear_layer_of_attention_and_feed_forward_is_a_target(name: str) -> None:
    """All but those that modulate, norms' included."""
    model = families.FAMILIES[name].build()
    if not hasattr(model, "add_adapter"):
        return
    left = [
        path
        for index, block in enumerate(model_spec(model).blocks(model))
        for path, module in block.named_modules(prefix=f"blocks.{index}")
        if isinstance(module, nn.Linear)
        and not LORA_TARGETS.match(path)
        and not re.search(r"norm\d?(_context)?\.|_mod\.|adaLN|adaln|modulation", path)
    ]
    assert not left


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
        put(model, weights, SETTINGS[method])
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
        put(model, weights, None)
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


def test_a_rank_that_no_layer_has_is_refused_before_anything_is_put_on() -> None:
    model = tiny.sd3()  # of width 32
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=r"lora_rank must be at most 32, .*, got 33"):
        add_lora(model, {"r": 33, "lora_alpha": 33})
    assert set(model.state_dict()) == names
    add_lora(model, {"r": 32, "lora_alpha": 32})
