"""From a folder to its page: a comparison's, a frontier's, generated pictures' or a training's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shiva_dit.config import from_dict
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.compare import REFERENCE
from shiva_dit.experiments.frontier.config import REFERENCE as TRUTH
from shiva_dit.experiments.frontier.config import Frontier, points
from shiva_dit.experiments.frontier.run import POINTS
from shiva_dit.experiments.page.content import (
    Page,
    Row,
    Table,
    drawn,
    map_uri,
    origin,
    picture_uri,
)
from shiva_dit.experiments.page.run import run_page
from shiva_dit.experiments.plots import (
    draw_comparison,
    draw_front,
    draw_schedules,
    draw_tradeoff,
)
from shiva_dit.pictures.generate import ABOUT
from shiva_dit.pictures.reading import find_pictures
from shiva_dit.provenance import read_as, read_json
from shiva_dit.report.comparison import comparison_rows
from shiva_dit.report.frontier import budget_rows, frontier_rows
from shiva_dit.report.scores import score_note, score_rows
from shiva_dit.training.run import RUN_FILE

RECORD, SCORES = "record.json", "scores.json"


def page_of(folder: Path, dense: Path | None = None, *, count: int = 6) -> Page:
    """The page of a folder that a command of ours filled.

    Args:
        folder: Of `train`, `compare`, `frontier` or `generate`.
        dense: Pictures of the unpruned model, of the same names, for `generate`'s.
        count: Pictures of each arm, of the first prompts.

    Raises:
        ValueError: If it is none of these, or not done.
    """
    if (folder / RUN_FILE).is_file():
        return run_page(folder)
    if dense is not None and not (folder / ABOUT).is_file():
        raise ValueError("--dense is for a folder that `shiva-dit generate` filled.")
    if (folder / ABOUT).is_file():
        return _generated(folder, dense, count)
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {RECORD}: give a folder of `shiva-dit train`, or of `compare`, "
            "`frontier` or `generate` that is done."
        )
    with read_as("record of a comparison or a frontier", path):
        record = read_json(path)
        if "fronts" in record:
            return _frontier(folder, record, count)
        if "runs_at" in record:
            return _comparison(folder, record, count)
    raise ValueError(f"{path} is the record of neither a comparison nor a frontier.")


def _comparison(folder: Path, record: dict[str, Any], count: int) -> Page:
    config = record["config"]
    settings, seed = config["settings"], config["seeds"][0]
    prompts = _prompts(settings.get("task"), record, count)
    rows, truth = [], None
    for row in record["rows"]:
        key = row["method"]
        tensors = _first(folder / f"{key}-{seed}.safetensors", count)
        if tensors is None:
            continue
        share = row["flops"] / record["rows"][0]["flops"]
        note = f"{share:.0%} of the FLOPs"
        if "psnr" in row:
            note += f", {row['psnr']:.1f} dB"
        made = _row(row["name"], note, tensors)
        if key == REFERENCE:
            truth = made
        else:
            rows.append(made)
    has_judge = "floor" in record
    figures = []
    if has_judge:
        figures.append(("Error and distance by arm", drawn(lambda p: draw_comparison(record, p))))
        if any("series" in arm for arm in config["arms"].values()):
            figures.append(("Quality for its cost", drawn(lambda p: draw_tradeoff(record, p))))
    if any(row.get("schedules") for row in record["rows"]):
        figures.append(("Learned keep ratios", drawn(lambda p: draw_schedules(record, p))))
    return Page(
        title=record["what"],
        about=record["about"],
        tables=[Table(caption="All arms", rows=comparison_rows(record))],
        figures=figures,
        truth=truth,
        rows=rows,
        prompts=prompts,
        pictures=_common(seed, settings["guidance"]),
        facts=[("seeds", str(len(config["seeds"]))), *origin(record["provenance"])],
    )


def _frontier(folder: Path, record: dict[str, Any], count: int) -> Page:
    frontier = from_dict(Frontier, record["config"], "a record")
    prompts = _prompts(frontier.task, record, count)
    guidance, seed = frontier.guidance[-1], frontier.seeds[0]
    fronts = {front["guidance"]: front for front in record["fronts"]}
    known = {(row["arm"], row["steps"]): row for row in fronts[guidance]["rows"]}
    rows, truth = [], None
    for point in points(frontier):
        if (point.guidance, point.seed) != (guidance, seed):
            continue
        tensors = _first(folder / POINTS / f"{point.name}.safetensors", count)
        row = known.get((point.key, point.steps), {})
        if tensors is None:
            continue
        if point.key == TRUTH:
            truth = _row(f"unpruned, {point.steps} steps", "the truth", tensors)
        elif _is_shown(row, point.steps, point.arm.steps):
            note = f"{row['forwards']:.2f} forwards, {row['psnr']:.1f} dB"
            rows.append((row["forwards"], _row(f"{row['name']}, {row['steps']}", note, tensors)))
    tables = []
    for scale in frontier.guidance:
        said = "no guidance" if scale == 1 else f"guidance {scale:g}"
        tables.append(Table(caption=f"Best by budget, {said}", rows=budget_rows(record, scale)))
        tables.append(Table(caption=f"All points, {said}", rows=frontier_rows(record, scale)))
    return Page(
        title=record["what"],
        about=record["about"],
        tables=tables,
        figures=[("Quality for its cost", drawn(lambda path: draw_front(record, path)))],
        truth=truth,
        rows=[row for _, row in sorted(rows, key=lambda pair: pair[0])],
        prompts=prompts,
        pictures=_common(seed, guidance),
        facts=[("seeds", str(len(frontier.seeds))), *origin(record["provenance"])],
    )


def _is_shown(row: Mapping[str, Any], steps: int, all_steps: tuple[int, ...]) -> bool:
    """What is on the front, and of each arm the middle number of steps."""
    if "psnr" not in row:
        return False
    return bool(row["on_front"]) or steps == sorted(all_steps)[len(all_steps) // 2]


def _generated(folder: Path, dense: Path | None, count: int) -> Page:
    ours = find_pictures(folder)
    names = ours.names[:count]
    prompts = ours.texts(names) or []

    def row(pictures: Any, name: str) -> Row:
        shown = [pictures.read(one).float() / 127.5 - 1.0 for one in names]
        return Row(name=name, pictures=[picture_uri(values) for values in shown])

    truth = None
    if dense is not None:
        theirs = find_pictures(dense)
        missing = [name for name in names if name not in theirs.names]
        if missing:
            raise ValueError(f"{dense} has no {missing[0]}: give pictures of the same names.")
        truth = row(theirs, "unpruned")
    with read_as("settings of pictures", folder / ABOUT):
        served = str(read_json(folder / ABOUT)["settings"]["served"])
    tables, facts = [], [("settings", served)]
    if (folder / SCORES).is_file():
        with read_as("record of scores", folder / SCORES):
            record = read_json(folder / SCORES)
            tables.append(Table(caption="Scores", rows=score_rows(record)))
            facts.append(("scores", score_note(record)))
    return Page(
        title=folder.resolve().name,
        about=f"{len(ours)} pictures.",
        tables=tables,
        truth=truth,
        rows=[row(ours, folder.resolve().name)],
        prompts=prompts,
        facts=facts,
    )


def _row(name: str, note: str, tensors: Mapping[str, Tensor]) -> Row:
    images = tensors["images"]
    height, width = images.shape[-2:]
    maps = [map_uri(shares, height, width) for shares in tensors.get("kept", ())]
    return Row(name=name, note=note, pictures=[picture_uri(one) for one in images], maps=maps)


def _first(path: Path, count: int) -> dict[str, Tensor] | None:
    """The first pictures of a file, without reading the others; None if it isn't there."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name)[:count] for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it and its .json, and run the command that made "
            "them again."
        ) from error


def _prompts(task: str | None, record: Mapping[str, Any], count: int) -> list[str]:
    if task is not None:
        return load_task(task).prompts(0, count)[0]
    return record.get("prompts", [])[:count]


def _common(seed: int, guidance: float) -> str:
    said = "without guidance" if guidance == 1 else f"guidance {guidance:g}"
    return f"Of the first prompts, seed {seed}, {said}; every arm begins from the same noise."
