"""How pruning multiplies with what else makes a model faster, measured side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import MagCacheConfig
from diffusers.hooks import apply_mag_cache
from torch import nn

from shiva_dit.benchmark.config import BenchmarkConfig
from shiva_dit.benchmark.records import record_what
from shiva_dit.benchmark.run import DENSE, FORCED, Bench, made_bench, timed
from shiva_dit.provenance import provenance


def _int8(model: Any, forwards: int) -> None:
    """Weights and activations of linear layers in int8; the activations' scales per token."""
    del forwards
    if find_spec("torchao") is None:
        raise ValueError("int8 needs torchao: pip install torchao")
    torchao = import_module("torchao.quantization")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())


def _mag_cache(model: Any, forwards: int) -> None:
    """MagCache that skips every other step after the first fifth, whatever it sees."""
    config = MagCacheConfig(
        num_inference_steps=forwards, mag_ratios=torch.ones(forwards), max_skip_steps=1
    )
    apply_mag_cache(model, config)


CHANGES: dict[str, Callable[[Any, int], None] | None] = {
    "compile": None,
    "int8": _int8,
    "mag_cache": _mag_cache,
}
"""What is done to the model, before the adapter is put on; compile comes after."""


def run_pair(config: BenchmarkConfig) -> dict[str, Any]:
    """Time the dense model and its pruned selves without and with something else, all in turn.

    Two models of the same weights in one process: `config.beside` is put on one of them. Beside a
    cache, a call is a whole sampling of `forwards` steps (by default `steps`), since a cache skips
    some of them.

    Args:
        config: What is timed, and beside what.

    Returns:
        A plain record: per arm all times in ms per forward of both models; what pruning gives
        without and with the other, what the other gives, and both.

    Raises:
        ValueError: If what is put beside isn't installed, or as `run_benchmark` does.
    """
    beside = config.beside
    assert beside is not None
    forwards = config.forwards or config.steps
    if beside == "mag_cache":
        config = replace(config, forwards=forwards)
    alone = replace(config, beside=None)
    if beside == "compile":
        alone = replace(alone, mode="eager")
    change = CHANGES[beside]
    given = None if change is None else lambda model: change(model, forwards)
    with torch.no_grad(), made_bench(alone) as bare, made_bench(config, given) as other:
        share_run = _block_runs(other) / _block_runs(bare)
        calls = {"alone": bare.calls(), "beside": other.calls()}
        arms = [name for name in calls["alone"] if name != FORCED]
        turns = {f"{kind}: {arm}": calls[kind][arm] for arm in arms for kind in calls}
        samples = timed(turns, config, forwards=len(bare.times))
        dense, dense_beside = samples[f"alone: {DENSE}"], samples[f"beside: {DENSE}"]
        rows: list[dict[str, Any]] = []
        for arm in arms:
            mine, both = samples[f"alone: {arm}"], samples[f"beside: {arm}"]
            rows.append(
                {
                    "arm": arm,
                    "alone": asdict(mine),
                    "beside": asdict(both),
                    "pruning_gives": dense.over(mine),
                    "pruning_gives_beside": dense_beside.over(both),
                    "other_gives": mine.over(both),
                    "both_give": dense.over(both),
                }
            )
    return {
        "what": record_what(config),
        "config": asdict(config),
        "image_tokens": bare.num_tokens,
        "text_tokens": bare.text_tokens,
        "forwards_per_time": len(bare.times),
        "share_run": share_run,
        "rows": rows,
        "provenance": provenance(),
    }


def _block_runs(bench: Bench) -> int:
    """Runs of the last block's first layer in the dense model's forwards, before it is compiled."""
    block = bench.attachment.spec.blocks(bench.model)[-1]
    layer = next(module for module in block.modules() if isinstance(module, nn.Linear))
    runs: list[None] = []
    handle = layer.register_forward_hook(lambda *_: runs.append(None))
    try:
        with bench.arm(DENSE):
            bench.forwards(bench.times)
    finally:
        handle.remove()
    return len(runs)
