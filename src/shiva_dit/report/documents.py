"""Documents whose tables are written anew."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shiva_dit.provenance import read_as, read_json, read_text, write_atomically
from shiva_dit.report.beside import beside_classes_table, beside_table
from shiva_dit.report.comparison import COLUMNS, comparison_table
from shiva_dit.report.estimators import caption_table, flips_table
from shiva_dit.report.export import export_table
from shiva_dit.report.frontier import frontier_table
from shiva_dit.report.memory import memory_table
from shiva_dit.report.models import models_table, refused_table
from shiva_dit.report.quickstart import quickstart_table
from shiva_dit.report.scores import scores_table
from shiva_dit.report.timing import benchmark_table, operators_table, speed_table

_BLOCK = re.compile(
    r"(<!-- table (?P<kind>\w+)(?:: (?P<record>\S+))? -->(?P<end>\r?\n))(?P<body>.*?)"
    r"(<!-- end table -->)",
    re.S,
)
PLAIN_TABLES: dict[str, Callable[[], str]] = {"models": models_table, "refused": refused_table}
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "benchmark": benchmark_table,
    "beside": beside_table,
    "beside_classes": beside_classes_table,
    "captions": caption_table,
    **{kind: partial(comparison_table, kind=kind) for kind in COLUMNS},
    "export": export_table,
    "flips": flips_table,
    "frontier": frontier_table,
    "memory": memory_table,
    "operators": operators_table,
    "quickstart": quickstart_table,
    "scores": scores_table,
    "speed": speed_table,
}


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
