"""The table of a forward from files."""

from __future__ import annotations

from statistics import median
from typing import Any

from shiva_dit.report.layout import known, markdown_rows


def export_table(record: dict[str, Any]) -> str:
    """A forward as it is, compiled, and from files, as Markdown (`benchmarks/export.py`)."""
    rows = [["arm", "CPU ms per forward", "of eager", "off by", "made, s", "first call, s"]]
    for row in record["rows"]:
        cells = [row["arm"], f"{median(row['cpu_ms']):.0f}", f"{row['of_eager']:.2f}"]
        cells += ["0" if row["off_by"] == 0 else f"{row['off_by']:.0e}"]
        cells += [known(row.get(key), "{:.1f}") for key in ("made_cpu_s", "first_cpu_s")]
        rows.append(cells)
    config, where = record["config"], record["provenance"]
    note = (
        f"{config['model']} with {config['layers']} blocks, {config['tokens']:,} image tokens of "
        f"which all blocks but the first keep {config['keep']:.0%}, {config['text']} text tokens, "
        f"batch 1, {config['dtype']}; {where['device']}, {where['threads']} thread; medians of "
        f"{config['repeats']} interleaved rounds. All seconds are of CPU: made is tracing, "
        "compiling, checking and writing, first call is loading (files) or compiling "
        "(torch.compile, by blocks) and one forward."
    )
    return f"{markdown_rows(rows)}\n\n{note}"
