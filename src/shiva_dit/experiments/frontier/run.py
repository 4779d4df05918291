"""Run a frontier: every point's pictures and FLOPs, then times in turn, then the record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from shiva_dit.config import to_dict
from shiva_dit.experiments.contestants import SHOWN
from shiva_dit.experiments.frontier.config import REFERENCE, Frontier, Point, points
from shiva_dit.experiments.frontier.executed import counted
from shiva_dit.experiments.frontier.put import (
    adapter_files,
    adapter_folder,
    arm_on,
    reason,
    refusals,
)
from shiva_dit.experiments.frontier.quality import judged, on_front, to_truth
from shiva_dit.experiments.frontier.source import Source, source_of
from shiva_dit.experiments.frontier.times import time_points
from shiva_dit.experiments.maps import kept_shares
from shiva_dit.experiments.scoring import floors
from shiva_dit.ownership import owned
from shiva_dit.provenance import (
    load_tensors,
    provenance,
    read_as,
    read_json,
    write_atomically,
    write_json,
)

POINTS = "points"
"""Folder, within a frontier's, of one file of pictures and one of numbers per point and seed."""
LARGEST = 1e6
"""Pictures lie about [-1, 1]: what has run away is no point."""


def run_frontier(frontier: Frontier, out: Path) -> dict[str, Any]:
    """Run what isn't done yet, time the points in turn, and write the record.

    A point that something of others' refuses is recorded with the reason, and the rest goes on.

    Args:
        frontier: What to run.
        out: Folder for `points`, `times.json` and `record.json`. Points that it holds are not run
            again, unless their adapter has changed.

    Returns:
        The record.

    Raises:
        ValueError: If the folder holds points of other settings, or another process is at work in
            it.
    """
    source = source_of(frontier)
    todo = points(frontier)
    for point in todo:
        adapter_folder(point, source)  # what is missing is said before anything runs
    with owned(out), torch.no_grad():
        (out / POINTS).mkdir(exist_ok=True)
        start = time.perf_counter()
        bar = tqdm(todo, desc=frontier.what, unit="point")
        for point in bar:
            bar.set_postfix_str(point.name)
            _point(frontier, source, point, out)
        ran = [point for point in todo if _number(out, point, "failed") is None]
        times = time_points(frontier, source, ran, out)
        record = _record(frontier, source, times, out)
        record["wall_s"] = time.perf_counter() - start
        write_json(out / "record.json", record)
    return record


def _point(frontier: Frontier, source: Source, point: Point, out: Path) -> None:
    """One point's pictures, unless they are there; the pictures are written first."""
    path = out / POINTS / f"{point.name}.json"
    run = _identity(frontier, source, point)
    if path.is_file() and _is_same(path, run):
        return  # one that was refused is tried again: what it lacked may be there now
    plain: dict[str, Any] = {"run": run, "provenance": provenance()}
    try:
        tensors, flops = _pictures(frontier, source, point)
    except refusals(point.arm) as error:
        plain["failed"] = reason(error)
    else:
        file = path.with_suffix(".safetensors")
        write_atomically(file, lambda path: save_file(tensors, path))
        plain["flops"] = flops
    write_json(path, plain)


def _pictures(frontier: Frontier, source: Source, point: Point) -> tuple[dict[str, Tensor], float]:
    """A point's pictures, with the kept tokens of the first, and FLOPs per picture, as executed."""
    parts, shares = [], []
    with arm_on(point, source) as (pipe, run), counted(pipe.transformer) as counts:
        for start in range(0, frontier.count, frontier.batch):
            count = min(frontier.batch, frontier.count - start)
            watched = start < SHOWN and not point.arm.whole_steps and point.arm.cache is None
            with kept_shares(pipe.transformer, count) if watched else nullcontext() as kept:
                parts.append(run(count, start))
            if kept is not None and kept.shares is not None:
                shares.append(kept.shares)
    images = torch.cat(parts)
    if not float(images.abs().max()) < LARGEST:
        raise FloatingPointError("its pictures are not finite")
    # Off by 2.4e-4 at most: 84 dB.
    tensors = {"images": images.clamp(-1, 1).half().contiguous()}
    if shares:
        tensors["kept"] = torch.cat(shares)[:SHOWN]
    return tensors, sum(counts) / frontier.count


def _identity(frontier: Frontier, source: Source, point: Point) -> dict[str, Any]:
    """All that decides a point's pictures."""
    said = to_dict(frontier)
    same = ("task", "pipeline", "prompts", "size", "base", "device", "count", "batch")
    return {
        **{name: said[name] for name in same},
        "arm": point.arm.runs_by(),
        "steps": point.steps,
        "guidance": point.guidance,
        "seed": point.seed,
        "files": adapter_files(point, source),
        "source": source.identity,
    }


def _is_same(path: Path, run: Mapping[str, Any]) -> bool:
    """Whether a point was made with these settings and this adapter, and has pictures."""
    with read_as("point of a frontier", path):
        plain = read_json(path)
        found = plain["run"]
    if {**found, "files": None} != {**run, "files": None}:
        raise ValueError(
            f"{path} was made with other settings: remove it to run that point again, or use "
            "another folder (--out)."
        )
    return found["files"] == run["files"] and "failed" not in plain


def _record(
    frontier: Frontier, source: Source, times: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """What all points are worth, by guidance."""
    fronts = []
    for guidance in frontier.guidance:
        by_arm: dict[tuple[str, int], list[Point]] = {}
        for point in points(frontier):
            if point.guidance == guidance:
                by_arm.setdefault((point.key, point.steps), []).append(point)
        truth = by_arm.pop((REFERENCE, frontier.reference_steps))
        wanted = [_images(out, point) for point in truth]
        forward = _number(out, truth[0], "flops") / frontier.reference_steps
        rows = [
            _row(source, out, found, wanted, forward, times)
            for found in tqdm(by_arm.values(), desc="judging", unit="point")
        ]
        _mark(rows)
        fronts.append({"guidance": guidance, "forward_flops": forward, "rows": rows})
    record: dict[str, Any] = {
        "what": frontier.what,
        "about": frontier.about,
        "config": to_dict(frontier),
        "fronts": fronts,
        "modes": times["modes"],
        "provenance": provenance(),
    }
    if source.prompts:
        record["prompts"] = list(source.prompts[:SHOWN])
    if source.task is not None and source.judge is not None:
        record["floor"] = dataclasses.asdict(floors(source.task, source.judge, frontier.count))
    return record


def _row(
    source: Source,
    out: Path,
    found: Sequence[Point],
    wanted: Sequence[Tensor],
    forward: float,
    times: Mapping[str, Any],
) -> dict[str, Any]:
    first = found[0]
    row: dict[str, Any] = {
        "arm": first.key,
        "name": first.arm.name,
        "series": first.arm.line,
        "kind": first.arm.kind or first.arm.line,
        "steps": first.steps,
    }
    failed = next((r for p in found if (r := _number(out, p, "failed")) is not None), None)
    if failed is not None:
        return {**row, "failed": failed}
    images = [_images(out, point) for point in found]
    flops = [_number(out, point, "flops") for point in found]
    row["flops"] = sum(flops) / len(flops)
    row["forwards"] = row["flops"] / forward
    row |= to_truth(images, wanted)
    if source.task is not None and source.judge is not None:
        row |= judged(images, wanted, source.task, source.judge)
    return row | {"times": times["points"].get(f"{first.key}-{first.steps}-{first.guidance:g}", {})}


def _mark(rows: list[dict[str, Any]]) -> None:
    """Say which rows are on the front: by FLOPs, and by time in each mode."""
    known = [row for row in rows if "psnr" in row]
    for row, on in zip(
        known, on_front([r["forwards"] for r in known], [r["psnr"] for r in known]), strict=True
    ):
        row["on_front"] = on
    for mode in {mode for row in known for mode in row["times"]}:
        timed = [row for row in known if "share" in row["times"].get(mode, {})]
        costs = [row["times"][mode]["share"] for row in timed]
        for row, on in zip(timed, on_front(costs, [r["psnr"] for r in timed]), strict=True):
            row["times"][mode]["on_front"] = on


def _images(out: Path, point: Point) -> Tensor:
    return load_tensors(out / POINTS / f"{point.name}.safetensors")["images"].float()


def _number(out: Path, point: Point, name: str) -> Any:
    return read_json(out / POINTS / f"{point.name}.json").get(name)
