"""The adapter beside everything else that users put on a model; docs/composition.md is made here.

A cell says "works" where a test holds a value against one made without the neighbour or without
the adapter, and "refused" where a test sees a clear error: for each kind of backbone that an
adapter may bring along. `python -m tests.test_composition` writes the table.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    FluxControlNetModel,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SD3ControlNetModel,
    TaylorSeerCacheConfig,
    TensorParallelConfig,
)
from diffusers.hooks import FasterCacheConfig, tensor_parallel
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import shiva_dit
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.backbone import PEFT_NAME, backbone_weights
from shiva_dit.models.backbone import add_lora as add_adapters_lora
from shiva_dit.report.layout import markdown_rows
from tests import families, running, tiny
from tests.matrix import sampled
from tests.ranks import server
from tests.test_pipelines import Flux

DOCUMENT = Path(__file__).parents[1] / "docs" / "composition.md"
COUNTS = [[64, 5, 30, 17], [64, 33, 2, 48], [64, 63, 20, 9]]
Kind = Literal["frozen", "lora", "dora", "full"]
KINDS: tuple[Kind, ...] = ("frozen", "lora", "dora", "full")
Outcome = Literal["works", "refused", "works; can't be removed"]
When = Literal["before", "after", "beside"]

kinds = pytest.mark.parametrize("kind", KINDS)
NOT_FUSING = [
    *("cogview3-plus", "hunyuan-image", "hunyuan-video", "prx", "qwen-image"),
    *("stable-audio", "stable-audio-3", "joyimage", "joyimage-plus"),
    *("ace-step", "consisid", "hunyuan-video-1.5", "kandinsky6", "ltx2", "motif-video"),
]
"""Whose attention has queries, keys and values apart (or fused: PRX, Stable Audio 3, JoyImage)
whatever it is told; and those that diffusers fails to fuse."""


NOT_RECOMPUTING = [name for name, each in families.FAMILIES.items() if not each.recomputes]
NOT_SEQUENTIAL = ["hunyuan-dit"]
"""Whose pooling of text reads a layer's weights past its forward, which brings them."""


ASKED: dict[str, int] = {}
"""Of how many model classes a test asks its property; of one, if it isn't here."""


def classes(*needs: str, but: Collection[str] = ()) -> Any:
    """Every model class with every kind of backbone that it can have: `family` and `kind`.

    Args:
        needs: Attributes of the class without which there is nothing to ask.
        but: Families that can't have the neighbour, whether or not an adapter is on.
    """
    found = [
        (family, kind)
        for name, family in running.FAMILY.items()
        for kind in KINDS
        if kind in ("frozen", "full") or hasattr(getattr(diffusers, name), "add_adapter")
        if all(getattr(getattr(diffusers, name), need, False) for need in needs)
        if family not in but
    ]

    def put(test: Any) -> Any:
        ASKED[test.__name__] = len({family for family, _ in found})
        return sampled("family, kind", found, lambda cell: cell[0] == "sd3")(test)

    return put


@dataclass(frozen=True)
class Cell:
    what: str
    when: When
    kind: Kind
    outcome: Outcome
    check: str
    test: str


CELLS: list[Cell] = []
Outcomes = Outcome | Mapping[Kind | tuple[Kind, When], Outcome]


def cells(
    what: str, outcomes: Outcomes, check: str, *, order: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Note what a test shows; with `order` it takes `first`: whether the neighbour comes first.

    Args:
        what: The neighbour.
        outcomes: For all kinds of backbones, or what differs from "works", by kind, or by kind and
            order.
        check: How it is known.
        order: Whether it matters which came first.
    """

    def note(test: Callable[..., None]) -> Callable[..., None]:
        for when in ("before", "after") if order else ("beside",):
            for kind in KINDS:
                outcome: Any = outcomes
                if not isinstance(outcomes, str):
                    found: Any = outcomes
                    outcome = found.get((kind, when), found.get(kind, "works"))
                CELLS.append(Cell(what, when, kind, outcome, check, test.__name__))  # type: ignore[arg-type]
        if not order:
            return test
        return pytest.mark.parametrize("first", [True, False], ids=["before", "after"])(test)

    return note


@cache
def tuned(family: str, kind: Kind) -> dict[str, Tensor]:
    """Weights of a backbone that was tuned in this way."""
    model = families.made(family)
    if kind == "full":
        for parameter, other in zip(model.parameters(), _other(family), strict=True):
            parameter.data = parameter.data + 0.3 * (other - parameter.data)
    elif kind != "frozen":
        add_adapters_lora(model, {"r": 3, "lora_alpha": 3, "use_dora": kind == "dora"})
        tiny.fill_lora(model, PEFT_NAME, seed=7)
    return backbone_weights(model, kind)


def _other(family: str) -> list[Tensor]:
    model = families.made(family)
    tiny.randomize(model, seed=7)
    return [parameter.data for parameter in model.parameters()]


def adapter(
    model: Any, kind: Kind = "frozen", family: str = "sd3", **options: Any
) -> shiva_dit.ShivaAdapter:
    schedule = families.schedule(model, COUNTS)
    made = tiny.adapter(model, schedule, backbone=kind, lora_rank=3, **options)
    made.backbone_weights = {name: each.clone() for name, each in tuned(family, kind).items()}
    return made


def both(first: bool, put: Callable[[], object], apply: Callable[[], object]) -> None:
    """The neighbour and the adapter, in either order."""
    for step in (put, apply) if first else (apply, put):
        step()


def selected(model: Any, run: Callable[[], object]) -> list[Tensor]:
    """The tokens that were chosen, in the order in which blocks ran."""
    found: list[Tensor] = []
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.forwards.observer = lambda block, chosen: found.append(chosen)
    run()
    attachment.forwards.observer = None
    return found


class Case:
    """A tiny model and what it gives bare and pruned, with nothing else on it."""

    def __init__(self, kind: Kind = "frozen", family: str = "sd3", **options: Any) -> None:
        self.kind, self.family = kind, family
        self.model: Any = families.made(family)
        self.made = adapter(self.model, kind, family, **options)
        self.bare = self.run()
        self.apply()
        self.pruned = self.run()
        shiva_dit.remove(self.model)

    def apply(self, **options: Any) -> None:
        shiva_dit.apply(self.model, self.made, **options)

    def run(self, **options: Any) -> Tensor:
        with torch.no_grad():
            return families.run(self.model, {**families.arguments(self.family), **options})

    def run_tuned(self, **options: Any) -> Tensor:
        """The dense model with the adapter's weights."""
        attachment = attachment_of(self.model)
        assert attachment is not None
        attachment.enabled = False
        found = self.run(**options)
        attachment.enabled = True
        return found


def near(found: Tensor, expected: Tensor, bound: float) -> bool:
    return bool((found - expected).norm() <= bound * expected.norm())


# --- LoRA ---------------------------------------------------------------------------------------


def add_lora(model: Any, name: str, seed: int, kind: Any = LoraConfig, **options: Any) -> None:
    options = options or {"r": 2}
    targets = ["to_q", "to_v", "to_query", "to_value"]
    model.add_adapter(kind(target_modules=targets, **options), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def with_lora(kind: Kind, family: str, *names: str) -> tuple[Tensor, Tensor]:
    """Bare and pruned results of a model whose LoRAs were there before all."""
    model: Any = families.made(family)
    made, given = adapter(model, kind, family), families.arguments(family)
    for seed, name in enumerate(names):
        add_lora(model, name, seed=11 + seed)
    model.set_adapter(list(names))
    with torch.no_grad():
        bare = families.run(model, given)
        shiva_dit.apply(model, made)
        return bare, families.run(model, given)


@classes("add_adapter")
@cells("LoRA", "works", "as with the LoRA there from the start, to the bit", order=True)
def test_a_lora_in_either_order(first: bool, family: str, kind: Kind) -> None:
    case, (bare, pruned) = Case(kind, family), with_lora(kind, family, "mine")
    both(first, lambda: add_lora(case.model, "mine", seed=11), case.apply)
    assert torch.equal(case.run(), pruned)
    assert not torch.equal(pruned, case.pruned)
    shiva_dit.remove(case.model)
    assert torch.equal(case.run(), bare)


@kinds
@cells("Several LoRAs, one swapped for another", "works", "as with the other from the start")
def test_loras_are_swapped_while_applied(kind: Kind) -> None:
    case, (_, two) = Case(kind), with_lora(kind, "sd3", "mine", "other")
    _, second = with_lora(kind, "sd3", "other")
    add_lora(case.model, "mine", seed=11)
    case.apply()
    add_lora(case.model, "other", seed=12)
    case.model.set_adapter(["mine", "other"])
    assert torch.equal(case.run(), two)
    case.model.delete_adapters("mine")
    tiny.fill_lora(case.model, "other", seed=11)  # as `with_lora` filled the only one
    assert torch.equal(case.run(), second)


@kinds
@cells("LoRA, hot-swapped in place", "works", "as with the other from the start, to the bit")
def test_a_lora_is_hot_swapped_while_applied(kind: Kind, tmp_path: Path) -> None:
    case, (bare, pruned) = Case(kind), with_lora(kind, "sd3", "mine")
    donor: Any = families.made("sd3")
    add_lora(donor, "mine", seed=11)
    donor.save_lora_adapter(tmp_path, adapter_name="mine")
    case.apply()
    case.model.enable_lora_hotswap(target_rank=2)
    add_lora(case.model, "mine", seed=12)
    assert not torch.equal(case.run(), pruned)
    case.model.load_lora_adapter(
        tmp_path,
        adapter_name="mine",
        prefix=None,
        hotswap=True,
        weight_name="pytorch_lora_weights.safetensors",
    )
    assert torch.equal(case.run(), pruned)
    shiva_dit.remove(case.model)
    assert torch.equal(case.run(), bare)


@classes("add_adapter")
@cells("LoRA, fused and unfused again", "works", "fused as unfused, within 1e-5", order=True)
def test_a_fused_lora(first: bool, family: str, kind: Kind) -> None:
    case, (bare, pruned) = Case(kind, family), with_lora(kind, family, "mine")
    add_lora(case.model, "mine", seed=11)
    both(first, case.model.fuse_lora, case.apply)
    # Fused weights round otherwise; chosen tokens are the same.
    assert near(case.run(), pruned, 1e-5)
    with shiva_dit.disabled(case.model):
        assert near(case.run(), bare, 1e-5)
    shiva_dit.remove(case.model)
    assert near(case.run(), bare, 1e-5)
    case.apply()
    case.model.unfuse_lora()
    assert near(case.run(), pruned, 1e-5)
    shiva_dit.remove(case.model)
    assert near(case.run(), bare, 1e-5)


@kinds
@cells(
    "LoRA, fused and then unloaded",
    dict.fromkeys(("lora", "dora", "full"), "works; can't be removed"),
    "as before it was unloaded, to the bit; `remove` then a RuntimeError",
)
def test_a_fused_and_unloaded_lora(kind: Kind) -> None:
    case, (bare, pruned) = Case(kind), with_lora(kind, "sd3", "mine")
    case.apply()
    add_lora(case.model, "mine", seed=11)
    case.model.fuse_lora()
    fused = case.run()
    case.model.unload_lora()
    assert torch.equal(case.run(), fused)
    assert near(fused, pruned, 1e-5)
    if kind == "frozen":
        shiva_dit.remove(case.model)
        assert near(case.run(), bare, 1e-5)
        return
    with pytest.raises(RuntimeError, match=r"can't be given back.*unloaded"):
        shiva_dit.remove(case.model)
    assert torch.equal(case.run(), fused)


OTHERS: dict[Any, dict[str, Any]] = {
    LoHaConfig: {"r": 2},
    LoKrConfig: {"r": 2},
    OFTConfig: {"oft_block_size": 4, "r": 0},
}


@kinds
@pytest.mark.parametrize("other", OTHERS)
@cells("LoHa, LoKr and OFT of PEFT", "works", "either order alike; theirs stays", order=True)
def test_other_adapters_of_peft(first: bool, other: Any, kind: Kind) -> None:
    case, late = Case(kind), Case(kind)

    def put(model: Any) -> None:
        add_lora(model, "mine", 11, other, **OTHERS[other])

    put(late.model)
    bare = late.run()
    late.apply()
    both(first, lambda: put(case.model), case.apply)
    assert torch.equal(case.run(), late.run())
    assert not near(case.run(), case.pruned, 1e-3)
    shiva_dit.remove(case.model)
    assert torch.equal(case.run(), bare)


@classes("fuse_qkv_projections", but=NOT_FUSING)
@cells(
    "fuse_qkv_projections",
    {"lora": "refused", "dora": "refused", "full": "refused"},
    "as unfused, within 1e-5; or an error before the next image",
    order=True,
)
def test_fused_projections(first: bool, family: str, kind: Kind) -> None:
    case = Case(kind, family)
    if kind == "frozen":
        both(first, case.model.fuse_qkv_projections, case.apply)
        assert near(case.run(), case.pruned, 1e-5)
        shiva_dit.remove(case.model)
        assert near(case.run(), case.bare, 1e-5)
        return
    if first:
        case.model.fuse_qkv_projections()
        with pytest.raises(ValueError, match="fused"):
            case.apply()
        assert near(case.run(), case.bare, 1e-5)
        return
    case.apply()
    case.model.fuse_qkv_projections()
    for act in (case.run, lambda: shiva_dit.remove(case.model)):
        with pytest.raises(RuntimeError, match=r"fused.*unfuse_qkv_projections\(\) first"):
            act()
    case.model.unfuse_qkv_projections()
    assert torch.equal(case.run(), case.pruned)
    shiva_dit.remove(case.model)
    assert torch.equal(case.run(), case.bare)


# --- further inputs -----------------------------------------------------------------------------


def permuted(model: Any, run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A run whose blocks gather all tokens, each in a random order of its own."""
    with monkeypatch.context() as patch:
        families.force_permutation(model, patch)
        result = run()
    shiva_dit.remove(model)
    return result


FURTHER = "ratio 1 to the bit as the dense model with the adapter's weights; random order: 2e-6"


def further_inputs(case: Case, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments reach the blocks with an adapter on as they do without."""
    bare = case.run(**given)
    assert not near(bare, case.bare, 1e-3)
    assert near(permuted(case.model, lambda: case.run(**given), monkeypatch), bare, 2e-6)
    case.apply(keep_ratio=1.0)
    assert torch.equal(case.run(**given), case.run_tuned(**given))
    assert torch.equal(case.run(**given), bare) == (case.kind == "frozen")
    case.apply()
    assert not near(case.run(**given), case.pruned, 1e-3)
    shiva_dit.remove(case.model)
    assert torch.equal(case.run(**given), bare)


@kinds
@cells("ControlNet (SD3)", "works", FURTHER)
def test_a_controlnet_on_sd3(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind)
    net = SD3ControlNetModel.from_transformer(
        case.model, num_layers=2, num_extra_conditioning_channels=0
    )
    tiny.randomize(net, seed=21)
    given = families.arguments("sd3")
    condition = torch.randn_like(given["hidden_states"])
    with torch.no_grad():
        (residuals,) = net.eval()(
            **given, controlnet_cond=condition, conditioning_scale=2.0, return_dict=False
        )
    further_inputs(case, {"block_controlnet_hidden_states": residuals}, monkeypatch)


@kinds
@cells("ControlNet (Flux)", "works", FURTHER)
def test_a_controlnet_on_flux(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case, given = Case(kind, "flux"), families.arguments("flux")
    net = FluxControlNetModel.from_transformer(
        case.model, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    tiny.randomize(net, seed=21)
    condition = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        double, single = net.eval()(**given, controlnet_cond=condition, return_dict=False)
    further_inputs(
        case,
        {"controlnet_block_samples": double, "controlnet_single_block_samples": single},
        monkeypatch,
    )


@kinds
@cells("IP-Adapter (SD3)", "works", FURTHER)
def test_an_ip_adapter_on_sd3(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind)
    width = case.model.inner_dim
    processors = {}
    for name in case.model.attn_processors:
        made = SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=width,
            ip_hidden_states_dim=12,
            head_dim=case.model.config.attention_head_dim,
            timesteps_emb_dim=10,
            scale=1.0,
        )
        tiny.randomize(made, seed=5)
        processors[name] = made
    case.model.set_attn_processor(processors)
    draw = torch.Generator().manual_seed(4)
    image = {
        "ip_hidden_states": torch.randn(2, 5, 12, generator=draw),
        "temb": torch.randn(2, 10, generator=draw),
    }
    further_inputs(case, {"joint_attention_kwargs": image}, monkeypatch)


@kinds
@cells("IP-Adapter (Flux)", "works", FURTHER)
def test_an_ip_adapter_on_flux(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind, "flux")
    processors = dict(case.model.attn_processors)
    for name in processors:
        if name.startswith("transformer_blocks"):
            made = FluxIPAdapterAttnProcessor(32, 12, num_tokens=(5,))
            tiny.randomize(made, seed=5)
            processors[name] = made
    case.model.set_attn_processor(processors)
    image = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(4))
    further_inputs(case, {"joint_attention_kwargs": {"ip_hidden_states": [image]}}, monkeypatch)


# --- memory and numbers -------------------------------------------------------------------------


def offload(kind: str, model: Any) -> None:
    cpu = torch.device("cpu")
    if kind == "model":
        cpu_offload_with_hook(model, cpu)
    elif kind == "sequential":
        cpu_offload(model, cpu, offload_buffers=True)
    elif kind == "blocks":
        model.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1)
    else:
        model.enable_group_offload(cpu, cpu, "leaf_level")


SAME = "the same, to the bit, twice; after `remove` the bare model's, to the bit"


@classes()
@cells("Model offload", "works", SAME, order=True)
def test_model_offload(first: bool, family: str, kind: Kind) -> None:
    _offloaded("model", first, family, kind)


@classes(but=NOT_SEQUENTIAL)
@cells("Sequential offload", "works", SAME, order=True)
def test_sequential_offload(first: bool, family: str, kind: Kind) -> None:
    """Wan, LTX, PixArt and others have blocks that own parameters, which are brought for them."""
    _offloaded("sequential", first, family, kind)


@classes("_supports_group_offloading")
@cells("Group offload, by blocks", "works", SAME, order=True)
def test_group_offload_by_blocks(first: bool, family: str, kind: Kind) -> None:
    _offloaded("blocks", first, family, kind)


@classes("_supports_group_offloading")
@cells("Group offload, by layers", "works", SAME, order=True)
def test_group_offload_by_layers(first: bool, family: str, kind: Kind) -> None:
    _offloaded("layers", first, family, kind)


def _offloaded(how: str, first: bool, family: str, kind: Kind) -> None:
    case = Case(kind, family)
    both(first, lambda: offload(how, case.model), case.apply)
    for _ in range(2):
        assert torch.equal(case.run(), case.pruned)
    with shiva_dit.disabled(case.model):
        assert torch.equal(case.run(), case.bare)
    assert torch.equal(case.run(), case.pruned)
    shiva_dit.remove(case.model)
    assert torch.equal(case.run(), case.bare)
    if kind in ("lora", "dora"):
        case.apply(merge=False)
        assert near(case.run(), case.pruned, 1e-5)  # it rounds otherwise
        shiva_dit.remove(case.model)
        assert torch.equal(case.run(), case.bare)


@classes(but=NOT_SEQUENTIAL)
@cells("Sequential offload, taken off again", "works", SAME, order=True)
def test_offloading_is_taken_off(first: bool, family: str, kind: Kind) -> None:
    case = Case(kind, family)
    both(first, lambda: offload("sequential", case.model), case.apply)
    assert torch.equal(case.run(), case.pruned)
    remove_hook_from_module(case.model, recurse=True)
    for _ in range(2):
        assert torch.equal(case.run(), case.pruned)
    shiva_dit.remove(case.model)
    assert torch.equal(case.run(), case.bare)


@kinds
@cells(
    "Layerwise casting (fp8)",
    "works",
    "as on weights rounded to fp8, to the bit where these are the model's; off by what dense is",
    order=True,
)
def test_layerwise_casting(first: bool, kind: Kind) -> None:
    stored = torch.float8_e4m3fn
    case, rounded = Case(kind), Case(kind)
    off = float("nan")
    skipped = "pos_embed", "norm", "proj_out"  # what diffusers leaves as it is

    def round_weights() -> None:
        for name, module in rounded.model.named_modules():
            if isinstance(module, torch.nn.Linear) and not any(s in name for s in skipped):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(stored).float()

    both(first, round_weights, rounded.apply)
    both(first, lambda: case.model.enable_layerwise_casting(stored, torch.float32), case.apply)
    off = float((rounded.run_tuned() - case.bare).norm() / case.bare.norm())
    if first and kind == "full":  # its own weights are rounded where they are put
        assert near(case.run(), case.pruned, max(4 * off, 0.3))
    else:
        # A LoRA merged before is rounded with the weight; beside a stored weight it is not.
        exact = kind == "frozen" or not first
        assert near(case.run(), rounded.run(), 0.0 if exact else 0.1)
    shiva_dit.remove(case.model)
    plain = families.made("sd3")
    plain.enable_layerwise_casting(stored, torch.float32)
    with torch.no_grad():
        assert torch.equal(case.run(), families.run(plain, families.arguments("sd3")))


HALF = "scores stay float32: tokens as by scores of the same activations"


@kinds
@cells("bfloat16", "works", HALF)
def test_bfloat16(kind: Kind) -> None:
    _half(torch.bfloat16, kind)


@kinds
@cells("float16", "works", HALF)
def test_float16(kind: Kind) -> None:
    _half(torch.float16, kind)


def _half(dtype: torch.dtype, kind: Kind) -> None:
    case = Case(kind)
    model = case.model.to(dtype)
    case.apply()
    attachment = attachment_of(model)
    assert attachment is not None
    seen: list[tuple[torch.dtype, Tensor]] = []
    hook = attachment.hooks[1]
    scorer = hook.scores

    def scores(x: Tensor, condition: Tensor | None) -> Tensor:
        found = scorer(x, condition)
        seen.append((found.dtype, found))
        return found

    hook.scores = scores
    given = {
        name: value.to(dtype)
        for name, value in families.arguments("sd3").items()
        if name != "timestep"
    }
    chosen = selected(model, lambda: case.run(**given))
    assert seen[0][0] == torch.float32
    best = seen[0][1].topk(chosen[0].shape[1]).indices
    assert torch.equal(chosen[0].sort().values, best.sort().values)
    # Random weights, few bits: tokens at the edge differ from float32's. Measured 0.02 and 0.003.
    assert near(case.run(**given).float(), case.pruned, 0.1)


class QuantisedLinear(torch.nn.Module):
    """A linear layer of 8-bit weights and a scale per row, put in the place of a plain one."""

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / largest
        scaled = weight / scale
        self.register_buffer(
            "weight", (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        )
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, QuantisedLinear(child, dtype))


QUANTISED = "pruned off by what dense is off, within a factor of 4; or an error that says the order"
NOT_AFTER: dict[Any, Outcome] = {
    ("lora", "after"): "refused",
    ("dora", "after"): "refused",
    "full": "refused",
}


@kinds
@cells("Linear layers replaced by int8 ones", NOT_AFTER, QUANTISED, order=True)
def test_int8_weights(first: bool, kind: Kind) -> None:
    _quantised(torch.int8, first, kind)


@kinds
@cells("Linear layers replaced by fp8 ones", NOT_AFTER, QUANTISED, order=True)
def test_fp8_weights(first: bool, kind: Kind) -> None:
    _quantised(torch.float8_e4m3fn, first, kind)


def _quantised(dtype: torch.dtype, first: bool, kind: Kind) -> None:
    case = Case(kind)
    if kind == "full" and first:
        quantise(case.model, dtype)
        with pytest.raises(ValueError, match="doesn't fit this model"):
            case.apply()
        return
    both(first, lambda: quantise(case.model, dtype), case.apply)
    if kind != "frozen" and not first:
        with pytest.raises(RuntimeError, match="was replaced while the adapter's weights"):
            case.run()
        return
    pruned = case.run()
    shiva_dit.remove(case.model)
    dense = case.run()
    off = float((dense - case.bare).norm() / case.bare.norm())
    assert 1e-4 < off < 0.1
    # Some tokens at the edge differ as well.
    assert near(pruned, case.pruned, 4 * off)
    case.apply()
    assert torch.equal(case.run(), pruned)


# --- caches -------------------------------------------------------------------------------------


def cached(config: Any, first: bool, kind: Kind = "frozen") -> tuple[Flux, Any]:
    made = Flux()
    made.pipe.set_progress_bar_config(disable=True)
    model: Any = made.pipe.transformer
    made_for = adapter_of_flux(model, kind)
    both(
        first,
        lambda: model.enable_cache(config),
        lambda: shiva_dit.apply(made.pipe, made_for),
    )
    return made, model


def adapter_of_flux(model: Any, kind: Kind) -> shiva_dit.ShivaAdapter:
    """For the transformer of the tiny Flux pipeline."""
    made = tiny.adapter(model, tiny.from_counts(COUNTS), backbone=kind, lora_rank=3)
    twin = copy.deepcopy(model)
    if kind == "full":
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.1)
    elif kind != "frozen":
        add_adapters_lora(twin, {"r": 3, "lora_alpha": 3, "use_dora": kind == "dora"})
        tiny.fill_lora(twin, PEFT_NAME, seed=7)
    made.backbone_weights = backbone_weights(twin, kind)
    return made


CACHED = "never hit: as without; hit: fewer blocks run"


@kinds
@cells("FirstBlockCache (Flux)", "works", CACHED, order=True)
def test_first_block_cache(first: bool, kind: Kind) -> None:
    _block_cache(lambda hit: FirstBlockCacheConfig(threshold=0.9 if hit else 0.0), first, kind)


@kinds
@cells("MagCache (Flux)", "works", CACHED, order=True)
def test_mag_cache(first: bool, kind: Kind) -> None:
    def config(hit: bool) -> MagCacheConfig:
        return MagCacheConfig(
            num_inference_steps=8,
            mag_ratios=torch.ones(8),
            threshold=0.5 if hit else 0.0,
            retention_ratio=0.1 if hit else 1.0,
        )

    _block_cache(config, first, kind)


@kinds
@cells(
    "torch.compile by blocks, under FirstBlockCache or MagCache",
    "refused",
    "a ValueError that names it",
)
def test_compile_under_a_cache(kind: Kind) -> None:
    configs = {
        "FirstBlockCache": FirstBlockCacheConfig(threshold=0.5),
        "MagCache": MagCacheConfig(num_inference_steps=8, mag_ratios=torch.ones(8)),
    }
    for name, config in configs.items():
        made, model = cached(config, first=True, kind=kind)
        with pytest.raises(ValueError, match=f"{name} can't be compiled"):
            shiva_dit.compile(made.pipe)
        model.disable_cache()
        shiva_dit.compile(made.pipe)


def _block_cache(config: Callable[[bool], Any], first: bool, kind: Kind) -> None:
    plain = Flux()
    plain.pipe.set_progress_bar_config(disable=True)
    dense = plain(False, 8)
    shiva_dit.apply(plain.pipe, adapter_of_flux(plain.pipe.transformer, kind))
    expected = plain(False, 8)
    made, model = cached(config(False), first, kind)
    assert torch.equal(made(False, 8), expected)
    made, model = cached(config(True), first, kind)
    results: list[Tensor] = []
    ran = len(selected(model, lambda: results.append(made(False, 8))))
    assert 0 < ran < 8 * 3
    assert not torch.equal(results[0], expected)
    shiva_dit.remove(made.pipe)
    again = made(False, 8)  # the cache is still on
    assert not torch.equal(again, dense)
    model.disable_cache()
    assert torch.equal(made(False, 8), dense)


@kinds
@cells("TaylorSeer", "refused", "a ValueError that names it", order=True)
def test_taylorseer(first: bool, kind: Kind) -> None:
    _refused(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1), first, kind)


@kinds
@cells("Pyramid Attention Broadcast", "refused", "a ValueError that names it", order=True)
def test_pyramid_attention_broadcast(first: bool, kind: Kind) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1001),
        current_timestep_callback=lambda: 500,
    )
    _refused(config, first, kind)


@kinds
@cells("FasterCache", "refused", "a ValueError that names it", order=True)
def test_faster_cache(first: bool, kind: Kind) -> None:
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
    )
    _refused(config, first, kind)


def _refused(config: Any, first: bool, kind: Kind) -> None:
    def run() -> None:
        made, _ = cached(config, first, kind)
        made(False)

    with pytest.raises(ValueError, match=r"disable_cache\(\) first"):
        run()


# --- compilation, copies, threads ---------------------------------------------------------------


@classes(but=NOT_RECOMPUTING)
@cells("Gradient checkpointing", "works", "the same gradients, to the bit", order=True)
def test_gradient_checkpointing(first: bool, family: str, kind: Kind) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model: Any = families.made(family)
        made = adapter(model, kind, family)
        both(
            first,
            lambda: model.enable_gradient_checkpointing() if checkpointing else None,
            lambda: shiva_dit.apply(model, made),
        )
        families.run(model, families.arguments(family)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


MERGED = [
    *((kind, "merged") for kind in KINDS),
    *((kind, "beside") for kind in ("lora", "dora")),
]


@pytest.mark.slow
@sampled("kind, how", MERGED, lambda cell: cell == ("dora", "beside"))
@cells("torch.compile, by blocks", "works", "as eager, within 1e-5", order=True)
def test_compiled_blocks(first: bool, kind: Kind, how: str) -> None:
    made, merge = Flux(), how == "merged"
    made.pipe.set_progress_bar_config(disable=True)
    model: Any = made.pipe.transformer
    made_for = adapter_of_flux(model, kind)
    dense = made(True)
    shiva_dit.apply(made.pipe, made_for, merge=merge)
    expected = made(True)
    shiva_dit.remove(made.pipe)

    def compile_and_run() -> None:
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True, recompile_limit=64)
        made(True)  # graphs of what is on now must not serve what comes

    both(
        first,
        compile_and_run,
        lambda: shiva_dit.apply(made.pipe, made_for, merge=merge),
    )
    assert near(made(True), expected, 1e-5)
    with shiva_dit.disabled(made.pipe):
        assert near(made(True), dense, 1e-5)
    assert near(made(True), expected, 1e-5)
    shiva_dit.remove(made.pipe)
    assert near(made(True), dense, 1e-5)


@pytest.mark.slow
@sampled("kind", KINDS, lambda kind: kind == "lora")
@cells("torch.compile, the whole model", "works", "as eager, within 1e-5", order=True)
def test_a_compiled_model(first: bool, kind: Kind) -> None:
    case = Case(kind)
    both(first, lambda: case.model.compile(backend="aot_eager"), case.apply)
    assert near(case.run(), case.pruned, 1e-5)


@classes()
@cells("copy.deepcopy", "refused", "a RuntimeError that says: remove, copy, apply to both")
def test_a_deep_copy(family: str, kind: Kind) -> None:
    case = Case(kind, family)
    case.apply()
    with pytest.raises(RuntimeError, match=r"cannot be deep-copied.*shiva_dit\.remove"):
        copy.deepcopy(case.model)


@kinds
@cells("pickle, torch.save of the whole model", "refused", "a RuntimeError that says what to do")
def test_pickling(kind: Kind) -> None:
    case = Case(kind)
    case.apply()
    with pytest.raises(RuntimeError, match=r"cannot be pickled.*save_pretrained"):
        pickle.dumps(tiny.pipeline(case.model))
    shiva_dit.remove(case.model)
    assert pickle.dumps(case.model)


@classes()
@cells("Saving and loading the model while applied", "works", "the saved one is bare, to the bit")
def test_saving_while_applied(family: str, kind: Kind, tmp_path: Path) -> None:
    case = Case(kind, family)
    case.apply()
    case.model.save_pretrained(tmp_path)
    assert torch.equal(case.run(), case.pruned)
    twin = copy.copy(case)
    twin.model = type(case.model).from_pretrained(tmp_path)
    assert torch.equal(twin.run(), case.bare)
    twin.apply()
    assert torch.equal(twin.run(), case.pruned)


def in_two_processes(work: Callable[..., None], *given: Any) -> None:
    """They are forked from a process that has imported all, once for all tests."""
    server()
    torch.multiprocessing.start_processes(work, args=given, nprocs=2, start_method="forkserver")


def _sharded(rank: int, folder: str, first: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for kind in KINDS:
        results: dict[str, Any] = {}
        case = Case(kind)

        def shard(model: Any = case.model) -> None:
            for block in model.transformer_blocks:
                fully_shard(block)
            fully_shard(model)

        try:
            both(first, shard, case.apply)
            results["pruned"] = case.run()
            shiva_dit.remove(case.model)
            results["bare"] = case.run()
        except (RuntimeError, ValueError) as error:
            results["error"] = f"{type(error).__name__}: {error}"
        torch.save(results, f"{folder}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@cells(
    "FSDP2, two processes",
    {
        ("full", "before"): "refused",
        ("lora", "after"): "works; can't be removed",
        ("dora", "after"): "works; can't be removed",
        ("full", "after"): "works; can't be removed",
    },
    "as one process: to the bit, a LoRA beside sharded layers within 1e-5; or an error",
    order=True,
)
def test_fsdp2(first: bool, tmp_path: Path) -> None:
    given = str(tmp_path), first, torch.get_num_threads()
    in_two_processes(_sharded, *given)
    for kind in KINDS:
        case = Case(kind)
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt")
            if kind == "full" and first:
                assert "sharded" in found["error"]
                continue
            exact = kind == "frozen" or not first
            assert near(found["pruned"], case.pruned, 0.0 if exact else 1e-5)
            if kind == "frozen" or first:
                assert torch.equal(found["bare"], case.bare)
            else:
                assert "can't be given back" in found["error"]
                assert "merge=False" in found["error"]


def split(model: Any, config: Any) -> None:
    """diffusers' `enable_parallelism` on processors, where 0.42.1 refuses or fails to run it.

    It divides by the number of accelerators, and has CPUs on no list for tensor parallelism.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        patch.setattr(tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",))
        model.enable_parallelism(config=config)


def _heads_apart(rank: int, folder: str, first: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for kind in KINDS:
        results: dict[str, Any] = {}
        case = Case(kind, "flux")
        try:
            both(first, lambda: split(case.model, TensorParallelConfig(tp_degree=2)), case.apply)  # noqa: B023
            results["chosen"] = selected(case.model, lambda: results.update(pruned=case.run()))  # noqa: B023
            shiva_dit.remove(case.model)
            results["bare"] = case.run()
        except (RuntimeError, ValueError) as error:
            results["error"] = f"{type(error).__name__}: {error}"
        torch.save(results, f"{folder}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@cells(
    "Tensor parallelism (Flux), two processes",
    {
        "lora": "refused",
        ("lora", "after"): "works; can't be removed",
        "dora": "refused",
        ("dora", "after"): "works; can't be removed",
        "full": "refused",
        ("full", "after"): "works; can't be removed",
    },
    "as one process, within 1e-6: the same tokens; or an error",
    order=True,
)
def test_tensor_parallelism(first: bool, tmp_path: Path) -> None:
    given = str(tmp_path), first, torch.get_num_threads()
    in_two_processes(_heads_apart, *given)
    for kind in KINDS:
        case = Case(kind, "flux")
        case.apply()
        chosen = selected(case.model, case.run)
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt")
            if kind != "frozen" and first:
                advice = "apply to the plain model first" if kind == "full" else "can't lie beside"
                assert advice in found["error"]
                continue
            assert all(map(torch.equal, found["chosen"], chosen))
            # Layers sum the halves of their inputs' channels apart: 6e-7 at most was measured.
            assert near(found["pruned"], case.pruned, 1e-6)
            if kind == "frozen":
                assert near(found["bare"], case.bare, 1e-6)
            else:
                assert "can't be given back" in found["error"]


def even_text(family: str) -> dict[str, Tensor]:
    """Of arguments those that hold text, without a token that two processes can't share."""
    given, names = families.arguments(family), ("encoder_hidden_states", "encoder_attention_mask")
    names = (*names, "encoder_hidden_states_mask")
    found = {name: given[name][:, :-1] for name in names if given.get(name) is not None}
    return found | {name: given[name][..., :-1, :] for name in {"txt_ids"} & given.keys()}


def _tokens_apart(rank: int, folder: str, first: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    text = even_text("flux")
    for kind in KINDS:
        case, found = Case(kind, "flux"), dict[str, Any]()

        def run(case: Case = case, found: dict[str, Any] = found) -> None:
            found["pruned"] = case.run(**text)

        both(
            first,
            lambda: split(case.model, ContextParallelConfig(ulysses_degree=2)),  # noqa: B023
            lambda: case.apply(multiple=2),  # noqa: B023
        )
        found["chosen"] = selected(case.model, run)
        shiva_dit.remove(case.model)
        found["bare"] = case.run(**text)
        torch.save(found, f"{folder}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@cells(
    "Context parallelism (Flux, Ulysses), two processes",
    "works",
    "as one process, within 1e-5: the same tokens, half of them in each",
    order=True,
)
def test_context_parallelism(first: bool, tmp_path: Path) -> None:
    given = str(tmp_path), first, torch.get_num_threads()
    in_two_processes(_tokens_apart, *given)
    text = even_text("flux")
    for kind in KINDS:
        case, pruned = Case(kind, "flux"), list[Tensor]()
        bare = case.run(**text)
        case.apply(multiple=2)
        chosen = selected(case.model, lambda: pruned.append(case.run(**text)))  # noqa: B023
        assert all(tokens.shape[1] % 2 == 0 for tokens in chosen)
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt")
            assert all(map(torch.equal, found["chosen"], chosen))
            # Products of half as many rows round otherwise: 1.1e-6 at most was measured (LoRA).
            assert near(found["pruned"], pruned[0], 1e-5)
            assert near(found["bare"], bare, 1e-5)


SAMPLES = (0.5, -1.5)
"""Of two processes: what each multiplies its latents by."""


def _gradients(model: Any, called: Any, factor: float) -> dict[str, Tensor]:
    """Of a training loss of one process's own samples, by name of the model's parameter."""
    given = families.arguments("sd3")
    model.requires_grad_(True).zero_grad()
    families.run(
        called, {**given, "hidden_states": factor * given["hidden_states"]}
    ).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _distributed(rank: int, folder: str, first: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for kind in KINDS:
        case = Case(kind)
        wrapped: list[Any] = []

        def wrap(model: Any = case.model, to: list[Any] = wrapped) -> None:
            to.append(DistributedDataParallel(model))

        both(first, wrap, case.apply)
        given = families.arguments("sd3")
        with torch.no_grad():
            results: dict[str, Any] = {"pruned": families.run(wrapped[0], given)}
        results["gradients"] = _gradients(case.model, wrapped[0], SAMPLES[rank])
        shiva_dit.remove(wrapped[0])
        results["bare"] = case.run()
        torch.save(results, f"{folder}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@cells(
    "DistributedDataParallel, two processes",
    "works",
    "as one process, to the bit; gradients are the mean of both processes', within 1e-6",
    order=True,
)
def test_distributed(first: bool, tmp_path: Path) -> None:
    given = str(tmp_path), first, torch.get_num_threads()
    in_two_processes(_distributed, *given)
    for kind in KINDS:
        case = Case(kind)
        case.apply()
        one, other = (_gradients(case.model, case.model, factor) for factor in SAMPLES)
        assert any(not near(one[name], other[name], 0.1) for name in one)
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt")
            assert torch.equal(found["pruned"], case.pruned)
            assert torch.equal(found["bare"], case.bare)
            assert found["gradients"].keys() == one.keys()
            for name, gradient in found["gradients"].items():
                # Both halve and add in float32: two roundings of 6e-8 at most.
                assert near(gradient, (one[name] + other[name]) / 2, 1e-6)


@kinds
@cells("Two pipelines with an adapter each", "works", "each as alone, to the bit")
def test_two_pipelines_in_one_process(kind: Kind) -> None:
    one, other = Case(kind), Case(kind)
    other.made = adapter(other.model, kind, hidden=4)
    other.apply()
    alone = other.run()
    assert not torch.equal(alone, one.pruned)
    one.apply()
    for _ in range(2):
        assert torch.equal(one.run(), one.pruned)
        assert torch.equal(other.run(), alone)


@kinds
@cells("One adapter on two models", "works", "each as alone, to the bit")
def test_one_adapter_on_two_models(kind: Kind) -> None:
    one, other = Case(kind), Case(kind)
    shiva_dit.apply(one.model, one.made)
    shiva_dit.apply(other.model, one.made)
    assert torch.equal(one.run(), one.pruned)
    assert torch.equal(other.run(), one.pruned)
    shiva_dit.remove(one.model)
    assert torch.equal(one.run(), one.bare)
    assert torch.equal(other.run(), one.pruned)


@kinds
@cells("Two threads, a model each", "works", "each as alone, to the bit")
def test_two_threads_with_a_model_each(kind: Kind) -> None:
    cases = [Case(kind), Case(kind)]
    results: list[list[Tensor]] = [[], []]

    def serve(index: int) -> None:
        results[index] += [cases[index].run() for _ in range(8)]

    for case in cases:
        case.apply()
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case, found in zip(cases, results, strict=True):
        assert len(found) == 8
        assert all(torch.equal(result, case.pruned) for result in found)


@kinds
@cells("Two threads on one model at once", "refused", "a RuntimeError; the first goes on unharmed")
def test_two_threads_on_one_model(kind: Kind) -> None:
    case = Case(kind)
    case.apply()
    attachment = attachment_of(case.model)
    assert attachment is not None
    errors: list[str] = []

    def other() -> None:
        try:
            case.run()
        except RuntimeError as error:
            errors.append(str(error))

    def meanwhile(block: int, chosen: Tensor) -> None:
        if block == 1:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    attachment.forwards.observer = meanwhile
    assert torch.equal(case.run(), case.pruned)
    assert len(errors) == 1
    assert "serves one forward at a time" in errors[0]


# --- the document -------------------------------------------------------------------------------


def table() -> str:
    """A row for everything, what holds for each kind of backbone, and how that is known."""
    rows: dict[str, list[Cell]] = {}
    for cell in CELLS:
        rows.setdefault(cell.what, []).append(cell)
    lines = [["", *KINDS, "classes", "what is asserted"]]
    for what, found in rows.items():
        columns = []
        for kind in KINDS:
            outcomes = {cell.when: cell.outcome for cell in found if cell.kind == kind}
            if len(set(outcomes.values())) == 1:
                columns.append(next(iter(outcomes.values())))
            else:
                columns.append(", ".join(f"{when}: {each}" for when, each in outcomes.items()))
        lines.append([what, *columns, str(ASKED.get(found[0].test, 1)), found[0].check])
    return markdown_rows(lines)


def document() -> str:
    """docs/composition.md with the table of these tests."""
    text = DOCUMENT.read_text(encoding="utf-8")
    start, end = "<!-- composition -->\n", "<!-- end composition -->"
    head, tail = text.split(start)[0], text.split(end)[1]
    return f"{head}{start}{table()}\n{end}{tail}"


def test_the_document_says_what_these_tests_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), (
        "run `python -m tests.test_composition`"
    )


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
