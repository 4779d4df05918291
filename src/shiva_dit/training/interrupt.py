"""Ctrl-C in training: the step in hand is finished and saved, not broken into."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, after the step in hand was finished and everything saved in `checkpoint`."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; saved in {checkpoint}")
        self.checkpoint = checkpoint


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Within: the first Ctrl-C fills the list instead of breaking into the middle of a step."""
    interrupted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # only the main thread receives signals
        return

    def remember(number: int, frame: object) -> None:
        del frame
        interrupted.append(number)
        signal.signal(signal.SIGINT, before)
        tqdm.write("Finishing this step and saving; Ctrl-C again stops without.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within: Ctrl-C does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
