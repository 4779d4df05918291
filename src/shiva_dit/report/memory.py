"""The table of what training takes."""

from __future__ import annotations

from typing import Any

from shiva_dit.report.layout import markdown_rows

GIB = 2**30


def memory_table(record: dict[str, Any]) -> str:
    """Counted memory by model and card, as Markdown (`benchmarks/memory.py`)."""
    rows = [["", "GPU", "what fits", "GiB"]]
    for row in record["rows"]:
        cells = [row["model"], f"{row['gib']} GB", row["settings"], f"{row['total'] / GIB:.1f}"]
        rows.append(cells)
    return markdown_rows(rows)
