"""How a function that launches Triton kernels becomes an operator of torch, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs

# Read once, as Triton does: a kernel is interpreted if this was set when it was defined.
INTERPRETED: bool = knobs.runtime.interpret


def operator(name: str, outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as the operator `shiva_dit::<name>`, which `torch.compile` can trace.

    Tracing sees through a `triton_op` to its kernels. Interpreted kernels have nothing to see and
    would be run on tensors without data: there the operator is opaque (`custom_op`), and
    `outputs` tells what it returns.

    Args:
        name: Name of the operator.
        outputs: Allocates what the function returns, of the same arguments.
    """

    def register(function: Callable[..., Any]) -> Any:
        full = f"shiva_dit::{name}"
        if not INTERPRETED:
            return torch.library.triton_op(full, function, mutates_args=())
        made = torch.library.custom_op(full, function, mutates_args=())
        made.register_fake(outputs)
        return made

    return register


def rows_together(x: Tensor) -> Tensor:
    """Slices of a larger tensor stay where they are; only the last axis must be dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
