"""Tables of benchmarks."""

from __future__ import annotations

from typing import Any

from shiva_dit.benchmark.tables import operator_note, operator_rows, timing_note, timing_rows
from shiva_dit.report.layout import markdown_rows


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
