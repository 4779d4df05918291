"""Quantised models, single files and attention backends beside an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    GGUFQuantizationConfig,
    QuantoConfig,
    SDNQConfig,
    TorchAoConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from safetensors.torch import save_file
from torch import Tensor

import shiva_dit
from shiva_dit.models.families import model_spec
from tests import families
from tests.beside import Note, tell
from tests.matrix import sampled
from tests.test_composition import adapter, near, selected

# Before it is imported: else it compiles at every new shape, and raises dynamo's limits for all.
os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")

AMONG = "sd3", "flux", "z-image", "pixart-sigma", "wan"
"""Joint blocks, double and single ones, one sequence, cross-attention, videos."""


def torchao(kind: str) -> Any:
    return TorchAoConfig(getattr(import_module("torchao.quantization"), kind)())


CONFIGS: dict[str, Callable[[], Any]] = {
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao fp8": lambda: torchao("Float8WeightOnlyConfig"),
    "quanto int8": lambda: QuantoConfig(weights_dtype="int8"),
    "SDNQ int8": lambda: SDNQConfig(weights_dtype="int8", minimum_allowed_numel=1),
}


def loaded(how: str, family: str, folder: Path) -> Any:
    """A model in fewer bits, as its users load or make it."""
    model: Any = families.made(family)
    if how in BY_HAND:
        return by_hand(model, BY_HAND[how])
    model.save_pretrained(folder)
    kind: Any = type(model)
    if how == "GGUF Q8_0":
        write_gguf(model, folder / "model.gguf")
        config = GGUFQuantizationConfig(compute_dtype=torch.float32)
        return kind.from_single_file(
            str(folder / "model.gguf"),
            quantization_config=config,
            config=str(folder),
            torch_dtype=torch.float32,
        ).eval()
    return kind.from_pretrained(
        folder, quantization_config=CONFIGS[how](), torch_dtype=torch.float32
    ).eval()


def by_hand(model: Any, made: Callable[[torch.nn.Linear], torch.nn.Module]) -> Any:
    """A model whose blocks' linear layers are replaced."""
    for block in model_spec(model).blocks(model):
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear and child.weight.numel() % 64 == 0:
                    setattr(module, name, made(child))
    return model


def nf4(linear: torch.nn.Linear) -> torch.nn.Module:
    """A layer of bitsandbytes, of four bits."""
    layers = import_module("bitsandbytes").nn
    sizes = linear.in_features, linear.out_features
    made = layers.Linear4bit(
        *sizes, bias=linear.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.weight = layers.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = linear.bias
    return made.to("cpu")


class LikeNunchaku(torch.nn.Module):
    """A stand-in for Nunchaku's layers: no `weight`, codes with scales and a part of low rank."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        self.register_buffer("proj_up", u[:, :2] * s[:2])
        self.register_buffer("proj_down", v[:2])
        rest = weight - self.proj_up @ self.proj_down
        self.register_buffer("wscales", rest.abs().amax(1, keepdim=True) / 7)
        self.register_buffer("qweight", (rest / self.wscales).round().to(torch.int8))
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        weight = self.qweight * self.wscales + self.proj_up @ self.proj_down
        return torch.nn.functional.linear(x, weight, self.bias)


def write_gguf(model: Any, path: Path) -> None:
    """A model's weights by diffusers' names, matrices in blocks of 8 bits."""
    gguf = import_module("gguf")
    kinds = gguf.GGMLQuantizationType
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    writer = gguf.GGUFWriter(path, arch="none")
    for name, value in model.state_dict().items():
        data = value.contiguous().float().numpy()
        narrow = name.removesuffix(".weight") in linear and data.shape[-1] % 32 == 0
        kind = kinds.Q8_0 if narrow else kinds.F32
        if narrow:
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BY_HAND: dict[str, Callable[[torch.nn.Linear], torch.nn.Module]] = {
    "bitsandbytes nf4": nf4,
    "Nunchaku Lite": LikeNunchaku,
}
"""Which diffusers wants a GPU for: bitsandbytes' own layers run on a CPU, Nunchaku's don't."""
WAYS = (*CONFIGS, *BY_HAND, "GGUF Q8_0")
NO_SINGLE_FILE = ("pixart-sigma",)


def forward(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return families.run(model, families.arguments(family))


@pytest.mark.bits
@sampled("how, family", [(how, family) for how in WAYS for family in AMONG])
def test_a_quantised_model(how: str, family: str, record_property: Note, tmp_path: Path) -> None:
    """At ratio 1 to the bit as without, then exactly k tokens; a LoRA beside; given back."""
    if how == "GGUF Q8_0" and family in NO_SINGLE_FILE:
        with pytest.raises((AttributeError, ValueError), match=r"from_single_file|single file"):
            loaded(how, family, tmp_path)
        tell(record_property, how, family, "not offered")
        return
    plain = families.made(family)
    whole = forward(plain, family)
    made = adapter(plain, "frozen", family)
    shiva_dit.apply(plain, made)
    counts = [chosen.shape for chosen in selected(plain, lambda: forward(plain, family))]
    model = loaded(how, family, tmp_path)
    dense, names = forward(model, family), set(model.state_dict())
    assert not torch.equal(dense, whole)
    assert near(dense, whole, 0.6)  # four bits of random weights
    shiva_dit.apply(model, made, keep_ratio=1.0)
    assert torch.equal(forward(model, family), dense)
    shiva_dit.apply(model, made)
    assert [chosen.shape for chosen in selected(model, lambda: forward(model, family))] == counts
    pruned = forward(model, family)
    assert not torch.equal(pruned, dense)
    assert set(model.state_dict()) == names
    if hasattr(model, "add_adapter"):
        shiva_dit.apply(model, adapter(families.made(family), "lora", family))
        assert not near(forward(model, family), pruned, 1e-3)
    shiva_dit.remove(model)
    assert torch.equal(forward(model, family), dense)
    tell(record_property, how, family, "structure" if how == "Nunchaku Lite" else "works")


# --- attention ----------------------------------------------------------------------------------

HERE = "native", "_native_math", "flex"
ELSEWHERE = "sage", "flash", "_flash_3"
"""Which need a GPU and a package: diffusers refuses them here, and a stand-in takes their place."""


@sampled("backend, family", [(b, f) for b in (*HERE, *ELSEWHERE) for f in AMONG])
def test_an_attention_backend(
    backend: str, family: str, record_property: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the chosen tokens' queries and nothing else changes."""
    # What is set on one model holds for all others too (diffusers 0.42.1): given back afterwards.
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    model: Any = families.made(family)
    made = adapter(model, "frozen", family)
    shiva_dit.apply(model, made)
    expected = forward(model, family)
    if backend in HERE:
        model.set_attention_backend(backend)
        assert near(forward(model, family), expected, 1e-5)
        shiva_dit.remove(model)
        assert near(forward(model, family), forward(families.made(family), family), 1e-5)
        tell(record_property, f"attention: {backend}", family, "works")
        return
    with pytest.raises(RuntimeError, match=r"missing package|isn't available"):
        model.set_attention_backend(backend)
    assert torch.equal(forward(model, family), expected)
    rows: list[int] = []

    def stand_in(**given: Any) -> Tensor:
        rows.append(given["query"].shape[1])
        return _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE](**given)

    seam = "diffusers.models.attention_dispatch"
    monkeypatch.setattr(f"{seam}._check_attention_backend_requirements", lambda name: None)
    monkeypatch.setattr(f"{seam}._maybe_download_kernel_for_backend", lambda name: None)
    names = AttentionBackendName(backend)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, names, stand_in)
    native = AttentionBackendName.NATIVE
    monkeypatch.setitem(
        _AttentionBackendRegistry._supported_arg_names,
        names,
        _AttentionBackendRegistry._supported_arg_names[native],
    )
    model.set_attention_backend(backend)
    assert torch.equal(forward(model, family), expected)
    fewer = rows.copy()
    shiva_dit.remove(model)
    rows.clear()
    forward(model, family)
    if rows:  # else its attention doesn't go by backends
        assert len(fewer) == len(rows)
        assert sum(fewer) < sum(rows)
    tell(record_property, f"attention: {backend}", family, "structure" if rows else "not offered")


# --- single files -------------------------------------------------------------------------------


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD3's weights by the names of its single file."""
    parts = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    whole = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    blocks = {name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}
    last = max(map(int, blocks))
    found = {"pos_embed": state["pos_embed.pos_embed"]}
    for end in ("weight", "bias"):
        for ours, theirs in whole.items():
            found[f"{theirs}.{end}"] = state[f"{ours}.{end}"]
        for i in range(last + 1):
            block, joint = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            for ours, theirs in parts.items():
                if f"{block}.{ours}.{end}" in state:
                    found[f"{joint}.{theirs}.{end}"] = state[f"{block}.{ours}.{end}"]
            for side, three in (
                ("x_block", ("to_q", "to_k", "to_v")),
                ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                values = [state[f"{block}.attn.{each}.{end}"] for each in three]
                found[f"{joint}.{side}.attn.qkv.{end}"] = torch.cat(values)
        for name in (
            f"final_layer.adaLN_modulation.1.{end}",
            f"joint_blocks.{last}.context_block.adaLN_modulation.1.{end}",
        ):
            found[name] = torch.cat(found[name].chunk(2)[::-1])  # shift stands before scale there
    return {f"model.diffusion_model.{name}": value.contiguous() for name, value in found.items()}


@sampled("family", AMONG)
def test_a_single_file(family: str, record_property: Note, tmp_path: Path) -> None:
    """Loaded from one, a model with an adapter is what it is from a folder; both are saved."""
    model: Any = families.made(family)
    model.save_pretrained(tmp_path / "folder")
    if family in NO_SINGLE_FILE:
        with pytest.raises((AttributeError, ValueError), match=r"from_single_file|single file"):
            type(model).from_single_file("one.safetensors")
        tell(record_property, "single file", family, "not offered")
        return
    made = adapter(model, "frozen" if family != "sd3" else "lora", family)
    state = model.state_dict()
    if family == "sd3":
        state = published(state)
    shiva_dit.apply(model, made)
    expected = forward(model, family)
    save_file({n: v.clone() for n, v in state.items()}, tmp_path / "one.safetensors")
    single: Any = type(model).from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder")
    )
    single.eval()
    made.save_pretrained(tmp_path / "adapter")
    shiva_dit.apply(single, tmp_path / "adapter")
    assert torch.equal(forward(single, family), expected)
    single.save_pretrained(tmp_path / "saved")
    again: Any = type(model).from_pretrained(tmp_path / "saved").eval()
    shiva_dit.remove(single)
    assert torch.equal(forward(again, family), forward(single, family))
    tell(record_property, "single file", family, "works")
