"""Model and data of a recipe's `task`."""

from __future__ import annotations

from torch import nn

from shiva_dit.demo.base import load_backbone
from shiva_dit.demo.digits import DigitsTask
from shiva_dit.training.data import TrainingData

TASKS = ("digits",)


def load_task(name: str) -> tuple[nn.Module, TrainingData]:
    """The trained backbone and the training data of a task.

    Raises:
        ValueError: If there is no such task.
    """
    if name != "digits":
        raise ValueError(f"there is no task {name!r}; known: {', '.join(TASKS)}.")
    task = DigitsTask()
    return load_backbone(task), task
