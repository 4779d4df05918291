"""What the adapter must know of a model: where tokens, time and text are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shiva_dit.core.flops import ModelFlops


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """What a block takes and returns."""

    block_class: str
    """Class name, looked up over the block's `__mro__`."""
    hidden: str = "hidden_states"
    """Argument that holds the image tokens, (B, N, D)."""
    output: int | None = None
    """Place of the image tokens in the returned tuple; None if the tensor itself is returned."""
    value_modules: tuple[str, ...] = ()
    """Value projections of the image tokens (for the KV gate); absent ones are skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDims:
    """Widths that a router is built from."""

    num_blocks: int
    """L."""
    width: int
    """D of the image tokens."""
    time_dim: int
    """Width of the time embedding."""
    context_dim: int
    """Width of the pooled text or class embedding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Where a model keeps its blocks, its time and its pooled text."""

    model_class: str
    """Class name, looked up over the model's `__mro__`."""
    block_lists: tuple[str, ...]
    """Attributes that hold the blocks, in the order in which they run."""
    sample: str
    """Argument of the model's forward that holds the latents."""
    timestep: str
    """Argument that holds the timestep."""
    timestep_scale: float
    """What the model calls pure noise: t = timestep / timestep_scale."""
    time_embedder: str
    """Submodule whose output is the time embedding."""
    context: str
    """Argument that holds the pooled text or class embedding."""
    no_sharing: str | None
    """Argument that, when given, marks an extra pass without guidance halves."""
    lora_scale: str | None
    """Argument whose "scale" multiplies all LoRAs of the model."""
    tokens: Callable[[nn.Module, Tensor], int]
    """Number of image tokens N for latents."""
    dims: Callable[[nn.Module], ModelDims]
    """Widths of a model."""
    flops: Callable[[nn.Module, int, int], ModelFlops]
    """FLOPs for N image tokens and T text tokens."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """All blocks in the order in which they run."""
        return [
            block for name in self.block_lists for block in model.get_submodule(name).children()
        ]


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward call by name, however they were passed."""
    signature = inspect.signature(type(module).forward)
    names = list(signature.parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def argument_place(module: nn.Module, name: str) -> int:
    """Position of a named argument in a module's forward.

    Raises:
        ValueError: If the forward has no such argument: another version of the model's code.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if name not in names:
        raise ValueError(
            f"{type(module).__name__}.forward has no argument {name!r} (it has "
            f"{', '.join(names)}): this version of diffusers is not supported; 0.42.1 is."
        )
    return names.index(name)
