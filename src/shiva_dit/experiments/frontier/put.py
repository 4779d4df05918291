"""An arm put on a pipeline: adapters, controls, reducers, caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import shiva_dit
from shiva_dit.demo.base import shipped_adapter
from shiva_dit.experiments.frontier.caches import cached, fresh
from shiva_dit.experiments.frontier.config import SHIPPED, Arm, Point
from shiva_dit.experiments.frontier.source import Source
from shiva_dit.experiments.kept import put_on
from shiva_dit.experiments.scoring import noise_seed
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.compiling import compile_options
from shiva_dit.models.families import model_spec
from shiva_dit.pictures.putting import put_method_on
from shiva_dit.provenance import file_digest
from shiva_dit.saved_folder import CONFIG_FILE

Run = Callable[[int, int], Any]
"""Makes so many pictures, from the prompt of that number on."""


def refusals(arm: Arm, *, compiled: bool = False) -> tuple[type[Exception], ...]:
    """Errors of an arm that are a result, not a fault of ours.

    Caches and the compiler are others' code, and raise whatever they like; our methods say what
    they can't do by a ValueError.
    """
    if arm.cache is not None or compiled:
        return (Exception,)
    return (FloatingPointError,) if arm.method is None else (FloatingPointError, ValueError)


def reason(error: Exception) -> str:
    """An error in a line."""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0]}"[:200]


def adapter_folder(point: Point, source: Source) -> Path | None:
    """Where a point's adapter or control is.

    Raises:
        ValueError: If there is no such folder.
    """
    if point.arm.adapter is None:
        return None
    if point.arm.adapter == SHIPPED:
        assert source.task is not None
        return shipped_adapter(source.task)
    folder = Path(point.arm.adapter.format(seed=point.seed))
    if not folder.is_dir():
        raise ValueError(f"arms.{point.key}: there is no folder {folder} of an adapter or control.")
    return folder


def adapter_files(point: Point, source: Source) -> dict[str, str]:
    """SHA-256 of the files of a point's adapter or control, by name."""
    folder = adapter_folder(point, source)
    files = [] if folder is None else sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: file_digest(path) for path in files}


@contextmanager
def arm_on(point: Point, source: Source, *, compiled: bool = False) -> Iterator[tuple[Any, Run]]:
    """Within: a pipeline with a point's arm on, and what runs the point.

    Args:
        point: Which.
        source: Whose pictures.
        compiled: Whether the model's blocks are compiled, each by itself.

    Raises:
        ValueError: If something of it can't be had here.
    """
    arm = point.arm
    folder = adapter_folder(point, source)
    pipe = source.pipe(own_weights=folder is not None)

    def run(count: int, start: int) -> Any:
        if arm.cache is None:
            return source.run(pipe, point, count, start)
        with fresh(pipe.transformer, arm.cache):
            return source.run(pipe, point, count, start)

    with ExitStack() as stack:
        if folder is not None:
            _put_folder_on(folder, pipe, point)
        elif arm.method is not None:
            put_method_on(pipe.transformer, arm.method, arm.keep_ratio, seed=point.seed)
        if arm.whole_steps:
            shiva_dit.correct(pipe, arm.whole_steps, half_life=arm.half_life)
        if arm.cache is not None:
            one = min(2, point.steps)
            stack.enter_context(
                cached(pipe, arm.cache, arm.threshold, point.steps, lambda: run(one, 0))
            )
        if compiled:
            _compile(pipe.transformer, fullgraph=arm.cache is None)
        with torch.no_grad():
            yield pipe, run


def _compile(model: Any, *, fullgraph: bool) -> None:
    """Each block by itself, with whatever is on it."""
    options = {**compile_options(), "fullgraph": fullgraph}
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.compile(**options)
        return
    for block in model_spec(model).blocks(model):
        block.compile(**options)


def _put_folder_on(folder: Path, pipe: Any, point: Point) -> None:
    if (folder / CONFIG_FILE).is_file():
        shiva_dit.apply(pipe, folder, keep_ratio=point.arm.run_at)
    elif point.arm.run_at is not None:
        raise ValueError(f"{folder} is a control: run_at is for adapters.")
    else:
        put_on(folder, pipe.transformer, seed=noise_seed(point.seed) + 500)
