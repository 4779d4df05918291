"""Hooks of diffusers that others put on a model: which may stay, and in what order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

REFUSED = {
    "pyramid_attention_broadcast": "Pyramid Attention Broadcast",
    "taylorseer_cache": "TaylorSeer",
    "faster_cache": "FasterCache",
    "sea_cache": "SeaCache",
    "smoothed_energy_guidance_hook": "Smoothed Energy Guidance",
}
"""Hooks inside blocks, by the beginning of their names, that take a row for a place in the image:
what they keep from one step would be laid on other tokens in the next."""

BLOCK_CACHES = {"fbc": "FirstBlockCache", "mag_cache": "MagCache"}
"""Caches of whole blocks, likewise: diffusers keeps parts of them out of the compiler."""


def register_innermost(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook that sits below all others which replace the forward (caches of blocks).

    These then see all tokens, whichever came first.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with _lifted(registry, registry._hook_order):
        registry.register_hook(hook, name)


def unregister(registry: HookRegistry, name: str) -> None:
    """Take a hook off; those above it stay.

    (`HookRegistry.remove_hook` alone would cut off what the next one puts in the forward's place.)
    """
    above = registry._hook_order[registry._hook_order.index(name) + 1 :]
    with _lifted(registry, above):
        registry.remove_hook(name, recurse=False)


@contextmanager
def _lifted(registry: HookRegistry, names: Sequence[str]) -> Iterator[None]:
    """Within: these hooks are off, as far as they replace the forward; then on again, in order."""
    hooks = {n: registry.hooks[n] for n in names if hasattr(registry.hooks[n], "new_forward")}
    for name in reversed(hooks):
        registry.remove_hook(name, recurse=False)
    try:
        yield
    finally:
        for name, hook in hooks.items():
            registry.register_hook(hook, name)


def refuse_neighbours(model: Any, modules: Iterable[nn.Module]) -> None:
    """Raise where something on the model can't go along with selected tokens.

    Args:
        model: The transformer.
        modules: Where hooks are looked for.

    Raises:
        ValueError: Names it, and says what to do.
    """
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise ValueError(
            "context parallelism splits the tokens among devices, and a block would select among "
            "its part alone: this is not supported. Load the model without it, or use tensor "
            "parallelism."
        )
    for known in _found(REFUSED, modules):
        raise ValueError(
            f"{known} keeps what attention gave from step to step, row by row, and with an adapter "
            "a row is another token each time: call disable_cache() first. FirstBlockCache and "
            "MagCache work."
        )


def refuse_to_compile(blocks: Iterable[nn.Module]) -> None:
    """Raise where a cache stands between the compiler and the blocks.

    Raises:
        ValueError: Names it, and says what to do.
    """
    for known in _found(BLOCK_CACHES, blocks):
        raise ValueError(
            f"{known} can't be compiled as part of a block (fullgraph=True): call disable_cache() "
            f"first, or leave the model uncompiled under {known}."
        )


def _found(names: dict[str, str], modules: Iterable[nn.Module]) -> Iterator[str]:
    """Whose hooks are on some modules, by the beginnings of the hooks' names."""
    for module in modules:
        registry = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks:
            yield from (known for start, known in names.items() if hook.startswith(start))
