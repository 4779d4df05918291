"""The demo tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from shiva_dit.demo.scenes import ScenesTask
from shiva_dit.demo.task import DemoTask


def _digits() -> DemoTask:
    # scikit-learn, which holds the digits, is asked for where they are.
    from shiva_dit.demo.digits import DigitsTask  # noqa: PLC0415

    return DigitsTask()


def _emoji() -> DemoTask:
    # Pillow reads the pictures.
    from shiva_dit.demo.emoji import EmojiTask  # noqa: PLC0415

    return EmojiTask()


TASKS: dict[str, Callable[[], DemoTask]] = {
    "digits": _digits,
    "scenes": ScenesTask,
    "scenes64": partial(ScenesTask, 64),
    "emoji": _emoji,
}


def load_task(name: str) -> DemoTask:
    """A demo task.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; known: {', '.join(TASKS)}.")
    return TASKS[name]()
