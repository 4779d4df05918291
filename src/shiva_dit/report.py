"""Tables of documents, written from records: a number in a document is a number in a record."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shiva_dit.api.supported import supported
from shiva_dit.benchmark.tables import operator_note, operator_rows, timing_note, timing_rows
from shiva_dit.models.families.refused import REFUSED
from shiva_dit.provenance import read_as, read_json, read_text, write_atomically

_BLOCK = re.compile(
    r"(<!-- table (?P<kind>\w+)(?:: (?P<record>\S+))? -->(?P<end>\r?\n))(?P<body>.*?)"
    r"(<!-- end table -->)",
    re.S,
)


def write_tables(document: Path) -> str:
    """Write a document's tables anew, and leave all else of the file as it is; returns its text.

    Raises:
        ValueError: As `render`, or if it is not UTF-8.
        OSError: If it can't be read or written.
    """
    text = read_text(document, as_it_is=True)
    made = render(text, document.parent)
    if made != text:
        file = Path(os.path.realpath(document))  # a link stays one
        mode = file.stat().st_mode & 0o777
        write_atomically(file, lambda path: path.write_bytes(made.encode()), mode=mode)
    return made


def render(text: str, folder: Path) -> str:
    """A document with all its tables written anew.

    A table stands between `<!-- table KIND: RECORD -->` and `<!-- end table -->`; RECORD is a path
    relative to the document. The tables `models` and `refused` have none: they say what the code
    supports.

    Args:
        text: The document.
        folder: Its folder.

    Raises:
        ValueError: If a record is missing, a kind unknown, or a marker damaged.
    """
    found = len(_BLOCK.findall(text))
    for marker in ("table", "end table"):
        written = len(re.findall(rf"<!--\s*{marker}\b", text))
        if written != found:
            raise ValueError(
                f"{written} markers of {marker!r} in {folder}, but {found} whole tables: a table "
                "stands between <!-- table KIND: RECORD --> and <!-- end table -->."
            )

    def replace(match: re.Match[str]) -> str:
        made = table(match).replace("\n", match["end"])
        return f"{match[1]}{made}{match['end']}{match[6]}"

    def table(match: re.Match[str]) -> str:
        kind = match["kind"]
        if kind in PLAIN_TABLES:
            return PLAIN_TABLES[kind]()
        if kind not in TABLES or match["record"] is None:
            known = ", ".join((*TABLES, *PLAIN_TABLES))
            raise ValueError(f"there is no table {kind!r} of a record; known: {known}.")
        path = folder / match["record"]
        if not path.is_file():
            raise ValueError(f"the record {path} is missing.")
        record = read_json(path)
        with read_as(f"record of a table {kind!r}", path):
            return TABLES[kind](record)

    return _BLOCK.sub(replace, text)


def refused_table() -> str:
    """Models that can't be served, and why, as Markdown."""
    return markdown_rows([["class", "why not"], *([f"`{n}`", w] for n, w in REFUSED.items())])


def models_table() -> str:
    """The supported models, as Markdown."""
    rows = [["model", "class", "guidance", "context of the router", "learned by"]]
    for model in supported():
        name = f"`{model.model_class}`"
        rows.append([model.name, name, model.guidance, model.context, model.learned_by])
    return markdown_rows(rows)


def quickstart_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the quickstart's table."""
    dense = _row(record, "method", "dense")
    rows = [
        ["method", "FLOPs per image", "judged right", "distance to real", "distance to unpruned",
         "PSNR to unpruned, dB", "train, CPU s", "sample, CPU s"]
    ]  # fmt: skip
    for row in record["rows"]:
        rows.append(
            [
                row["name"],
                f"{row['flops'] / 1e9:.2f} G ({row['flops'] / dense['flops']:.2f})",
                _spread(row["correct_by_seed"], "{:.1%}"),
                _spread(row["frechet_by_seed"], "{:.2f}"),
                _paired(row, "frechet_to_dense", "{:.2f}"),
                _paired(row, "psnr", "{:.1f}"),
                f"{row['train_cpu_s']:.0f}" if row["train_cpu_s"] else "-",
                f"{row['sample_cpu_s']:.1f}",
            ]
        )
    return rows


def _row(record: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    for row in record["rows"]:
        if row[key] == value:
            return row
    raise ValueError(f"there is no row whose {key} is {value!r}.")


def quickstart_note(record: dict[str, Any]) -> str:
    """What must be known to read the quickstart's table."""
    config = record["config"]
    return (
        f"Keep ratio asked {config['keep_ratio']:g}, executed {record['keep_ratio_executed']:.4f}; "
        f"{config['count']} images per method and seed, {_by_seed(config['seeds'])} "
        "Distances are Frechet's, in the judge's features. "
        f"Floor of that to real ({config['count']} real training digits): "
        f"{record['frechet_floor']:.2f}. {sampled_by(record.get('sampler'))}"
    )


SAMPLERS = {
    "euler": "Euler over t = 1, 1 - 1/n, ..., 1/n",
    "unipc": "UniPC",
    "euler_diffusers": "Euler with diffusers' default steps",
}


def sampled_by(sampler: str | None) -> str:
    """How a record's pictures were sampled, in a sentence or two; None: the record doesn't say."""
    if sampler is None:
        return "Sampled by Euler with diffusers' default steps, before the fix."
    return (
        f"Sampled by {SAMPLERS[sampler]} unless a row says otherwise; what is compared with the "
        "unpruned model is with its pictures by UniPC in twice the steps."
    )


def quickstart_table(record: dict[str, Any]) -> str:
    """The quickstart's table, as Markdown."""
    return f"{markdown_rows(quickstart_rows(record))}\n\n{quickstart_note(record)}"


def plain_table(record: dict[str, Any]) -> str:
    """The quickstart's table, for a terminal."""
    return f"{plain_rows(quickstart_rows(record))}\n\n{quickstart_note(record)}"


def markdown_rows(rows: list[list[str]]) -> str:
    """Header and rows as a Markdown table.

    Raises:
        ValueError: If there are no rows below the header, or nothing stands in them.
    """
    head, *body = rows
    if not body or len(head) < 2:
        raise ValueError("it gives an empty table: there is nothing in it that could stand there.")
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *body])


def plain_rows(rows: list[list[str]]) -> str:
    """Header and rows in columns, for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: dict[str, Any], unpruned: dict[str, Any]) -> dict[str, str]:
    """All that a table may show of a comparison's arm, by column."""

    def to_unpruned(measured: str, form: str, scale: float = 1.0) -> str:
        values = row.get(f"{measured}_by_seed")
        if values is None or (row is unpruned and measured.startswith("held_out")):
            return "-"
        return _spread([scale * value for value in values], form)

    return {
        "arm": row["name"] + (f" ({_failures(row)})" if "failed" in row else ""),
        "FLOPs": f"{row['flops'] / unpruned['flops']:.3f}",
        "keep": f"{row['keep_ratio']:.3f}",
        "keep, asked": _known(row.get("keep_ratio_asked"), "{:.3f}"),
        "parameters": _known(row.get("parameters"), "{:,}"),
        "held-out error x 1000": to_unpruned("held_out_error", "{:.2f}", 1000.0),
        "cosine": to_unpruned("held_out_cosine", "{:.4f}"),
        "distance to real": _spread(row["frechet_by_seed"], "{:.2f}"),
        "distance to unpruned": to_unpruned("frechet_to_dense", "{:.2f}"),
        "judged right": _spread(row["correct_by_seed"], "{:.1%}"),
        "kernel distance": _spread(row["kernel_by_seed"], "{:.1f}"),
        **{
            name: _spread(row[f"right_{name}_by_seed"], "{:.1%}")
            for name in ATTRIBUTES
            if f"right_{name}_by_seed" in row
        },
        "ink kept": _known(row.get("ink_kept"), "{:.0%}"),
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
    whole = len(row.get("frechet_by_seed", []))
    return (f"{whole} of {whole + len(failed)} seeds; " if whole else "") + "; ".join(said)


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
}  # fmt: skip
"""Tables of a comparison's record."""


def comparison_rows(record: dict[str, Any], kind: str = "comparison") -> list[list[str]]:
    """Header and rows of a comparison's table, with the columns of a kind (`COLUMNS`).

    Raises:
        ValueError: If the record doesn't hold what the kind shows.
    """
    columns = COLUMNS[kind]
    if not record["rows"]:
        raise ValueError("it has no rows: at least that of the unpruned model is needed.")
    rows = [list(columns)]
    for row in record["rows"]:
        if "frechet" not in row:
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
        f"{_by_seed(config['seeds'])} "
        f"Floor of the distance to real: {record['floor']['frechet']:.2f}. "
        f"{sampled_by(config['settings'].get('sampler'))}"
    )
    return f"{markdown_rows(comparison_rows(record, kind))}\n\n{note}"


def flips_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a flip test's table."""
    groups = ("all", "selected", "rejected")
    rows = [
        ["estimator", *groups, *(f"sign, {g}" for g in groups[1:]), "dL/dk sign", "dL/dk est/true"]
    ]
    for name, found in record["estimators"].items():
        budget = record["budget"].get(name)
        rows.append(
            [
                name,
                *(_known(found[group]["spearman"], "{:+.2f}") for group in groups),
                *(_known(found[group]["sign"], "{:.0%}") for group in groups[1:]),
                _known(budget and budget["sign"], "{:.0%}"),
                _known(budget and budget["median_of_estimate_over_truth"], "{:+.2f}"),
            ]
        )
    return rows


def flips_table(record: dict[str, Any]) -> str:
    """A flip test's table, as Markdown."""
    config = record["config"]
    tokens = config["tokens"] or "all"
    note = (
        f"{record['title']}: {config['images']} samples at as many times, {tokens} tokens of each "
        f"block flipped; loss: {config['loss']}. Rank correlations with the true effect, mean over "
        "samples and blocks; `-`: says nothing."
    )
    return f"{markdown_rows(flips_rows(record))}\n\n{note}"


def caption_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the caption ablation: share of ink kept, mean over pruned blocks."""
    names = {
        "true": "own caption",
        "empty": "no caption",
        "swapped": "another image's caption",
        "chance": "any token",
    }
    times = sorted(record["shares"]["true"], key=float, reverse=True)  # as a sampler goes
    rows = [["share of ink tokens kept", *(f"t = {t}" for t in times)]]
    for kind, name in names.items():
        found = record["shares"][kind]
        rows.append([name, *(f"{sum(found[t]) / len(found[t]):.0%}" for t in times)])
    return rows


def caption_table(record: dict[str, Any]) -> str:
    """The caption ablation's table, as Markdown."""
    return (
        f"{markdown_rows(caption_rows(record))}\n\n{record['count']} held-out images; ink is "
        f"{record['ink']:.0%} of the tokens; mean over the pruned blocks. At t = 1 nothing of the "
        "image is left."
    )


def _known(value: float | int | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _by_seed(seeds: list[int]) -> str:
    """How many seeds a table is of, and what its cells then hold."""
    if not seeds:
        raise ValueError("its config names no seeds: at least one is needed.")
    return f"{len(seeds)} seeds (mean ± standard deviation)." if len(seeds) > 1 else "1 seed."


def _paired(row: dict[str, Any], name: str, form: str) -> str:
    """What compares a method with the unpruned model's pictures; these have no such entry."""
    values = row.get(f"{name}_by_seed")
    return "-" if values is None else _spread(values, form)


def _spread(values: list[float], form: str) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return form.format(mean)
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{form.format(mean)} ± {form.format(deviation)}"


def speed_table(record: dict[str, Any]) -> str:
    """Latency of a dense and a pruned transformer, as Markdown."""
    lines = [
        "| batch | keep ratio | latency, ms (min to max) | speed-up | by FLOPs | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    if not record["cases"]:
        raise ValueError("it has no cases: at least one is needed.")
    for case in record["cases"]:
        low, high = case["dense_latency_ms_spread"]
        dense = f"{case['dense_latency_ms']:.1f} ({low:.1f} to {high:.1f})"
        lines.append(f"| {case['batch']} | dense | {dense} | 1 | 1 | |")
        for row in case["rows"]:
            low, high = row["latency_ms_spread"]
            lines.append(
                f"| {case['batch']} | {row['keep_ratio']:g} "
                f"| {row['latency_ms']:.1f} ({low:.1f} to {high:.1f}) | {row['speed_up']:.2f} "
                f"| {row['ideal_speed_up']:.2f} | {row['efficiency']:.2f} |"
            )
    return "\n".join(lines)


def benchmark_table(record: dict[str, Any]) -> str:
    """A benchmark's table, as Markdown."""
    return f"{markdown_rows(timing_rows(record))}\n\n{timing_note(record)}"


def operators_table(record: dict[str, Any]) -> str:
    """Where a benchmark's time goes, as Markdown."""
    return f"{markdown_rows(operator_rows(record))}\n\n{operator_note(record)}"


PLAIN_TABLES: dict[str, Callable[[], str]] = {"models": models_table, "refused": refused_table}
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "benchmark": benchmark_table,
    "captions": caption_table,
    **{kind: partial(comparison_table, kind=kind) for kind in COLUMNS},
    "flips": flips_table,
    "operators": operators_table,
    "quickstart": quickstart_table,
    "speed": speed_table,
}
