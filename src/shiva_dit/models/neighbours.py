"""Hooks of diffusers that others put on a model: which may stay, and in what order."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CellType
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference
from torch import nn

REFUSED = {
    "pyramid_attention_broadcast": "Pyramid Attention Broadcast",
    "taylorseer_cache": "TaylorSeer",
    "faster_cache": "FasterCache",
    "smoothed_energy_guidance_hook": "Smoothed Energy Guidance",
}
"""Hooks inside blocks, by the beginning of their names, that take a row for a place in the image:
what they keep from one step would be laid on other tokens in the next."""

CORRECTION = "shiva_dit_correction"
"""Name of the hook of whole steps."""
REDUCER = "shiva_dit_reducer"
"""Name of a reducer's hooks (`attach_reducer`)."""
_REFUSED = {**REFUSED, REDUCER: REDUCER}

SPLITS = "cp_input"
"""Beginning of the names of hooks that leave each process its part (context parallelism)."""
BLOCK_CACHES = {"fbc": "FirstBlockCache", "mag_cache": "MagCache", "sea_cache": "SeaCache"}
"""Caches of whole blocks, likewise: diffusers keeps parts of them out of the compiler."""


CACHE_DIT = "cache_dit.caching.patch_functors"
"""Where cache-dit 1.5.3 has the forwards that it puts on some classes' blocks."""


def register_innermost(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook that sits below all others which replace the forward (caches of blocks).

    These then see all tokens, whichever came first.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with below_offloading(module), _lifted(registry, registry._hook_order):
        registry.register_hook(hook, name)


def unregister(module: nn.Module, name: str) -> None:
    """Take a hook off, if it is on; those above it stay, and a registry that is empty goes as well.

    (`HookRegistry.remove_hook` alone would cut off what the next one puts in the forward's place.)
    """
    registry: HookRegistry | None = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return
    if name in registry.hooks:
        above = registry._hook_order[registry._hook_order.index(name) + 1 :]
        with below_offloading(module), _lifted(registry, above):
            registry.remove_hook(name, recurse=False)
    if registry.hooks:
        return
    # The registry leaves itself and the bound forward behind as instance attributes.
    del module.__dict__["_diffusers_hook"]
    own = module.__dict__.get("forward")
    if inspect.ismethod(own) and own.__func__ is type(module).forward and own.__self__ is module:
        del module.__dict__["forward"]


@contextmanager
def below_offloading(module: nn.Module) -> Iterator[None]:
    """Within: what accelerate has put in the forward's place is lifted, and then on top again.

    It would else go with a hook that is taken off below it, or take one along that lies above it.
    """
    entries: dict[str, Any] = module.__dict__
    if "_hf_hook" not in entries or "_old_forward" not in entries:
        yield
        return
    top = entries["forward"]
    entries["forward"] = entries["_old_forward"]
    try:
        yield
    finally:
        entries["_old_forward"] = module.forward
        entries["forward"] = top


def reaches(forward: Any, target: object) -> bool:
    """Whether a forward, replaced by whomever, still leads to a hook or function.

    Looks through what wrappers hold: partials, closures, methods, the forwards that diffusers and
    accelerate keep.
    """
    seen: set[int] = set()
    todo = [forward]
    while todo and len(seen) < 500:
        item = todo.pop()
        if item is target:
            return True
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, partial):
            todo += [item.func, *item.args, *item.keywords.values()]
        elif inspect.ismethod(item):
            todo += [item.__func__, item.__self__]
        elif inspect.isfunction(item):
            cells = item.__closure__ or ()
            todo += [cell.cell_contents for cell in cells if cell != CellType()]
            todo += [item.__dict__.get("__wrapped__"), *(item.__defaults__ or ())]
            todo += (item.__kwdefaults__ or {}).values()
        elif isinstance(item, HookFunctionReference):
            todo += [item.forward, item.original_forward]
        elif isinstance(item, nn.Module):
            todo.append(item.__dict__.get("_old_forward"))
        elif callable(item) and not inspect.isclass(item):
            todo += getattr(item, "__dict__", {}).values()
    return False


@contextmanager
def _lifted(registry: HookRegistry, names: Sequence[str]) -> Iterator[None]:
    """Within: hooks that replace the forward or split its arguments are off; then on, in order."""
    hooks = {
        n: registry.hooks[n]
        for n in names
        if hasattr(registry.hooks[n], "new_forward") or n.startswith(SPLITS)
    }
    try:
        for name in reversed(hooks):
            registry.remove_hook(name, recurse=False)
        yield
    finally:
        for name, hook in hooks.items():
            if name not in registry.hooks:
                registry.register_hook(hook, name)


def unhook(module: nn.Module, hook: Any) -> None:
    """Take a torch hook off a module, if it is on; its handle isn't needed for that."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = module.__dict__[kind]
        for number in [number for number, found in hooks.items() if found == hook]:
            for marks in ("", "_with_kwargs", "_always_called"):
                module.__dict__.get(kind + marks, {}).pop(number, None)


def refuse_neighbours(model: Any, modules: Iterable[nn.Module]) -> None:
    """Raise where something on the model can't go along with selected tokens.

    Args:
        model: The transformer.
        modules: Where hooks are looked for.

    Raises:
        ValueError: Names it, and says what to do.
    """
    modules = list(modules)
    for module in modules:
        own = module.__dict__.get("forward")
        if module is not model and getattr(own, "__module__", "").startswith(CACHE_DIT):
            raise ValueError(
                "cache-dit has put forwards of its own on the blocks of this "
                f"{type(model).__name__}, and what they take isn't known here: load the model anew "
                "without it, or take a cache of diffusers."
            )
    for known in _found(_REFUSED, modules):
        if known == REDUCER:
            raise ValueError(
                "the model has a reducer on, and nothing else that takes tokens away can go along "
                "with it: call detach() on what attach_reducer returned first."
            )
        raise ValueError(
            f"{known} keeps what attention gave from step to step, row by row, and with an adapter "
            "a row is another token each time: call disable_cache() first. FirstBlockCache, "
            "MagCache and SeaCache work."
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


def strange_hook(module: nn.Module, known: Collection[str] = ("shiva_dit",)) -> str | None:
    """What on a module does something in each forward that its hooks and weights don't say.

    Args:
        module: Of a model with an adapter on.
        known: Names of diffusers' hooks that may be there.
    """
    registry = module.__dict__.get("_diffusers_hook")
    strange = [] if registry is None else [name for name in registry.hooks if name not in known]
    if strange:
        return f"the hook {strange[0]!r}"
    return "offloading" if "_hf_hook" in module.__dict__ else None


def refuse_caches(model: nn.Module) -> None:
    """Raise where a cache would take a whole step's two evaluations for two steps.

    Raises:
        ValueError: Names it, and says what to do.
    """
    found = next(_found(BLOCK_CACHES, model.modules()), None)
    if found is None and getattr(model, "_is_cached", False):  # its mark on a transformer
        found = "cache-dit"
    if found is not None:
        raise ValueError(
            f"{found} counts the model's calls as steps, and a whole step has two: call "
            f"disable_cache(), or shiva_dit.correct(..., whole_steps=0)."
        )


def _found(names: dict[str, str], modules: Iterable[nn.Module]) -> Iterator[str]:
    """Whose hooks are on some modules, by the beginnings of the hooks' names."""
    for module in modules:
        registry = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks:
            yield from (known for start, known in names.items() if hook.startswith(start))


def forget_registries(model: nn.Module) -> None:
    """Diffusers caches which modules have registries; adding or removing hooks stales that."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()
