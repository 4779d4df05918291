"""Where a forward's time goes, by what is computed, as torch's profiler tells it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

OPERATORS: tuple[str, ...] = ("matrix products", "attention", "rest")

# What names of operators and kernels hold; the first that fits counts.
_ATTENTION = ("attention", "flash", "fmha", "sdpa")
_PRODUCTS = ("mm", "linear", "convolution", "gemv", "nvjet", "cutlass")


def operator_kind(name: str) -> str:
    """Which of `OPERATORS` an operator or kernel belongs to, by its name.

    >>> operator_kind("aten::addmm"), operator_kind("aten::gelu")
    ('matrix products', 'rest')
    """
    lower = name.lower()
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
    events = watch.key_averages()
    on_gpu = any(event.self_device_time_total for event in events)
    found = dict.fromkeys(OPERATORS, 0.0)
    for event in events:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[operator_kind(event.key)] += microseconds / 1000 / repeats / per
    return found
