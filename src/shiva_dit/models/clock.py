"""What time it is in a sampling and which steps it has, asking the device at a run's first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from shiva_dit.models.guidance import running_call, same_step
from shiva_dit.models.sampling import Sampler, listed_times

TOLERANCE = 0.01
"""How far a forward's time may lie from the expected one: 16-bit timesteps are off by 0.004."""
UNCHECKED = 64
"""Forwards that may be under way before the oldest is waited for."""

Run = tuple[float, ...]
"""t of each of a run's forwards, in [0, 1]; those of one step may stand there once."""
Time = Callable[[Any], Any]
"""t of a model's timestep (`ModelSpec.time`)."""


class ListedTimes:
    """The times of a run's forwards, in order; then the same again.

    Args:
        times: t of each forward, in [0, 1].
    """

    def __init__(self, times: Sequence[float]) -> None:
        if not times:
            raise ValueError("timesteps must name at least one step.")
        if not all(0.0 <= t <= 1.0 + 1e-6 for t in times):
            raise ValueError(
                "timesteps must be the model's own, from noise to clean data: as t they must lie "
                f"in [0, 1], got {times}."
            )
        self.run: Run = tuple(times)
        self.place = 0

    @property
    def running(self) -> object:
        """Stands for the run that the next forward is part of; None if it is its first."""
        return self.run if self.place else None

    def next(self, timestep: Tensor | None = None) -> float | None:
        """The next one of the list."""
        del timestep
        t = self.run[self.place]
        self.place = (self.place + 1) % len(self.run)
        return t

    def read(self, timestep: Tensor, time: Time) -> list[float]:
        """Times of a call's samples, from where they lie.

        Raises:
            RuntimeError: If one isn't on the list.
        """
        times = [time(step) for step in timestep.flatten().tolist()]
        for t in times:
            if _nearest(self.run, t) is None:
                raise _wrong(self.run[self.place - 1], t)
        return times


class SchedulerTimes:
    """The times of a pipeline's scheduler, by its own count of steps.

    A run's first step is read from the model's call, together with the scheduler's list: it starts
    the count, and shows whether the scheduler's timesteps are the model's times and where in the
    list the run begins (image to image).

    Args:
        pipeline: Its scheduler is looked at anew in each forward: users replace it.
        model: The transformer of the pipeline that is called.
    """

    def __init__(self, pipeline: Any, model: Any) -> None:
        self._pipeline, self._model = ref(pipeline), ref(model)  # either may outlive the other
        self.run: Run | None = None
        """The run's times, if its list is known and is the model's."""
        self._read: Tensor | None = None
        self._begin = 0
        self._first: ref[Tensor] | None = None
        """The step that it was read in, as `Running.step`."""

    @property
    def pipeline(self) -> Any:
        """The pipeline, while it is there."""
        return self._pipeline()

    @property
    def running(self) -> object:
        """Stands for the run that the next forward is part of; None if there is no list of it."""
        return self._list()

    def next(self, timestep: Tensor | None = None) -> float | None:
        """The time of the scheduler's current step.

        Args:
            timestep: What the model is called with, for schedulers that don't count steps.
        """
        if self._read is None or self._list() is not self._read or self.run is None:
            self.run = None  # what was read is another run's
            return None
        scheduler = self.pipeline.scheduler
        if hasattr(scheduler, "step_index"):
            step = scheduler.step_index
            place = self._before_steps() if step is None else step - self._begin
            if place >= len(self.run):  # a call after the run
                self.run = None
                return None
        else:
            place = -1 if timestep is None else place_in(timestep, self._read) - self._begin
            place = _place_in_loop() if place < 0 else place
        return self.run[place] if 0 <= place < len(self.run) else None

    def _before_steps(self) -> int:
        """The place where the scheduler hasn't counted; -1 if it never will: its copies do."""
        running = running_call()
        step = None if running is None else running.step
        is_first = step is None or self._first is None or same_step(step, self._first)
        return 0 if is_first else -1

    def read(self, timestep: Tensor, time: Time) -> list[float]:
        """Times of a call's samples, from where they lie; of a run's first, the list as well."""
        listed = self._list()
        if listed is None or listed is self._read:
            return [time(step) for step in timestep.flatten().tolist()]
        own = timestep.detach().flatten().float()
        both = torch.cat([own, listed.flatten().to(own)]).tolist()
        times = [time(step) for step in both[: len(own)]]
        self._learn(listed, listed_times(self.pipeline.scheduler, both[len(own) :]), times[0])
        return times

    def _list(self) -> Tensor | None:
        """The scheduler's list for a run, if it was asked for one."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        asked = getattr(scheduler, "num_inference_steps", None) is not None
        return timesteps if asked and isinstance(timesteps, Tensor) and len(timesteps) else None

    def _learn(self, listed: Tensor, times: list[float], first: float) -> None:
        """What the list says of the run, if it says the time that was read."""
        self._read, self.run = listed, None
        running = running_call()
        self._first = None if running is None else running.step
        begin = getattr(self.pipeline.scheduler, "begin_index", None)
        place = getattr(self.pipeline.scheduler, "step_index", None)
        if place is None:  # the run's first step; not all pipelines say where it is
            nearest = min(range(len(times)), key=lambda place: abs(times[place] - first))
            place = begin = nearest if begin is None else begin
        run = times[begin or 0 :]
        agrees = place < len(times) and abs(times[place] - first) <= TOLERANCE
        if agrees and all(0.0 <= t <= 1.0 + 1e-6 for t in run):
            own = Sampler.of(self.pipeline, self._model()).own(run)
            # Times fall: what another transformer takes of them lies before, or behind.
            before = sum(t > own[0] for t in run) if own else 0
            self._begin, self.run = (begin or 0) + before, tuple(own) or None


class Clock:
    """Tells a forward's time and its run; what it told is checked later, without waiting.

    Args:
        times: Where times are known from.
        on_cpu: Whether timesteps on a CPU are not read either (tests): reading them is free.
    """

    def __init__(self, times: ListedTimes | SchedulerTimes, *, on_cpu: bool = False) -> None:
        self.times, self.on_cpu = times, on_cpu
        self.reads = 0
        """Forwards whose time was read from where it lies so far."""
        self._told: deque[tuple[float, Tensor, torch.cuda.Event | None]] = deque()

    def look(self, timestep: Tensor, time: Time) -> tuple[Run | None, list[float]]:
        """The run that a forward is part of, if its steps are known, and its samples' times.

        Times of a run are those of its list, wherever they were read: 16 bits round them.

        Args:
            timestep: What the model is called with, any shape.
            time: Its t.

        Raises:
            RuntimeError: If an earlier forward was told another time than its own.
        """
        self._check()
        told = self.times.next(timestep)
        if told is not None and (self.on_cpu or timestep.device.type != "cpu"):
            self._remember(told, time(timestep))
            return self.times.run, [told]
        self.reads += 1
        read = self.times.read(timestep, time)
        run = self.times.run
        if run is None:
            return None, read
        if told is None:
            told = self.times.next(timestep)
        near = told is not None and all(abs(t - told) <= TOLERANCE for t in read)
        found = [told] if near else [_nearest(run, t) for t in read]
        listed = [t for t in found if t is not None]
        return (run, listed) if len(listed) == len(found) else (None, read)

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
                raise _wrong(told, told + float(off))


def _nearest(run: Run, t: float) -> float | None:
    """The run's own time that a time read from a device stands for."""
    nearest = min(run, key=lambda step: abs(step - t))
    return nearest if abs(nearest - t) <= TOLERANCE else None


def place_in(timestep: Tensor, listed: Tensor) -> int:
    """Place in a scheduler's list of which a timestep is a view; -1 if it is none.

    Schedulers without a count of steps are used by pipelines that pass on their entries.
    """
    same = (
        timestep.dtype == listed.dtype
        and timestep.device == listed.device
        and timestep.untyped_storage().data_ptr() == listed.untyped_storage().data_ptr()
        and all(n == 1 or s == 0 for n, s in zip(timestep.shape, timestep.stride(), strict=True))
    )
    if not same or listed.ndim != 1:
        return -1
    return (timestep.storage_offset() - listed.storage_offset()) // listed.stride(0)


def _place_in_loop() -> int:
    """Which step the loop of the running pipeline is at, by its own list; -1 if it doesn't say.

    Some pass on copies of the entries, or ask their scheduler for its list twice.
    """
    running = running_call()
    if running is None or not running.is_known:
        return -1
    t, listed = running.time, running.scope.get("timesteps")
    if t is None or not isinstance(listed, Tensor):
        return -1
    return place_in(t, listed)


def _wrong(told: float, t: float) -> RuntimeError:
    return RuntimeError(
        f"a forward was taken to be at t = {told:.3f} and was {abs(t - told):.3f} away from it: "
        "the timesteps given to apply, or the scheduler's, are not those of the calls. Pass to "
        "apply the timesteps of all calls in their order, or none. If something else called the "
        "model in between (a callback, code of your own): make that call within "
        "shiva_dit.disabled(model), or apply to the transformer instead of the pipeline, which "
        "reads the time of each call."
    )
