"""What the points of a frontier take, all in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shiva_dit.benchmark.timing import interleaved, keep_memory
from shiva_dit.config import to_dict
from shiva_dit.experiments.frontier.config import REFERENCE, Frontier, Point
from shiva_dit.experiments.frontier.put import adapter_files, arm_on, reason, refusals
from shiva_dit.experiments.frontier.source import Source
from shiva_dit.provenance import provenance, read_json, write_json


def time_points(
    frontier: Frontier, source: Source, ran: Sequence[Point], out: Path
) -> dict[str, Any]:
    """Seconds per picture of every point, and as share of the reference arm's at its most steps.

    All points of a guidance take turns in one process, each on a model of its own; those that
    don't run in a mode are left out with the reason. Only the first seed's.

    Args:
        frontier: What is timed.
        source: Whose pictures.
        ran: Points that have pictures.
        out: Folder for `times.json`; what is there is kept where nothing has changed.

    Returns:
        "points": by point and mode, the times or why there are none; "modes": where they were
        taken.
    """
    path = out / "times.json"
    said = to_dict(frontier)
    settings = {name: said[name] for name in ("timing", "guidance", "device", "reference")}
    first = [point for point in ran if point.seed == frontier.seeds[0]]
    settings["points"] = {
        point.name: {**point.arm.runs_by(), "files": adapter_files(point, source)}
        for point in first
    }
    if path.is_file():
        found = read_json(path)
        if found["settings"] == settings:
            return found
    made: dict[str, Any] = {"settings": settings, "points": {}, "modes": {}}
    if frontier.timing.repeats:
        keep_memory()
        for mode in frontier.timing.modes:
            made["modes"][mode] = provenance()
            for guidance in frontier.guidance:
                timed = [p for p in first if p.guidance == guidance and p.key != REFERENCE]
                for name, values in _in_turn(frontier, source, timed, mode).items():
                    made["points"].setdefault(name, {})[mode] = values
    write_json(path, made)
    return made


def _in_turn(
    frontier: Frontier, source: Source, timed: list[Point], mode: str
) -> dict[str, dict[str, Any]]:
    """Times of all points of a mode and guidance, by arm, steps and guidance."""
    made: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        for point in timed:
            name = f"{point.key}-{point.steps}-{point.guidance:g}"
            try:
                _, run = stack.enter_context(arm_on(point, source, compiled=mode == "compiled"))
                call = partial(run, frontier.timing.batch, 0)
                for _ in range(2 if mode == "compiled" else 1):
                    call()
            except refusals(point.arm, compiled=mode == "compiled") as error:
                made[name] = {"failed": reason(error)}
            else:
                calls[name] = call
        reference = f"{frontier.reference}-{_most(frontier)}-{timed[0].guidance:g}"
        if reference not in calls:
            raise ValueError(
                f"the arm {frontier.reference!r} doesn't run: {made[reference]['failed']}"
            )
        samples = interleaved(
            calls, repeats=frontier.timing.repeats, device=torch.device(frontier.device)
        )
    for name, found in samples.items():
        whole = samples[reference]
        made[name] = {
            "share": found.share_of(whole),
            "seconds": found.median_ms / 1000.0 / frontier.timing.batch,
        }
    return made


def _most(frontier: Frontier) -> int:
    """Steps of the arm that times are shares of."""
    return max(frontier.made()[frontier.reference].steps)
