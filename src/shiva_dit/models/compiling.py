"""Blocks compiled one by one, and as they were again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from shiva_dit.models.neighbours import refuse_to_compile
from shiva_dit.models.undo import Undo

RECOMPILE_LIMIT = 64
"""Graphs of a block; torch's own 8 are soon used up by batch sizes."""


def compile_options() -> dict[str, Any]:
    """For `torch.compile` of blocks, by default."""
    options: dict[str, Any] = {"fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # All blocks count as one for dynamo: dense and pruned, guided and not, each batch size.
        options["recompile_limit"] = RECOMPILE_LIMIT
    return options


def compile_blocks(blocks: Sequence[nn.Module], options: dict[str, Any], undo: Undo) -> None:
    """Compile each block by itself.

    Args:
        blocks: The model's.
        options: For `torch.compile`.
        undo: Notes how that is taken back.

    Raises:
        ValueError: If a cache is on the blocks and they shall be one graph each.
    """
    if options.get("fullgraph"):
        refuse_to_compile(blocks)
    for block in blocks:
        before = block.__dict__.get("_compiled_call_impl")
        undo.add(partial(_restore, block, before))
        block.compile(**options)


def _restore(block: nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        block.__dict__.pop("_compiled_call_impl", None)
    else:
        block._compiled_call_impl = before
