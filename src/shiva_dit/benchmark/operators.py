"""Where a forward's time goes, by what is computed, as torch's profiler tells it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OPERATORS: tuple[str, ...] = ("matrix products", "attention", "rest")

# What names of operators and kernels hold; the first that fits counts.
_ATTENTION = ("attention", "flash", "fmha", "sdpa")
_PRODUCTS = ("mm", "linear", "convolution", "gemv", "nvjet", "cutlass")
# Inductor's pointwise kernels and reductions bear the names of what they were fused with.
_FUSED = ("triton_poi", "triton_red", "triton_per")


def operator_kind(name: str) -> str:
    """Which of `OPERATORS` an operator or kernel belongs to, by its name.

    >>> operator_kind("aten::addmm"), operator_kind("aten::gelu")
    ('matrix products', 'rest')
    """
    lower = name.lower()
    if lower.startswith(_FUSED):
        return "rest"
    if any(part in lower for part in _ATTENTION):
        return "attention"
    return "matrix products" if any(part in lower for part in _PRODUCTS) else "rest"


def time_operators(
    call: Callable[[], object], per: int = 1, *, repeats: int = 3
) -> dict[str, float]:
    """Milliseconds that each of `OPERATORS` takes, on the calling thread or on the GPU.

    Taken apart from the benchmark's own times: being watched costs time as well.

    Args:
        call: What is watched, warmed up.
        per: Forwards in a call; times are per forward.
        repeats: Calls that are watched, one after the other; the mean counts.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells on stderr of every start and stop
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as watch:
        for _ in range(repeats):
            call()
    collects = gc.isenabled()
    gc.disable()  # it would search the profiler's many events again and again, as they come
    try:
        averages = watch.key_averages()
    finally:
        if collects:
            gc.enable()
    found = dict.fromkeys(OPERATORS, 0.0)
    for name, microseconds in _self_times(averages):
        found[operator_kind(name)] += microseconds / 1000 / repeats / per
    return found


def _self_times(events: Iterable[Any]) -> list[tuple[str, float]]:
    """Names and microseconds: of kernels where some ran on a GPU, else of operators.

    An operator is told its kernels' time as well, which would count them twice.
    """
    kernels = [
        (event.key, event.self_device_time_total)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return kernels or [(event.key, event.self_cpu_time_total) for event in events]
