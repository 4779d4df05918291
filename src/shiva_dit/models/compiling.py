"""Blocks compiled one by one, and as they were again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from shiva_dit.models.neighbours import refuse_to_compile
from shiva_dit.models.undo import Undo


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
