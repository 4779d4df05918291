"""Signals in training: the step in hand is finished and saved, not broken into."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shiva_dit.signals import Stopped, handled, stop


class TrainingInterrupted(Stopped):
    """A signal, after the step in hand was finished and everything saved in `checkpoint`."""

    def __init__(self, checkpoint: Path, number: int = signal.SIGINT) -> None:
        super().__init__(number, f"interrupted; saved in {checkpoint}")
        self.checkpoint = checkpoint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.checkpoint, self.number)


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Within: the first signal fills the list instead of breaking into the middle of a step.

    A second one breaks off at once (`Stopped`).
    """
    interrupted: list[int] = []

    def remember(number: int, frame: object) -> None:
        if interrupted:
            stop(number, frame)
        interrupted.append(number)
        with contextlib.suppress(OSError, RuntimeError):  # the terminal is gone, or written to
            tqdm.write(
                "Finishing this step and saving; Ctrl-C again stops at once.", file=sys.stderr
            )

    with handled(remember):
        yield interrupted
