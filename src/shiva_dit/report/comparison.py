"""Tables of a comparison: what it judged, by arm."""

from __future__ import annotations

from typing import Any

from shiva_dit.report.layout import by_seed, known, markdown_rows, sampled_by, spread

ATTRIBUTES = ("count", "shape", "colour", "size", "place")
"""What a judge of captioned scenes reads."""
COLUMNS = {
    "attributes": ("arm", "judged right", *ATTRIBUTES, "kernel distance"),
    "comparison": (
        "arm", "FLOPs", "keep", "held-out error x 1000", "distance to real",
        "distance to unpruned", "judged right", "ink kept", "train, CPU s per step",
    ),
    "routers": (
        "arm", "parameters", "FLOPs", "held-out error x 1000", "cosine", "distance to real",
    ),
    "targets": (
        "arm", "keep, asked", "keep", "FLOPs", "held-out error x 1000", "distance to real",
        "distance to unpruned",
    ),
    "own": (
        "arm", "FLOPs", "keep", "PSNR to unpruned, dB", "held-out error x 1000",
        "train, CPU s per step",
    ),
}  # fmt: skip
"""Tables of a comparison's record; "own" is that of a model without a judge."""
JUDGED = (
    ("distance to real", "frechet", "{:.2f}"),
    ("judged right", "correct", "{:.1%}"),
    ("kernel distance", "kernel", "{:.1f}"),
)
"""Columns of what a judge says."""


def comparison_rows(record: dict[str, Any], kind: str = "comparison") -> list[list[str]]:
    """Header and rows of a comparison's table, with the columns of a kind (`COLUMNS`).

    Raises:
        ValueError: If the record doesn't hold what the kind shows.
    """
    columns = COLUMNS["own" if kind == "comparison" and "floor" not in record else kind]
    if not record["rows"]:
        raise ValueError("it has no rows: at least that of the unpruned model is needed.")
    rows = [list(columns)]
    for row in record["rows"]:
        if "flops" not in row:
            rows.append([row["name"], _failures(row), *["-"] * (len(columns) - 2)])
            continue
        cells = _cells(row, record["rows"][0])
        missing = [column for column in columns if column not in cells]
        if missing:
            raise ValueError(f"a table {kind!r} can't be made: the record has no {missing[0]!r}.")
        rows.append([cells[column] for column in columns])
    return rows


def comparison_table(record: dict[str, Any], kind: str = "comparison") -> str:
    """A comparison's table, as Markdown."""
    config = record["config"]
    note = (
        f"{record['about']} {config['settings']['count']} images per arm and seed, "
        f"{by_seed(config['seeds'])} {_floor(record)}"
        f"{sampled_by(config['settings'].get('sampler'))}"
    )
    return f"{markdown_rows(comparison_rows(record, kind))}\n\n{note}"


def _floor(record: dict[str, Any]) -> str:
    if "floor" not in record:
        return ""
    return f"Floor of the distance to real: {record['floor']['frechet']:.2f}. "


def _cells(row: dict[str, Any], unpruned: dict[str, Any]) -> dict[str, str]:
    """All that a table may show of a comparison's arm, by column."""

    def to_unpruned(measured: str, form: str, scale: float = 1.0) -> str:
        values = row.get(f"{measured}_by_seed")
        if values is None or (row is unpruned and measured.startswith("held_out")):
            return "-"
        return spread([scale * value for value in values], form)

    return {
        "arm": row["name"] + (f" ({_failures(row)})" if "failed" in row else ""),
        "FLOPs": f"{row['flops'] / unpruned['flops']:.3f}",
        "keep": f"{row['keep_ratio']:.3f}",
        "keep, asked": known(row.get("keep_ratio_asked"), "{:.3f}"),
        "parameters": known(row.get("parameters"), "{:,}"),
        "held-out error x 1000": to_unpruned("held_out_error", "{:.2f}", 1000.0),
        "cosine": to_unpruned("held_out_cosine", "{:.4f}"),
        "PSNR to unpruned, dB": to_unpruned("psnr", "{:.1f}"),
        "distance to unpruned": to_unpruned("frechet_to_dense", "{:.2f}"),
        **{
            column: spread(row[f"{measured}_by_seed"], form)
            for column, measured, form in JUDGED
            if f"{measured}_by_seed" in row
        },
        **{
            name: spread(row[f"right_{name}_by_seed"], "{:.1%}")
            for name in ATTRIBUTES
            if f"right_{name}_by_seed" in row
        },
        "ink kept": known(row.get("ink_kept"), "{:.0%}"),
        "train, CPU s per step": (
            f"{row['train_cpu_s'] / row['steps']:.2f}" if "steps" in row else "-"
        ),
    }


def _failures(row: dict[str, Any]) -> str:
    """What became of the seeds that gave no result."""
    failed = row["failed"]
    steps = [str(found["step"]) for found in failed if found["step"] is not None]
    said = []
    if steps:
        said.append(f"diverged at step {', '.join(steps)}")
    if len(steps) < len(failed):
        said.append("pictures not finite")
    whole = len(row.get("flops_by_seed", []))
    return (f"{whole} of {whole + len(failed)} seeds; " if whole else "") + "; ".join(said)
