"""Signals that ask a program to stop: as exceptions, held back where something is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""Ctrl-C, what `kill` and batch systems send, and a terminal that is closed."""


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.number = number
        """The signal; a shell expects 128 + this as exit status."""


def stop(number: int, frame: object = None) -> None:
    """As a signal's handler: break off at once, undoing what is half done on the way out."""
    del frame
    raise Stopped(number)


@contextmanager
def handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within: `SIGNALS` go to a handler, but for those it was told to ignore (`nohup`).

    Ctrl-C always does: a shell lets what it runs in the background ignore that, whoever asks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [
        number
        for number, old in before.items()
        if old is not None and (old != signal.SIG_IGN or number == signal.SIGINT)
    ]
    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within: signals wait. For the few lines that undo something; the first is sent afterwards."""
    waiting: list[int] = []
    try:
        with handled(lambda number, frame: waiting.append(number)):
            yield
    finally:
        if waiting:
            signal.raise_signal(waiting[0])
