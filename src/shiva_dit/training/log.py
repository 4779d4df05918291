"""A run's log: one JSON line per step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from shiva_dit.provenance import read_text, write_atomically

LOG_FILE = "log.jsonl"


class Log:
    """An open log.

    Args:
        path: Where it lies.
        file: The same, open.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file

    def write(self, values: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: If it can't be written; names the file.
        """
        try:
            self.file.write(json.dumps(values) + "\n")
        except OSError as error:  # a full disk, which names no file by itself
            raise OSError(
                error.errno, f"can't be written: {error.strerror}", str(self.path)
            ) from error


def shown(line: Mapping[str, Any]) -> dict[str, str]:
    """What a bar shows of a step."""
    digits = {"loss": 3, "keep": 3, "distill": 4, "guided": 4}
    found = {name: f"{line[name]:.{n}f}" for name, n in digits.items() if name in line}
    return {"stage": line["stage"], **found}


@contextmanager
def open_log(path: Path, step: int) -> Iterator[Log]:
    """Within: a log that goes on after a step; lines after that are dropped.

    Raises:
        ValueError: If what is there is no run's log.
    """
    kept = ""
    if path.exists():
        for number, line in enumerate(_lines(path), start=1):
            if line.endswith("\n") and _step_of(line, number, path) <= step:
                kept += line
    write_atomically(path, lambda file: file.write_text(kept, encoding="utf-8"))
    with path.open("a", encoding="utf-8", buffering=1) as file:
        yield Log(path, file)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; one that was broken off is left out."""
    if not path.is_file():
        return []
    found = []
    for line in read_text(path).splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found


def _lines(path: Path) -> list[str]:
    """The lines of a log."""
    try:
        return read_text(path).splitlines(True)
    except (ValueError, IsADirectoryError) as error:
        raise ValueError(
            f"{path} is not a run's log ({error}). Training doesn't need the log: move it away."
        ) from error


def _step_of(line: str, number: int, path: Path) -> int:
    """The step of a log's line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}, is not a line of a run's log ({error!r}). Training doesn't "
            "need the log: mend it or move it away."
        ) from error
