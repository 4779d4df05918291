"""What users pass for a model: a pipeline, a transformer, or one in a wrapper."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

REFUSED = {
    "PeftModel": (
        "which calls the model's forward past its hooks: pass its get_base_model() and call that, "
        "or put your LoRA on by the model's own add_adapter(config)"
    ),
    "DataParallel": (
        "which runs copies of the model: pass the model itself (.module), or use "
        "DistributedDataParallel"
    ),
    "FullyShardedDataParallel": (
        "which holds the weights of all layers in one: shard by torch.distributed.fsdp.fully_shard"
    ),
}
"""Wrappers that an adapter can't work in, by class, and what to do instead."""


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the wrappers of `torch.compile` and DistributedDataParallel.

    Raises:
        ValueError: For wrappers that an adapter can't work in.
    """
    while True:
        for cls in type(module).__mro__:
            if cls.__name__ in REFUSED:
                raise ValueError(f"the model is in a {cls.__name__}, {REFUSED[cls.__name__]}.")
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:  # of torch.compile(module)
            module = module.get_submodule("_orig_mod")
        else:
            return module


def pipeline_transformer(target: Any) -> nn.Module:
    """The transformer of a pipeline, or the transformer itself, out of its wrappers.

    Raises:
        ValueError: If there is none.
    """
    return transformers_of(target)[0]


def transformers_of(target: Any) -> list[nn.Module]:
    """All transformers of a pipeline: one, or two (the experts of Wan 2.2), or one by itself.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(target, nn.Module):
        return [unwrapped(target)]
    found = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
    modules = [unwrapped(module) for module in found if isinstance(module, nn.Module)]
    if not modules:
        raise ValueError(
            f"{type(target).__name__} has no transformer: pass a diffusers pipeline of a diffusion "
            "transformer, or the transformer itself."
        )
    return modules
