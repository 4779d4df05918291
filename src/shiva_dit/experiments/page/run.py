"""The page of a training, under way or done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shiva_dit.experiments.page.content import Page, Table, file_uri, origin
from shiva_dit.provenance import read_as, read_json, read_text
from shiva_dit.training.log import LOG_FILE, read_log
from shiva_dit.training.looks.looks import CURVES
from shiva_dit.training.looks.pictures import FOLDER
from shiva_dit.training.recipe_file import RECIPE_FILE
from shiva_dit.training.result import RESULT_FILE
from shiva_dit.training.run import RUN_FILE

COLUMNS = ("loss", "keep", "distill", "guided", "held_out", "held_out_guided", "seconds_left")
"""What a row of the table says, where it is known."""
ROWS = 12
"""Of a table where a run wasn't looked at."""


def run_page(folder: Path) -> Page:
    """Curves, the last look's pictures, figures and recipe.

    Raises:
        ValueError: If its log or record is damaged.
    """
    with read_as("record of a run", folder / RUN_FILE):
        begun = read_json(folder / RUN_FILE)
        facts = origin(begun["provenance"])
    lines = read_log(folder / LOG_FILE)
    looks = sorted((folder / FOLDER).glob("step-*.png"))
    figures = []
    if (folder / CURVES).is_file():
        figures.append(("Curves", file_uri(folder / CURVES)))
    for name, look in {"First look": looks[:1], "Last look": looks[1:][-1:]}.items():
        figures += [(name, file_uri(path)) for path in look]
    if (folder / RECIPE_FILE).is_file():
        facts.append(("recipe", read_text(folder / RECIPE_FILE)))
    return Page(
        title=f"Training in {folder.resolve().name}",
        about=_said(folder, lines),
        figures=figures,
        tables=[Table(caption="Steps", rows=rows)] if (rows := _rows(lines)) else [],
        facts=facts,
    )


def _said(folder: Path, lines: list[dict[str, Any]]) -> str:
    if not (folder / RESULT_FILE).is_file():
        return f"Not done: {lines[-1]['step'] if lines else 0} steps so far."
    with read_as("result of a run", folder / RESULT_FILE):
        result = read_json(folder / RESULT_FILE)
        said = f"Done after {result['steps']} steps in {result['seconds']:.0f} seconds."
        if "flops_pruned" in result["cost"]:
            share = result["cost"]["flops_pruned"] / result["cost"]["flops_dense"]
            kept = result["cost"]["keep_ratio"]
            said += f" It keeps {kept:.0%} of the tokens and takes {share:.1%} of the FLOPs."
    return said


def _rows(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Header and rows: of every look or, where there were none, of steps evenly apart."""
    shown = [line for line in lines if "seconds_left" in line]
    if not shown:
        apart = -(-len(lines) // ROWS) or 1
        shown = lines[::-1][::apart][::-1]
    if not shown:
        return []
    columns = [name for name in COLUMNS if any(name in line for line in shown)]
    rows = [["step", "stage", *(name.replace("_", " ") for name in columns)]]
    for line in shown:
        cells = [f"{line[name]:.4g}" if name in line else "-" for name in columns]
        rows.append([str(line["step"]), line["stage"], *cells])
    return rows
