"""Values of options, and what is checked of them."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

MOST_PER_CORE = 16
"""Threads or workers: torch and the system break down far above the number of cores."""


@runtime_checkable
class Command(Protocol):
    """Makes a command; returns what adds its arguments."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int], about: str, goes_on: bool = False
    ) -> Callable[..., Any]:
        """Make a command.

        Args:
            name: How it is called.
            run: Does it; returns the exit status.
            about: One line of help.
            goes_on: Whether the same call again goes on where it was interrupted.
        """
        ...


def program() -> str:
    """What this command was called by, for another call: it needn't be in the PATH."""
    name = sys.argv[0]
    return name if Path(name).name == "shiva-dit" else "shiva-dit"


def going_on(words: Sequence[str]) -> str:
    """What goes on with a call that was interrupted.

    Args:
        words: Of the call, without the program.
    """
    from shiva_dit.pictures.processes import Process

    again, count = shlex.join([program(), *words]), Process.launched().count
    launched = "" if count == 1 else f", by the launcher that started these {count} processes"
    return f"Go on with{launched}:\n  {again}"


def path(text: str) -> Path:
    """A path that the system can take."""
    from shiva_dit.config import usable_path

    try:
        return usable_path("path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(text: str) -> tuple[int, int]:
    """Width and height, from one side or "WIDTHxHEIGHT"."""
    sides = [positive(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"expected one side or WIDTHxHEIGHT, got {text!r}")
    return sides[0], sides[-1]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def use_threads(count: int | None) -> None:
    """Let torch use so many threads; all cores by default."""
    import torch

    if count is not None:
        torch.set_num_threads(bounded("--threads", count))


def bounded(what: str, count: int) -> int:
    """A number of threads or workers.

    Raises:
        ValueError: If it is far more than this machine has cores for.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    most = MOST_PER_CORE * cores
    if count > most:
        raise ValueError(
            f"{what} must be at most {most}, {MOST_PER_CORE} for each of the {cores} cores that "
            f"this process may use; got {count}."
        )
    return count
