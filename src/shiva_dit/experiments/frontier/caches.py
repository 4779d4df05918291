"""Caches of other libraries, put on a model for one sampling after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import (
    HookRegistry,
    ModelHook,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from shiva_dit.experiments.frontier.config import CacheKind
from shiva_dit.models.families import model_spec

CONTEXT = "frontier"
"""Names the state that a run's steps share: not all pipelines name their passes."""
TEXT = "shiva_dit_frontier_text"


class _KeepsText(ModelHook):
    """Passes the text on where a block returns none: the first-block cache takes differences of it.

    The last block of Stable Diffusion 3 is such a one (diffusers 0.42.1).
    """

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward, with its text where that is None."""
        del module
        forward = self.fn_ref.original_forward
        assert forward is not None
        output: Any = forward(*args, **kwargs)
        if isinstance(output, tuple) and output[0] is None and "encoder_hidden_states" in kwargs:
            return kwargs["encoder_hidden_states"], *output[1:]
        return output


def _mag_cache(pipe: Any, threshold: float, steps: int, run: Callable[[], object]) -> None:
    """MagCache, calibrated by one run of these steps."""
    model = pipe.transformer
    watching = MagCacheConfig(calibrate=True, num_inference_steps=steps + 1)  # one more: it prints
    apply_mag_cache(model, watching)
    run()
    ratios = _calibrated(model)
    _take_off(model)
    if len(ratios) != steps:
        raise ValueError(
            f"MagCache saw {len(ratios)} calls in {steps} steps, and counts each as a step: run it "
            "on a pipeline that guides in one batch."
        )
    apply_mag_cache(
        model,
        MagCacheConfig(
            threshold=threshold, num_inference_steps=steps, mag_ratios=torch.tensor(ratios)
        ),
    )


def _calibrated(model: Any) -> list[float]:
    """What a calibration has found."""
    hook = _mag_cache_hook(model)
    assert hook is not None
    (state,) = hook.state_manager._state_cache.values()
    return list(state.calibration_ratios)


def mag_ratios(model: Any) -> list[float] | None:
    """What the MagCache on a model was calibrated to; None where none is on."""
    hook = _mag_cache_hook(model)
    return None if hook is None else hook.config.mag_ratios.tolist()


def _mag_cache_hook(model: Any) -> Any:
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(NAMES[0])
        if hook is not None:
            return hook
    return None


def _first_block(pipe: Any, threshold: float, steps: int, run: Callable[[], object]) -> None:
    del steps, run
    last = model_spec(pipe.transformer).blocks(pipe.transformer)[-1]
    HookRegistry.check_if_exists_or_initialize(last).register_hook(_KeepsText(), TEXT)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=threshold))


def _taylor_seer(pipe: Any, threshold: float, steps: int, run: Callable[[], object]) -> None:
    del steps, run
    apply_taylorseer_cache(
        pipe.transformer,
        TaylorSeerCacheConfig(cache_interval=round(threshold), taylor_factors_dtype=torch.float32),
    )


def _dbcache(pipe: Any, threshold: float, steps: int, run: Callable[[], object]) -> None:
    """cache-dit's, by the first block's change; a sixth of the steps are whole."""
    del run
    if find_spec("cache_dit") is None:
        raise ValueError("dbcache needs cache-dit: pip install cache-dit==1.5.3")
    cache_dit = import_module("cache_dit")
    cls = type(pipe)  # cache-dit 1.5.3 changes it: for this pipeline alone
    pipe.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=max(1, steps // 6),
        ),
    )


CACHES: dict[CacheKind, Callable[[Any, float, int, Callable[[], object]], None]] = {
    "mag_cache": _mag_cache,
    "first_block": _first_block,
    "taylor_seer": _taylor_seer,
    "dbcache": _dbcache,
}
NAMES = (
    "mag_cache_leader_block_hook",
    "mag_cache_block_hook",
    "fbc_leader_block_hook",
    "fbc_block_hook",
    "taylorseer_cache",
    TEXT,
)
"""Of the hooks that they leave."""


@contextmanager
def cached(
    pipe: Any, kind: CacheKind, threshold: float, steps: int, run: Callable[[], object]
) -> Iterator[None]:
    """Within: a pipeline runs with a cache; `fresh` starts each of its runs.

    Args:
        pipe: Whose transformer gets it.
        kind: Which one.
        threshold: Its setting (`Arm.threshold`).
        steps: Of each run.
        run: Samples once, for calibration.

    Raises:
        ValueError: If it isn't installed, or can't work here.
    """
    CACHES[kind](pipe, threshold, steps, run)
    try:
        yield
    finally:
        if kind == "dbcache":
            import_module("cache_dit").disable_cache(pipe)
        else:
            _take_off(pipe.transformer)


@contextmanager
def fresh(model: Any, kind: CacheKind) -> Iterator[None]:
    """Within: one run, whose steps share a state of their own."""
    if kind == "dbcache":  # knows its runs by the pipeline's calls
        yield
        return
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.reset_stateful_hooks(recurse=True)
    _set_cache_context(model, CacheContext(CONTEXT))
    try:
        yield
    finally:
        _set_cache_context(model, None)


def _take_off(model: Any) -> None:
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in NAMES:
            if registry is not None and registry.get_hook(name) is not None:
                registry.remove_hook(name, recurse=False)
