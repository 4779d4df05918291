"""Where a layer's weights lie, and how they are exchanged there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shiva_dit.models.written import counts_writes

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASTING = "layerwise_casting"
"""What diffusers calls its hooks for storage in fp8."""
Fused = tuple[tuple[Any, tuple[str, ...]], ...]
"""LoRAs of the user that are fused into a layer's weight: PEFT's layers, and the names in each."""


class Place:
    """One parameter of a module, also where accelerate keeps its values aside.

    Args:
        module: It holds the parameter itself.
        name: The parameter's name in it.
        path: The parameter's name in the model, for messages.
    """

    def __init__(self, module: nn.Module, name: str, path: str) -> None:
        self.module, self.name, self.path = module, name, path

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter as it stands in the module."""
        return self.module._parameters.get(self.name)

    def obstacle(self) -> str | None:
        """Why values can't be exchanged here, or None."""
        parameter = self.parameter
        if parameter is None:
            return f"{self.path} is gone"
        if isinstance(parameter.data, DTensor) or isinstance(parameter, DTensor):
            return f"{self.path} is sharded"
        if type(parameter) is not nn.Parameter:
            return f"{self.path} is quantised ({type(parameter).__name__})"
        if not parameter.dtype.is_floating_point:
            return f"{self.path} holds {parameter.dtype}"
        if parameter.is_meta and _kept_aside(self.module, self.name) is None:
            return f"{self.path} is on the meta device"
        return None

    def entry(self) -> tuple[dict[str, Any], str]:
        """The dictionary that holds the values, and their key."""
        return _kept_aside(self.module, self.name) or (self.module._parameters, self.name)

    def holder(self) -> Tensor:
        """The tensor that holds the values, and counts what is written into it."""
        values, key = self.entry()
        found: Tensor = values[key]
        return found

    def get(self) -> Tensor:
        """The values."""
        return self.holder().data

    def set(self, values: Tensor) -> None:
        """Put others in their place; no copy is made, but for a model that inference mode made."""
        aside = _kept_aside(self.module, self.name)
        if aside is not None:
            aside[0][aside[1]] = values
            return
        parameter = self.parameter
        assert parameter is not None
        if counts_writes(parameter):
            parameter.data = values
            return
        with torch.inference_mode():  # with others torch could not run it
            parameter.data = values.clone()


def _kept_aside(module: nn.Module, name: str) -> tuple[dict[str, Tensor], str] | None:
    """Where accelerate's sequential offloading keeps a parameter, and under which key."""
    hook = module.__dict__.get("_hf_hook")
    for single in getattr(hook, "hooks", (hook,)):
        values: Any = getattr(single, "weights_map", None)
        if not getattr(single, "offload", False):
            continue
        while hasattr(values, "dataset"):
            name = f"{values.prefix}{name}"
            values = values.dataset
        if isinstance(values, dict) and name in values:
            return values, name
    return None


def kept_copies(model: nn.Module) -> str | None:
    """What brings weights from copies of its own, past what stands in the modules, or None.

    diffusers' group offloading does with a stream, and from files.
    """
    for _, hook in _hooks(model):
        group = getattr(hook, "group", None)
        if getattr(group, "stream", None) is not None:
            return "group offloading with a stream"
        if getattr(group, "offload_to_disk_path", None):
            return "group offloading to disk"
    return None


def moves_weights(model: nn.Module) -> bool:
    """Whether something brings weights to another place and back, at each forward or run.

    accelerate's offloading of whole models does, diffusers' group offloading, and its storage in
    fp8 ("layerwise casting").
    """
    return "_hf_hook" in model.__dict__ or any(
        name == CASTING or hasattr(hook, "group") for name, hook in _hooks(model)
    )


def _hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All hooks of diffusers on a model, by name."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None:
            yield from registry.hooks.items()


def is_tuner(module: nn.Module) -> bool:
    """Whether it is one of PEFT's layers. Where PEFT isn't imported, none is."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def innermost(module: nn.Module) -> nn.Module:
    """A layer itself, under whatever LoRAs of the user wrap it."""
    while is_tuner(module):
        module = module._modules["base_layer"]  # type: ignore[assignment]
    return module


def layer_at(model: nn.Module, path: str) -> nn.Module | None:
    """The layer of a path, as if no LoRA were on the model; None if there is none."""
    module = model
    for part in path.split(".") if path else ():
        found = innermost(module)._modules.get(part)
        if found is None:
            return None
        module = found
    return innermost(module)


def own_parameters(model: nn.Module) -> dict[str, Place]:
    """The model's own parameters by name, each once, as if no LoRA were on it."""
    return dict(_own_parameters(model, "", set()))


def _own_parameters(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Place]]:
    module = innermost(module)
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            yield prefix + name, Place(module, name, prefix + name)
    for name, child in module._modules.items():
        if child is not None:
            yield from _own_parameters(child, f"{prefix}{name}.", seen)


def links(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every step from the model down to a layer: the parent, the child's name, the child."""
    module = model
    for part in path.split(".") if path else ():
        parent = innermost(module)
        child = parent._modules.get(part)
        assert child is not None
        yield parent, part, innermost(child)
        module = child


def wrappers(model: nn.Module) -> dict[int, list[Any]]:
    """PEFT's layers by the id of the layer that they wrap, the outermost first."""
    found: dict[int, list[Any]] = {}
    for module in model.modules():
        if is_tuner(module):
            found.setdefault(id(innermost(module)), []).append(module)
    return found


def fused_into(layers: list[Any]) -> Fused:
    """What of the user's is fused into a layer's weight at present."""
    return tuple((layer, tuple(layer.merged_adapters)) for layer in layers if layer.merged_adapters)


def odd_fused(fused: Fused) -> str | None:
    """The kind of an adapter that was fused otherwise than by adding to the weight, or None."""
    for layer, names in fused:
        for name in names:
            if name not in getattr(layer, "lora_A", ()):
                return f"{type(layer).__name__} {name!r}"
            if name in layer.lora_variant or layer.lora_bias.get(name):
                return f"LoRA {name!r} with a variant (DoRA) or a bias"
    return None


@torch.no_grad()
def with_fused(values: Tensor, fused: Fused, sign: int = 1) -> Tensor:
    """Values with LoRAs fused into them, as PEFT does it; without them for a sign of -1."""
    if not fused:
        return values
    total = values.clone()
    for layer, names in fused[::sign]:
        for name in names[::sign]:
            delta = layer.get_delta_weight(name).to(total)
            total = total + delta if sign > 0 else total - delta
    return total


def refuse_projections(module: nn.Module, path: str) -> None:
    """Raise where an attention's queries, keys and values run as one layer, past their own.

    Raises:
        ValueError: Says what to do.
    """
    if projections_are_fused(module):
        raise ValueError(
            f"the projections of {path} are fused, so that its queries, keys and values run past "
            "the layers that the adapter's weights belong to: call unfuse_qkv_projections() first."
        )


def projections_are_fused(module: nn.Module) -> bool:
    """Whether an attention runs its queries, keys and values as one layer."""
    if not module.__dict__.get("fused_projections", False):
        return False
    # The older class leaves its mark after unfusing; its processor then is another.
    older = any(cls.__name__ == "Attention" for cls in type(module).__mro__)
    return not older or "Fused" in type(getattr(module, "processor", None)).__name__


def linear_weight(layer: nn.Module, width: int) -> Tensor:
    """The matrix by which a layer multiplies, whatever it is stored as, in float32.

    Args:
        layer: A linear layer, perhaps sharded, offloaded or quantised.
        width: Of its input.
    """
    parameter = layer._parameters.get("weight")
    is_plain = type(layer).forward is nn.Linear.forward  # others may do more to it
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().float()
    if is_plain and type(parameter) is nn.Parameter and parameter.dtype.is_floating_point:
        if not parameter.is_meta:
            return parameter.detach().float()
        return Place(layer, "weight", "weight").get().float()
    bias = layer._parameters.get("bias")
    tensors = [*layer.parameters(), *layer.buffers()]
    if parameter is not None:
        tensors.append(parameter)
    floats = [t for t in tensors if t.dtype in PLAIN]
    dtype = floats[0].dtype if floats else torch.float32
    with torch.no_grad():
        rows = layer(torch.eye(width, dtype=dtype, device=tensors[0].device)).float()  # (in, out)
    return (rows if bias is None else rows - bias.float()).T


def linear_bias(layer: nn.Module) -> Tensor | None:
    """What a layer adds to its product, in float32, if anything."""
    bias = layer._parameters.get("bias")
    if bias is None:
        return None
    if isinstance(bias, DTensor):
        return bias.full_tensor().detach().float()
    return Place(layer, "bias", "bias").get().detach().float()
