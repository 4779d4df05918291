"""Calls timed in turn, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(slots=True)
class Samples:
    """Times of one thing, in milliseconds per call."""

    latency_ms: list[float] = field(default_factory=list)
    """On the wall's clock; on a GPU, on its own."""
    cpu_ms: list[float] | None = None
    """Of all threads of the process; None on a GPU, which they only feed."""

    @property
    def median_ms(self) -> float:
        """Median latency."""
        return statistics.median(self.latency_ms)

    def over(self, other: Samples) -> float:
        """How much longer these take than others of the same rounds: the median of the quotients.

        What else the machine did in a round meets both of a pair.
        """
        return _paired(self.latency_ms, other.latency_ms)

    def cpu_over(self, other: Samples) -> float | None:
        """The same of the CPU times."""
        if self.cpu_ms is None or other.cpu_ms is None:
            return None
        return _paired(self.cpu_ms, other.cpu_ms)

    def share_of(self, other: Samples) -> float:
        """These as a share of others of the same rounds: CPU times where there are any."""
        cpu = self.cpu_over(other)
        return self.over(other) if cpu is None else cpu


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def interleaved(
    arms: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device, calls: int = 1
) -> dict[str, Samples]:
    """Time several things in turn; the first of a round changes from round to round.

    Args:
        arms: What is timed, by name, warmed up.
        repeats: Rounds, at least 1.
        device: Where it runs. CUDA is timed by its own events.
        calls: Calls in a row per time taken; times are per call.

    >>> found = interleaved({"nothing": lambda: None}, repeats=3, device=torch.device("cpu"))
    >>> len(found["nothing"].latency_ms)
    3
    """
    names = list(arms)
    on_cpu = device.type == "cpu"
    found = {name: Samples(cpu_ms=[] if on_cpu else None) for name in names}
    take = _on_cpu if on_cpu else _on_cuda
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = take(arms[name], calls)
            samples = found[name]
            samples.latency_ms.append(wall)
            if samples.cpu_ms is not None:
                samples.cpu_ms.append(cpu)
    return found


def _on_cpu(call: Callable[[], object], calls: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    return (
        1000 * (time.perf_counter() - wall) / calls,
        1000 * (time.process_time() - cpu) / calls,
    )


def _on_cuda(call: Callable[[], object], calls: int) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls, 0.0


def keep_memory() -> bool:
    """Have the C library keep what tensors free, from here on; for the whole process.

    glibc hands large buffers back to the system and fetches them anew, page by page, and whether
    it does depends on what was freed before: arms of one process differ in it by chance.

    Returns:
        Whether the C library could be told: it is glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; the value itself where there is one alone.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    (2.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Most memory that tensors hold during a call, in MiB; None where torch doesn't count it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def saved_bytes(call: Callable[[], object], others: Iterable[Tensor]) -> int:
    """Most bytes of tensors that are kept for backward at once during a call.

    Args:
        call: Forward and backward.
        others: What isn't counted: it is there anyway, as weights are.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> saved_bytes(lambda: x.exp().exp().sum().backward(), [x])
    48
    """
    apart = {tensor.untyped_storage().data_ptr() for tensor in others}
    held: dict[int, int] = {}  # how often each storage is, by its address
    now = most = 0

    def pack(tensor: Tensor) -> _Saved:
        nonlocal now, most
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in apart:
            now += 0 if held.get(address) else storage.nbytes()
            most = max(most, now)
            held[address] = held.get(address, 0) + 1
            weakref.finalize(saved, release, address, storage.nbytes())
        return saved

    def release(address: int, size: int) -> None:
        nonlocal now
        held[address] -= 1
        now -= 0 if held[address] else size

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        call()
    return most


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
