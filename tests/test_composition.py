"""The adapter beside everything else that users put on a model; docs/composition.md is made here.

A cell says "works" where a test holds a value against one made without the neighbour or without
the adapter, and "refused" where a test sees a clear error. `python -m tests.test_composition`
writes the table.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FirstBlockCacheConfig,
    FluxControlNetModel,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SD3ControlNetModel,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import FasterCacheConfig
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import shiva_dit
from shiva_dit.models.attach import attachment_of
from shiva_dit.report import markdown_rows
from tests import families, tiny
from tests.test_pipelines import Flux

DOCUMENT = Path(__file__).parents[1] / "docs" / "composition.md"
COUNTS = [[64, 5, 30, 17], [64, 33, 2, 48], [64, 63, 20, 9]]
Outcome = Literal["works", "refused"]
When = Literal["before", "after", "beside"]


@dataclass(frozen=True)
class Cell:
    what: str
    when: When
    outcome: Outcome
    check: str


CELLS: list[Cell] = []


def cells(
    what: str, outcome: Outcome, check: str, *, order: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Note what a test shows; with `order` it takes `first`: whether the neighbour comes first."""

    def note(test: Callable[..., None]) -> Callable[..., None]:
        for when in ("before", "after") if order else ("beside",):
            CELLS.append(Cell(what, when, outcome, check))  # type: ignore[arg-type]
        if not order:
            return test
        return pytest.mark.parametrize("first", [True, False], ids=["before", "after"])(test)

    return note


def adapter(model: Any, **options: Any) -> shiva_dit.ShivaAdapter:
    return tiny.adapter(model, tiny.from_counts(COUNTS), **options)


def both(first: bool, put: Callable[[], object], apply: Callable[[], object]) -> None:
    """The neighbour and the adapter, in either order."""
    for step in (put, apply) if first else (apply, put):
        step()


def selected(model: Any, run: Callable[[], object]) -> list[Tensor]:
    """The tokens that were chosen, in the order in which blocks ran."""
    found: list[Tensor] = []
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.observer = lambda block, chosen: found.append(chosen)
    run()
    attachment.observer = None
    return found


class Case:
    """A tiny SD3 and what it gives bare and pruned, with nothing else on it."""

    def __init__(self) -> None:
        self.model: Any = tiny.sd3()
        self.made = adapter(self.model)
        self.bare = self.run()
        self.apply()
        self.pruned = self.run()
        shiva_dit.remove(self.model)

    def apply(self) -> None:
        shiva_dit.apply(self.model, self.made)

    def run(self, **options: Any) -> Tensor:
        return tiny.run(self.model, {**tiny.inputs(), **options})


def near(found: Tensor, expected: Tensor, bound: float) -> bool:
    return bool((found - expected).norm() <= bound * expected.norm())


# --- LoRA ---------------------------------------------------------------------------------------


def add_lora(model: Any, name: str, seed: int) -> None:
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name=name)
    tiny.fill_lora(model, name, seed)


def with_lora(*names: str) -> tuple[Tensor, Tensor]:
    """Bare and pruned results of a model whose LoRAs were there before all."""
    model: Any = tiny.sd3()
    for seed, name in enumerate(names):
        add_lora(model, name, seed=11 + seed)
    model.set_adapter(list(names))
    bare = tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, adapter(model))
    return bare, tiny.run(model, tiny.inputs())


@cells("LoRA", "works", "as with the LoRA there from the start, to the bit", order=True)
def test_a_lora_in_either_order(first: bool) -> None:
    case, (bare, pruned) = Case(), with_lora("mine")
    both(first, lambda: add_lora(case.model, "mine", seed=11), case.apply)
    assert torch.equal(case.run(), pruned)
    assert not torch.equal(pruned, case.pruned)
    shiva_dit.remove(case.model)
    assert torch.equal(case.run(), bare)


@cells("Several LoRAs, one swapped for another", "works", "as with the other from the start")
def test_loras_are_swapped_while_applied() -> None:
    case, (_, two), (_, second) = Case(), with_lora("mine", "other"), with_lora("other")
    add_lora(case.model, "mine", seed=11)
    case.apply()
    add_lora(case.model, "other", seed=12)
    case.model.set_adapter(["mine", "other"])
    assert torch.equal(case.run(), two)
    case.model.delete_adapters("mine")
    tiny.fill_lora(case.model, "other", seed=11)  # as `with_lora` filled the only one
    assert torch.equal(case.run(), second)


@cells("LoRA, hot-swapped in place", "works", "as with the other from the start, to the bit")
def test_a_lora_is_hot_swapped_while_applied(tmp_path: Path) -> None:
    case, (bare, pruned) = Case(), with_lora("mine")
    donor: Any = tiny.sd3()
    add_lora(donor, "mine", seed=11)
    donor.save_lora_adapter(tmp_path, adapter_name="mine")
    add_lora(case.model, "mine", seed=12)
    case.apply()
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


@cells("LoRA, fused and unfused again", "works", "fused as unfused, within 1e-5", order=True)
def test_a_fused_lora(first: bool) -> None:
    case, (bare, pruned) = Case(), with_lora("mine")
    add_lora(case.model, "mine", seed=11)
    both(first, case.model.fuse_lora, case.apply)
    assert near(case.run(), pruned, 1e-5)  # fused weights round otherwise; same tokens
    shiva_dit.remove(case.model)
    assert near(case.run(), bare, 1e-5)
    case.apply()
    case.model.unfuse_lora()
    assert near(case.run(), pruned, 1e-5)


# --- further inputs -----------------------------------------------------------------------------


def permuted(model: Any, run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A run whose blocks gather all tokens, each in a random order of its own."""
    with monkeypatch.context() as patch:
        families.force_permutation(model, patch)
        result = run()
    shiva_dit.remove(model)
    return result


@cells("ControlNet (SD3)", "works", "ratio 1 to the bit; all tokens in random order within 2e-6")
def test_a_controlnet_on_sd3(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    net = SD3ControlNetModel.from_transformer(
        case.model, num_layers=2, num_extra_conditioning_channels=0
    )
    tiny.randomize(net, seed=21)
    condition = torch.randn(2, tiny.CHANNELS, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        (residuals,) = net.eval()(
            **tiny.inputs(), controlnet_cond=condition, conditioning_scale=2.0, return_dict=False
        )
    given = {"block_controlnet_hidden_states": residuals}
    bare = case.run(**given)
    assert not near(bare, case.bare, 1e-2)
    assert near(permuted(case.model, lambda: case.run(**given), monkeypatch), bare, 2e-6)
    shiva_dit.apply(case.model, case.made, keep_ratio=1.0)
    assert torch.equal(case.run(**given), bare)
    case.apply()
    assert not near(case.run(**given), case.pruned, 1e-2)


@cells("ControlNet (Flux)", "works", "ratio 1 to the bit; all tokens in random order within 2e-6")
def test_a_controlnet_on_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = families.made("flux"), families.arguments("flux")
    net = FluxControlNetModel.from_transformer(
        model, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    tiny.randomize(net, seed=21)
    condition = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        double, single = net.eval()(**given, controlnet_cond=condition, return_dict=False)
        further = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}

        def run() -> Tensor:
            return families.run(model, {**given, **further})

        bare = run()
        assert not near(bare, families.run(model, given), 1e-2)
        assert near(permuted(model, run, monkeypatch), bare, 2e-6)
        shiva_dit.apply(model, tiny.adapter(model), keep_ratio=1.0)
        assert torch.equal(run(), bare)


@cells("IP-Adapter (SD3)", "works", "ratio 1 to the bit; all tokens in random order within 2e-6")
def test_an_ip_adapter_on_sd3(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    processors = {}
    for name in case.model.attn_processors:
        made = SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=32, ip_hidden_states_dim=12, head_dim=8, timesteps_emb_dim=10, scale=1.0
        )
        tiny.randomize(made, seed=5)
        processors[name] = made
    case.model.set_attn_processor(processors)
    draw = torch.Generator().manual_seed(4)
    given = {
        "joint_attention_kwargs": {
            "ip_hidden_states": torch.randn(2, 5, 12, generator=draw),
            "temb": torch.randn(2, 10, generator=draw),
        }
    }
    bare = case.run(**given)
    assert not near(bare, case.bare, 1e-3)
    assert near(permuted(case.model, lambda: case.run(**given), monkeypatch), bare, 2e-6)
    shiva_dit.apply(case.model, case.made, keep_ratio=1.0)
    assert torch.equal(case.run(**given), bare)
    case.apply()
    assert not near(case.run(**given), case.pruned, 1e-3)


@cells("IP-Adapter (Flux)", "works", "ratio 1 to the bit; all tokens in random order within 2e-6")
def test_an_ip_adapter_on_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = families.made("flux"), families.arguments("flux")
    processors = dict(model.attn_processors)
    for name in processors:
        if name.startswith("transformer_blocks"):
            made = FluxIPAdapterAttnProcessor(32, 12, num_tokens=(5,))
            tiny.randomize(made, seed=5)
            processors[name] = made
    plain = families.run(model, given).detach()
    model.set_attn_processor(processors)
    image = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(4))
    given["joint_attention_kwargs"] = {"ip_hidden_states": [image]}
    with torch.no_grad():
        bare = families.run(model, given)
        assert not near(bare, plain, 1e-3)
        result = permuted(model, lambda: families.run(model, given), monkeypatch)
        assert near(result, bare, 2e-6)
        shiva_dit.apply(model, tiny.adapter(model), keep_ratio=1.0)
        assert torch.equal(families.run(model, given), bare)


# --- memory and numbers -------------------------------------------------------------------------


def offload(kind: str, pipe: Any) -> None:
    cpu = torch.device("cpu")
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":
        cpu_offload(pipe.transformer, cpu, offload_buffers=True)
    elif kind == "blocks":
        pipe.transformer.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1)
    else:
        pipe.transformer.enable_group_offload(cpu, cpu, "leaf_level")


@cells("Model offload", "works", "the same images, to the bit, twice", order=True)
def test_model_offload(first: bool) -> None:
    _offloaded("model", first)


@cells("Sequential offload", "works", "the same images, to the bit, twice", order=True)
def test_sequential_offload(first: bool) -> None:
    _offloaded("sequential", first)


@cells("Group offload, by blocks", "works", "the same images, to the bit, twice", order=True)
def test_group_offload_by_blocks(first: bool) -> None:
    _offloaded("blocks", first)


@cells("Group offload, by layers", "works", "the same images, to the bit, twice", order=True)
def test_group_offload_by_layers(first: bool) -> None:
    _offloaded("layers", first)


def _offloaded(kind: str, first: bool) -> None:
    case = Case()
    pipe = tiny.pipeline(case.model)
    bare = tiny.generate(pipe, 5.0)
    shiva_dit.apply(pipe, case.made)
    pruned = tiny.generate(pipe, 5.0)
    shiva_dit.remove(pipe)
    both(first, lambda: offload(kind, pipe), lambda: shiva_dit.apply(pipe, case.made))
    for _ in range(2):
        assert torch.equal(tiny.generate(pipe, 5.0), pruned)
    shiva_dit.remove(pipe)
    assert torch.equal(tiny.generate(pipe, 5.0), bare)


@cells("Layerwise casting (fp8)", "works", "as on weights rounded to fp8, to the bit", order=True)
def test_layerwise_casting(first: bool) -> None:
    stored = torch.float8_e4m3fn
    rounded = Case()
    skipped = "pos_embed", "norm", "proj_out"  # what diffusers leaves as it is
    for name, module in rounded.model.named_modules():
        if isinstance(module, torch.nn.Linear) and not any(s in name for s in skipped):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(stored).float()
    rounded.apply()
    case = Case()
    both(
        first,
        lambda: case.model.enable_layerwise_casting(stored, torch.float32),
        case.apply,
    )
    assert torch.equal(case.run(), rounded.run())


@cells("bfloat16", "works", "scores stay float32: tokens as by scores of the same activations")
def test_bfloat16() -> None:
    _half(torch.bfloat16)


@cells("float16", "works", "scores stay float32: tokens as by scores of the same activations")
def test_float16() -> None:
    _half(torch.float16)


def _half(dtype: torch.dtype) -> None:
    case = Case()
    model = case.model.to(dtype)
    shiva_dit.apply(model, case.made)
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
    given = {name: value.to(dtype) for name, value in tiny.inputs().items() if name != "timestep"}
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


QUANTISED = "pruned off by what dense is off, within a factor of 4"


@cells("Linear layers replaced by int8 ones", "works", QUANTISED, order=True)
def test_int8_weights(first: bool) -> None:
    _quantised(torch.int8, first)


@cells("Linear layers replaced by fp8 ones", "works", QUANTISED, order=True)
def test_fp8_weights(first: bool) -> None:
    _quantised(torch.float8_e4m3fn, first)


def _quantised(dtype: torch.dtype, first: bool) -> None:
    case = Case()
    both(first, lambda: quantise(case.model, dtype), case.apply)
    pruned = case.run()
    shiva_dit.remove(case.model)
    dense = case.run()
    off = float((dense - case.bare).norm() / case.bare.norm())
    assert 1e-4 < off < 0.05
    # Some tokens at the edge differ as well.
    assert near(pruned, case.pruned, 4 * off)
    case.apply()
    assert torch.equal(case.run(), pruned)


# --- caches -------------------------------------------------------------------------------------


def cached(config: Any, first: bool) -> tuple[Flux, Any]:
    made = Flux()
    made.pipe.set_progress_bar_config(disable=True)
    model: Any = made.pipe.transformer
    both(
        first,
        lambda: model.enable_cache(config),
        lambda: shiva_dit.apply(made.pipe, adapter(model)),
    )
    return made, model


@cells("FirstBlockCache", "works", "never hit: as without; hit: fewer blocks run", order=True)
def test_first_block_cache(first: bool) -> None:
    _block_cache(lambda hit: FirstBlockCacheConfig(threshold=0.9 if hit else 0.0), first)


@cells("MagCache", "works", "never hit: as without; hit: fewer blocks run", order=True)
def test_mag_cache(first: bool) -> None:
    def config(hit: bool) -> MagCacheConfig:
        return MagCacheConfig(
            num_inference_steps=8,
            mag_ratios=torch.ones(8),
            threshold=0.5 if hit else 0.0,
            retention_ratio=0.1 if hit else 1.0,
        )

    _block_cache(config, first)


@cells(
    "torch.compile by blocks, under FirstBlockCache or MagCache",
    "refused",
    "a ValueError that names it",
)
def test_compile_under_a_cache() -> None:
    configs = {
        "FirstBlockCache": FirstBlockCacheConfig(threshold=0.5),
        "MagCache": MagCacheConfig(num_inference_steps=8, mag_ratios=torch.ones(8)),
    }
    for name, config in configs.items():
        made, model = cached(config, first=True)
        with pytest.raises(ValueError, match=f"{name} can't be compiled"):
            shiva_dit.compile(made.pipe)
        model.disable_cache()
        shiva_dit.compile(made.pipe)


def _block_cache(config: Callable[[bool], Any], first: bool) -> None:
    plain = Flux()
    plain.pipe.set_progress_bar_config(disable=True)
    dense = plain(False, 8)
    shiva_dit.apply(plain.pipe, adapter(plain.pipe.transformer))
    expected = plain(False, 8)
    made, model = cached(config(False), first)
    assert torch.equal(made(False, 8), expected)
    made, model = cached(config(True), first)
    results: list[Tensor] = []
    ran = len(selected(model, lambda: results.append(made(False, 8))))
    assert 0 < ran < 8 * 3
    assert not torch.equal(results[0], expected)
    shiva_dit.remove(made.pipe)
    again = made(False, 8)  # the cache is still on
    assert not torch.equal(again, dense)
    model.disable_cache()
    assert torch.equal(made(False, 8), dense)


@cells("TaylorSeer", "refused", "a ValueError that names it", order=True)
def test_taylorseer(first: bool) -> None:
    _refused(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1), first)


@cells("Pyramid Attention Broadcast", "refused", "a ValueError that names it", order=True)
def test_pyramid_attention_broadcast(first: bool) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1001),
        current_timestep_callback=lambda: 500,
    )
    _refused(config, first)


@cells("FasterCache", "refused", "a ValueError that names it", order=True)
def test_faster_cache(first: bool) -> None:
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
    )
    _refused(config, first)


def _refused(config: Any, first: bool) -> None:
    def run() -> None:
        made, _ = cached(config, first)
        made(False)

    with pytest.raises(ValueError, match=r"disable_cache\(\) first"):
        run()


@cells("Context parallelism", "refused", "a ValueError that names it", order=True)
def test_context_parallelism(first: bool) -> None:
    """What diffusers records on a model; the processes themselves are not needed."""
    case = Case()
    parallel = type("ParallelConfig", (), {"context_parallel_config": object()})()

    def run() -> None:
        both(first, lambda: setattr(case.model, "_parallel_config", parallel), case.apply)
        case.run()

    with pytest.raises(ValueError, match="context parallelism splits the tokens"):
        run()


# --- compilation, copies, threads ---------------------------------------------------------------


@cells("Gradient checkpointing", "works", "the same gradients, to the bit", order=True)
def test_gradient_checkpointing(first: bool) -> None:
    def gradient(checkpointing: bool) -> Tensor:
        model: Any = tiny.sd3()
        both(
            first,
            lambda: model.enable_gradient_checkpointing() if checkpointing else None,
            lambda: shiva_dit.apply(model, adapter(model)),
        )
        model(**tiny.inputs()).sample.square().sum().backward()
        return model.transformer_blocks[2].ff.net[2].weight.grad

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.slow
@cells("torch.compile, by blocks", "works", "as eager, within 1e-5", order=True)
def test_compiled_blocks(first: bool) -> None:
    made = Flux()
    made.pipe.set_progress_bar_config(disable=True)
    model: Any = made.pipe.transformer
    made_for = adapter(model)
    shiva_dit.apply(made.pipe, made_for)
    expected = made(True)
    shiva_dit.remove(made.pipe)
    both(
        first,
        lambda: model.compile_repeated_blocks(backend="aot_eager", fullgraph=True),
        lambda: shiva_dit.apply(made.pipe, made_for),
    )
    assert near(made(True), expected, 1e-5)


@pytest.mark.slow
@cells("torch.compile, the whole model", "works", "as eager, within 1e-5", order=True)
def test_a_compiled_model(first: bool) -> None:
    case = Case()
    both(first, lambda: case.model.compile(backend="aot_eager"), case.apply)
    assert near(case.run(), case.pruned, 1e-5)


@cells("copy.deepcopy", "refused", "a RuntimeError that says: remove, copy, apply to both")
def test_a_deep_copy() -> None:
    case = Case()
    case.apply()
    with pytest.raises(RuntimeError, match=r"cannot be deep-copied.*shiva_dit\.remove"):
        copy.deepcopy(case.model)


@cells("pickle, torch.save of the whole model", "refused", "a RuntimeError that says what to do")
def test_pickling() -> None:
    case = Case()
    case.apply()
    with pytest.raises(RuntimeError, match=r"cannot be pickled.*save_pretrained"):
        pickle.dumps(tiny.pipeline(case.model))
    shiva_dit.remove(case.model)
    assert pickle.dumps(case.model)


@cells("Saving and loading the model while applied", "works", "the saved one is bare, to the bit")
def test_saving_while_applied(tmp_path: Path) -> None:
    case = Case()
    case.apply()
    case.model.save_pretrained(tmp_path)
    twin = type(case.model).from_pretrained(tmp_path)
    assert torch.equal(tiny.run(twin, tiny.inputs()), case.bare)
    shiva_dit.apply(twin, case.made)
    assert torch.equal(tiny.run(twin, tiny.inputs()), case.pruned)


def _sharded(rank: int, folder: str, first: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    model: Any = tiny.sd3()

    def shard() -> None:
        for block in model.transformer_blocks:
            fully_shard(block)
        fully_shard(model)

    both(first, shard, lambda: shiva_dit.apply(model, adapter(model)))
    torch.save(tiny.run(model, tiny.inputs()), f"{folder}/{rank}.pt")
    shiva_dit.remove(model)
    torch.save(tiny.run(model, tiny.inputs()), f"{folder}/{rank}-bare.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@cells("FSDP2, two processes", "works", "as one process, to the bit", order=True)
def test_fsdp2(first: bool, tmp_path: Path) -> None:
    case = Case()
    given = str(tmp_path), first, torch.get_num_threads()
    torch.multiprocessing.spawn(_sharded, args=given, nprocs=2)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), case.pruned)
        assert torch.equal(torch.load(tmp_path / f"{rank}-bare.pt"), case.bare)


@cells("Two pipelines with an adapter each", "works", "each as alone, to the bit")
def test_two_pipelines_in_one_process() -> None:
    one, other = Case(), Case()
    other.made = adapter(other.model, hidden=4)
    other.apply()
    alone = other.run()
    assert not torch.equal(alone, one.pruned)
    one.apply()
    for _ in range(2):
        assert torch.equal(one.run(), one.pruned)
        assert torch.equal(other.run(), alone)


@cells("One adapter on two models", "works", "each as alone, to the bit")
def test_one_adapter_on_two_models() -> None:
    one, other = Case(), Case()
    shiva_dit.apply(one.model, one.made)
    shiva_dit.apply(other.model, one.made)
    assert torch.equal(one.run(), one.pruned)
    assert torch.equal(other.run(), one.pruned)


@cells("Two threads, a model each", "works", "each as alone, to the bit")
def test_two_threads_with_a_model_each() -> None:
    cases = [Case(), Case()]
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


@cells("Two threads on one model at once", "refused", "a RuntimeError; the first goes on unharmed")
def test_two_threads_on_one_model() -> None:
    case = Case()
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

    attachment.observer = meanwhile
    assert torch.equal(case.run(), case.pruned)
    assert len(errors) == 1
    assert "serves one forward at a time" in errors[0]


# --- the document -------------------------------------------------------------------------------


def table() -> str:
    """A row for everything, what holds before and after, and how that is known."""
    rows: dict[str, dict[str, Cell]] = {}
    for cell in CELLS:
        rows.setdefault(cell.what, {})[cell.when] = cell
    lines = [["", "put on before", "put on after", "what is asserted"]]
    for what, found in rows.items():
        any_cell = next(iter(found.values()))
        beside = found.get("beside")
        outcomes = [(beside or found[when]).outcome for when in ("before", "after")]
        lines.append([what, *outcomes, any_cell.check])
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
