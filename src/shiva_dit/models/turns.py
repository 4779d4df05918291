"""Whose turn it is on a model: one forward at a time, and no switch of its weights meanwhile.

An interrupted forward (Ctrl-C) runs no torch hook that could give its turn back. So a turn is never
believed longer than its thread is really inside the model's call: the thread's stack says so.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from torch import nn

logger = logging.getLogger("shiva_dit")

POLL = 0.02
"""Seconds between looks at a turn that nobody may give back."""
PATIENCE = 30.0
"""Seconds of waiting after which the log says for whom."""
_CALL = nn.Module._wrapped_call_impl.__code__


@dataclass(frozen=True, slots=True)
class _Holder:
    what: Literal["forward", "switch"]
    thread: threading.Thread
    is_on_stack: bool
    """Whether the model's call could be seen on the thread's stack as its turn began."""


class Turns:
    """The turns on one model; `turns_of` gives the same ones to everybody.

    Args:
        model: The transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._changed = threading.Condition()
        self._holder: _Holder | None = None
        self._depth = 0
        self.pauses = 0
        """How many `disabled` blocks are open: they hold for whatever is on the model meanwhile."""

    def start_forward(self) -> None:
        """Take the turn for a forward of this thread; waits for a switch.

        Raises:
            RuntimeError: If another thread's forward is running, or this is a forward within one.
        """
        me = threading.current_thread()
        calls = self._calls(sys._getframe())
        if calls > 1:
            raise RuntimeError(
                "a forward was started inside a forward of the same model: with an adapter on, a "
                "model serves one forward at a time. Run it after the outer one, or on a copy."
            )
        with self._changed:
            while (holder := self._holder) is not None and self._is_inside(holder):
                if holder.what == "forward" and holder.thread is me:
                    break  # an interrupted one, or this could not have begun
                if holder.what == "forward":
                    raise RuntimeError(
                        f"this model is running in thread {holder.thread.name!r} already: a model "
                        "with an adapter serves one forward at a time. Guard it by a lock, or give "
                        "each thread a pipeline."
                    )
                if holder.thread is me:
                    return  # a forward that is part of a switch
                self._changed.wait(POLL)
            self._holder = _Holder("forward", me, calls == 1)

    def is_mine(self) -> bool:
        """Whether this thread's forward has the turn; not so if it was refused."""
        holder = self._holder
        if holder is None or holder.what != "forward":
            return False
        return holder.thread is threading.current_thread() and self._calls(sys._getframe()) <= 1

    def end_forward(self) -> None:
        """Give the turn back."""
        with self._changed:
            self._holder = None
            self._changed.notify_all()

    @contextmanager
    def switch(self, *, interruptible: bool = True) -> Iterator[None]:
        """Within: no forward runs, and Ctrl-C waits until the end; switches may nest.

        Args:
            interruptible: Whether Ctrl-C ends the waiting for a running forward.

        Raises:
            RuntimeError: From inside a forward of the same model.
        """
        me = threading.current_thread()
        if self._calls(sys._getframe()):
            raise RuntimeError(
                "an adapter can't be put on, taken off or switched from inside a forward of its "
                "model: do it between forwards."
            )
        guard: AbstractContextManager[object] = nullcontext() if interruptible else deferred()
        with guard:
            self._take(me)
            with deferred():
                try:
                    yield
                finally:
                    with self._changed:
                        self._depth -= 1
                        if not self._depth:
                            self._holder = None
                            self._changed.notify_all()

    def _take(self, me: threading.Thread) -> None:
        begun = time.monotonic()
        with self._changed:
            while (other := self._busy(me)) is not None:
                self._changed.wait(POLL)
                if time.monotonic() - begun > PATIENCE:
                    logger.warning("shiva_dit: waiting for the forward in thread %r", other)
                    begun = float("inf")
            self._depth = self._depth + 1 if self._mine(me) else 1
            self._holder = _Holder("switch", me, False)

    def _mine(self, me: threading.Thread) -> bool:
        holder = self._holder
        return holder is not None and holder.what == "switch" and holder.thread is me

    def _busy(self, me: threading.Thread) -> str | None:
        """The name of a thread that must be waited for."""
        holder = self._holder
        if holder is not None and holder.thread is not me and self._is_inside(holder):
            return holder.thread.name
        # Before an adapter is on, forwards take no turns: their stacks alone show them.
        for number, frame in _frames().items():
            if number != me.ident and self._calls(frame):
                return next((t.name for t in threading.enumerate() if t.ident == number), "?")
        return None

    def _is_inside(self, holder: _Holder) -> bool:
        """Whether a turn is still being used."""
        thread = holder.thread
        if not thread.is_alive():
            return False
        if holder.what == "switch" or not holder.is_on_stack:
            return True
        if thread is threading.current_thread():
            return False  # it is here, at the beginning of another
        frame = _frames().get(thread.ident or 0)
        return frame is not None and self._calls(frame) > 0

    def _calls(self, frame: FrameType | None) -> int:
        """How many calls of the model a stack holds."""
        model, calls = self._model(), 0
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is model:
                calls += 1
            frame = frame.f_back
        return calls


_LOOKING = threading.Lock()


def _frames() -> dict[int, FrameType]:
    """Where every thread is.

    Python 3.11 holds the lock of its list of threads while it makes these frames: a collection of
    garbage amid that, whose finalizers let another thread on, would wait for that lock for ever.
    """
    with _LOOKING:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if collects:
                gc.enable()


_TURNS: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def turns_of(model: nn.Module) -> Turns:
    """The turns on a model."""
    with _MAKING:
        if model not in _TURNS:
            _TURNS[model] = Turns(model)
        return _TURNS[model]


@contextmanager
def deferred() -> Iterator[None]:
    """Within: Ctrl-C waits until the end (in the main thread, which alone receives signals)."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    late: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: late.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if late:
            before(*late[0])
