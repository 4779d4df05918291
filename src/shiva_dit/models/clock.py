"""What time it is in a sampling, without asking the device at every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.01
"""How far a forward's time may lie from the expected one: 16-bit timesteps are off by 0.004."""
UNCHECKED = 64
"""Forwards that may be under way before the oldest is waited for."""


class ListedTimes:
    """The times of a run's forwards, in order; then the same again.

    Args:
        times: t of each forward, in [0, 1].
    """

    def __init__(self, times: Sequence[float]) -> None:
        if not times:
            raise ValueError("timesteps must name at least one step.")
        self.times = tuple(times)
        self.place = 0

    def next(self) -> float | None:
        """The next one of the list."""
        t = self.times[self.place]
        self.place = (self.place + 1) % len(self.times)
        return t

    def learn(self, t: float) -> None:
        """A call's time was read: nothing to learn from that."""


class SchedulerTimes:
    """The times of a pipeline's scheduler, by its own count of steps.

    A run's first step is read from the model's call: it starts the count, and shows whether the
    scheduler's timesteps are the model's times.

    Args:
        pipeline: Its scheduler is looked at anew in each forward: users replace it.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._read: Tensor | None = None
        self._times: list[float] = []
        self._agrees = False

    def next(self) -> float | None:
        """The time of the scheduler's current step."""
        scheduler = self.pipeline.scheduler
        step = getattr(scheduler, "step_index", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if step is None or timesteps is not self._read or not self._agrees:
            return None
        return self._times[step] if step < len(self._times) else None

    def learn(self, t: float) -> None:
        """A forward whose time was read: does the scheduler's list say the same?"""
        scheduler = self.pipeline.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps is self._read:
            return
        span = scheduler.config.get("num_train_timesteps", 1000)
        self._read = timesteps
        self._times = [value / span for value in timesteps.flatten().tolist()]
        step = getattr(scheduler, "step_index", None)
        if step is None:  # a run's first; image to image begins later in the list
            step = getattr(scheduler, "begin_index", None) or 0
        self._agrees = step < len(self._times) and abs(t - self._times[step]) <= TOLERANCE


class Clock:
    """Tells a forward's time on the host; what it told is checked later, without waiting.

    Args:
        times: Where times are known from.
        on_cpu: Whether timesteps on a CPU are not read either (tests): reading them is free.
    """

    def __init__(self, times: ListedTimes | SchedulerTimes, *, on_cpu: bool = False) -> None:
        self.times, self.on_cpu = times, on_cpu
        self.reads = 0
        """Timesteps read from where they lie so far."""
        self._told: deque[tuple[float, Tensor, torch.cuda.Event | None]] = deque()

    def time(self, t: Tensor) -> float | None:
        """Time of a forward, in [0, 1]; None where it must be read (then call `learn`).

        Args:
            t: The same on the device, any shape; compared with what is told.

        Raises:
            RuntimeError: If an earlier forward was told another time than its own.
        """
        self._check()
        if t.device.type == "cpu" and not self.on_cpu:
            return None
        told = self.times.next()
        if told is not None:
            self._remember(told, t)
        return told

    def learn(self, t: float) -> None:
        """A time was read."""
        self.reads += 1
        self.times.learn(t)

    def _remember(self, told: float, t: Tensor) -> None:
        off = (t.float() - told).abs().max()
        if off.device.type != "cuda":
            self._told.append((told, off, None))
            return
        host = torch.empty((), dtype=off.dtype, pin_memory=True)
        host.copy_(off, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._told.append((told, host, arrived))

    def _check(self) -> None:
        while self._told:
            told, off, arrived = self._told[0]
            if arrived is not None and not arrived.query():
                if len(self._told) < UNCHECKED:
                    return
                arrived.synchronize()
            self._told.popleft()
            if float(off) > TOLERANCE:
                self._told.clear()
                raise RuntimeError(
                    f"a forward was taken to be at t = {told:.3f} and was {float(off):.3f} away "
                    "from it: the timesteps given to apply, or the scheduler's, are not those of "
                    "the calls. Pass to apply the timesteps of all calls in their order, or none."
                )
