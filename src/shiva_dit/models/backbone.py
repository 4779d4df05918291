"""What training tunes of a backbone: a LoRA or DoRA of PEFT's, or the whole state.

For inference nothing of PEFT's is put on a model: see `shiva_dit.models.tuned`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shiva_dit.models.low_rank import linear_weight
from shiva_dit.models.places import is_tuner, refuse_projections
from shiva_dit.models.sharded import is_shared, whole

PEFT_NAME = "shiva_dit"
LORA_PREFIX = "transformer."
# All linear layers of attention and feed-forward, in diffusers' names.
LORA_TARGETS = re.compile(
    r".*\.\d+\.(\w+_block\.)?"
    r"((\w+_)?(attn\d?|attention)\."
    r"(to_[qkv]|to_(query|key|value)|to_gate|to_gate_logits|to_out(\.0)?|out_layer"
    r"|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)"
    r"|((\w+_)?ff|ff_context|ffn|mlp|feed_forward|(img|txt)_(mlp|ff))\."
    r"(net\.(0\.proj|2)|w[123]|(gate|up|down)(_proj)?|gate_layer|proj|out(_projection)?"
    r"|linear_([123]|in|out|fc2))"
    r"|proj_(mlp|out))$"
)


def add_lora(model: Any, settings: Mapping[str, Any], *, float32: bool = False) -> None:
    """Add an untrained LoRA or DoRA on all linear layers of attention and feed-forward.

    Args:
        model: A diffusers transformer.
        settings: PEFT's `r`, `lora_alpha` and `use_dora`.
        float32: Whether its weights are float32 over a model in 16 bits too, as training needs
            them; in the model's dtype else.

    Raises:
        ValueError: If the model has none of these layers, runs past them (fused projections), or
            diffusers gives its class no LoRA; if the rank is above that of every layer's weight.
    """
    for name, module in model.named_modules():
        refuse_projections(module, name)
    active = _active(model)
    targets = [
        name
        for name, module in model.named_modules()
        if LORA_TARGETS.match(name)
        and (isinstance(module, nn.Linear) or hasattr(module, "base_layer"))
    ]
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in attention to put a LoRA on."
        )
    _check_rank(settings["r"], [model.get_submodule(name) for name in targets])
    if not hasattr(model, "add_adapter"):
        raise ValueError(
            f"{type(model).__name__} takes no LoRA in this version of diffusers: train with "
            'backbone="full" or "frozen".'
        )
    from peft import LoraConfig  # noqa: PLC0415

    with _same_flags(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TorchaoLoraLinear")  # it can't be merged, nor need it
        model.add_adapter(LoraConfig(target_modules=targets, **settings), adapter_name=PEFT_NAME)
        model.enable_adapters()
        model.set_adapter([*active, PEFT_NAME])
    if float32:
        _widen_lora(model)


def _check_rank(rank: int, layers: Iterable[Any]) -> None:
    """Refuse a rank that no layer's weight has; narrow layers beside wide ones may be below it."""
    linear = [getattr(layer, "base_layer", layer) for layer in layers]
    most = max(min(layer.in_features, layer.out_features) for layer in linear)
    if rank > most:
        raise ValueError(
            f"lora_rank must be at most {most}, the largest rank of a layer's weight, got {rank}."
        )


def _widen_lora(model: nn.Module) -> None:
    """Our untrained LoRA in float32: PEFT computes it so, and gives back what the base layer gives.

    DoRA's magnitudes are taken anew: rounded ones would change the model before any step.
    """
    layer: Any
    for _, layer in _lora_layers(model):
        if PEFT_NAME not in getattr(layer, "lora_A", {}):
            continue
        down, up = layer.lora_A[PEFT_NAME].float(), layer.lora_B[PEFT_NAME].float()
        if PEFT_NAME in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[PEFT_NAME].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=down.weight,
                lora_B=up.weight,
                scaling=layer.scaling[PEFT_NAME],
            )


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """Our LoRA's weights, under the names that diffusers' pipelines load."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415

    state = get_peft_model_state_dict(model, adapter_name=PEFT_NAME)
    return {LORA_PREFIX + name: value for name, value in state.items()}


def refuse_fused(model: nn.Module) -> None:
    """Raise where our LoRA was fused into the weights: undoing that would not be exact.

    Raises:
        RuntimeError: Says what to do.
    """
    if any(PEFT_NAME in layer.merged_adapters for _, layer in _lora_layers(model)):
        raise RuntimeError(
            "the LoRA in training was fused into the model's weights, so it can't be taken off or "
            "switched: call unfuse_lora() first."
        )


def enable_lora(model: Any, enabled: bool) -> None:
    """Switch our LoRA on or off, leaving the user's own as they are."""
    refuse_fused(model)
    others = [name for name in _active(model) if name != PEFT_NAME]
    wanted = [*others, PEFT_NAME] if enabled else others
    with _same_flags(model):
        if wanted:
            model.enable_adapters()
            model.set_adapter(wanted)
        else:
            model.disable_adapters()


def remove_lora(model: Any) -> None:
    """Take our LoRA off; layers that no other LoRA is on are the model's own again."""
    if PEFT_NAME not in getattr(model, "peft_config", {}):
        return  # the user unloaded all LoRAs
    others = [name for name in _active(model) if name != PEFT_NAME]
    with _same_flags(model):
        if set(model.peft_config) == {PEFT_NAME}:
            model.unload_lora()
            model.__dict__.pop("_hf_peft_config_loaded", None)
            return
        model.set_adapter(others)
        model.delete_adapters(PEFT_NAME)
        for name, layer in _lora_layers(model):
            if not any(len(getattr(layer, part)) for part in layer.adapter_layer_names):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.base_layer)  # type: ignore[attr-defined]
        if not others:
            model.disable_adapters()


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if is_tuner(m)]


def _active(model: nn.Module) -> list[str]:
    layers = _lora_layers(model)
    return [] if not layers or layers[0][1].disable_adapters else list(layers[0][1].active_adapters)


@contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    """PEFT opens and freezes parameters when it switches; what trains is the caller's choice."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def trainable_parameters(model: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    """The backbone's parameters that joint tuning trains, by name ("frozen": none).

    All parameters are frozen on return; `set_trainable` opens these.
    """
    model.requires_grad_(False)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if kind == "full" or (kind in ("lora", "dora") and f".{PEFT_NAME}" in name)
    }


def untuned(model: nn.Module, kind: str, given: nn.Module) -> dict[str, Tensor]:
    """Values of `trainable_parameters` with which the model is as it was given.

    Args:
        model: In training.
        kind: What joint tuning trains.
        given: As it was, where all of it is tuned.
    """
    if kind == "full":
        return {name: value.detach() for name, value in given.named_parameters()}
    found = {
        name: torch.zeros_like(value)
        for name, value in model.named_parameters()
        if kind in ("lora", "dora") and f".{PEFT_NAME}" in name
    }
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for path, layer in layers:
        if not hasattr(layer, "lora_magnitude_vector"):
            continue
        for name in found:
            if name.startswith(f"{path}.lora_magnitude_vector."):
                weight = linear_weight(layer.get_base_layer(), layer.in_features)
                found[name] = torch.linalg.vector_norm(weight.detach().float(), dim=1)
    return found


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    """Open or freeze parameters."""
    for parameter in parameters:
        parameter.requires_grad_(trainable)


def backbone_weights(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """What an adapter must hold of a tuned backbone ("frozen": nothing)."""
    if kind == "full":
        return {name: _copied(p.detach()) for name, p in model.named_parameters()}
    if kind in ("lora", "dora"):
        return {name: value.detach().clone() for name, value in lora_weights(model).items()}
    return {}


def _copied(value: Tensor) -> Tensor:
    """On its device; of a shared one the whole, which may not fit there beside all others."""
    return whole(value).to("cpu") if is_shared(value) else value.clone()


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with a value that is not finite, or None."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            return name
    return None
