"""Tables of what every model class did beside other software."""

from __future__ import annotations

from collections import Counter
from typing import Any

from shiva_dit.report.layout import markdown_rows

STATUSES = {
    "works": "✓",
    "structure": "s",
    "refused": "R",
    "no effect": "·",
    "not offered": "-",
    "fails bare": "✗",
}
"""What can become of a class beside some software, and the mark of it in the table by class."""


def beside_table(record: dict[str, Any]) -> str:
    """Software, its version, and how many families did what beside it, as Markdown."""
    rows = [["", "version", *STATUSES]]
    for software, tried in record["tried"].items():
        found = Counter(tried["families"].values())
        counts = [str(found[status] or "") for status in STATUSES]
        rows.append([software, f"{tried['package']} {tried['version']}", *counts])
    return markdown_rows(rows)


def beside_classes_table(record: dict[str, Any]) -> str:
    """A row for every class, a column for every software, as Markdown.

    Where variants of a class differ, all their marks stand there.
    """
    tried = record["tried"]
    rows = [["", *tried]]
    for name in sorted(set(record["classes"].values()), key=str.lower):
        variants = [family for family, of in record["classes"].items() if of == name]
        cells = []
        for software in tried.values():
            marks = [
                STATUSES[software["families"][v]] for v in variants if v in software["families"]
            ]
            cells.append(" ".join(dict.fromkeys(marks)))
        rows.append([f"`{name}`", *cells])
    return markdown_rows(rows)
