"""The quickstart's table."""

from __future__ import annotations

from typing import Any

from shiva_dit.report.layout import by_seed, markdown_rows, plain_rows, sampled_by, spread


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
                spread(row["correct_by_seed"], "{:.1%}"),
                spread(row["frechet_by_seed"], "{:.2f}"),
                _paired(row, "frechet_to_dense", "{:.2f}"),
                _paired(row, "psnr", "{:.1f}"),
                f"{row['train_cpu_s']:.0f}" if row["train_cpu_s"] else "-",
                f"{row['sample_cpu_s']:.1f}",
            ]
        )
    return rows


def quickstart_note(record: dict[str, Any]) -> str:
    """What must be known to read the quickstart's table."""
    config = record["config"]
    return (
        f"Keep ratio asked {config['keep_ratio']:g}, executed {record['keep_ratio_executed']:.4f}; "
        f"{config['count']} images per method and seed, {by_seed(config['seeds'])} "
        "Distances are Frechet's, in the judge's features. "
        f"Floor of that to real ({config['count']} real training digits): "
        f"{record['frechet_floor']:.2f}. {sampled_by(record.get('sampler'))}"
    )


def quickstart_table(record: dict[str, Any]) -> str:
    """The quickstart's table, as Markdown."""
    return f"{markdown_rows(quickstart_rows(record))}\n\n{quickstart_note(record)}"


def plain_table(record: dict[str, Any]) -> str:
    """The quickstart's table, for a terminal."""
    return f"{plain_rows(quickstart_rows(record))}\n\n{quickstart_note(record)}"


def _row(record: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    for row in record["rows"]:
        if row[key] == value:
            return row
    raise ValueError(f"there is no row whose {key} is {value!r}.")


def _paired(row: dict[str, Any], name: str, form: str) -> str:
    """What compares a method with the unpruned model's pictures; these have no such entry."""
    values = row.get(f"{name}_by_seed")
    return "-" if values is None else spread(values, form)
