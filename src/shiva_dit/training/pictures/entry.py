"""One captioned picture as it was found, and how captions are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("text", "caption", "captions", "prompt")
"""Names under which captions stand, where none was said; the first that is there counts."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none that a person put there."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why something can't be taken."""

    kind: str
    """For counting: "picture", "caption" ..."""
    line: str
    """One line: which file, what is wrong, what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A picture, in a file or in memory, with its captions; or what is wrong with it."""

    name: str
    """From the top of what was searched, with slashes."""
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    captions: tuple[str, ...] = ()
    folder: str = ""
    """Name of the folder that it lies in, which may say how often it counts."""
    problem: Problem | None = None

    def read(self) -> bytes:
        """The picture's file.

        Raises:
            OSError: If it can't be read.
        """
        if self.path is None:
            assert self.data is not None
            return self.data
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """How captions are read."""

    column: str | None = None
    """Column, or field, that holds them; None takes the first of `COLUMNS`."""
    whole: bool = False
    """Whether all lines of a text are one caption, instead of one each."""

    def lines(self, data: bytes, name: str) -> list[str]:
        """The captions in a text file: one a line, blank lines apart; [""] of a blank one.

        Raises:
            ValueError: If it is not UTF-8; names it.
        """
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from error
        return self.split(text, name)

    def split(self, text: str, name: str) -> list[str]:
        """The captions in a text.

        Raises:
            ValueError: If it holds NUL, as UTF-16 does; names it.
        """
        if "\0" in text:
            raise ValueError(f"{name} is not UTF-8 text (it holds NUL): save it as UTF-8")
        lines = [text] if self.whole else text.splitlines()
        found = [" ".join(line.split()) for line in lines]
        return [line for line in found if line] or [""]

    def of_row(self, row: Mapping[str, Any], name: str) -> list[str] | None:
        """The captions in a row of a table; None if it has no such column, or nothing in it.

        Raises:
            ValueError: If there is something else than text; names it.
        """
        names = COLUMNS if self.column is None else (self.column,)
        value = next((row[n] for n in names if row.get(n) is not None), None)
        if value is None:
            return None
        several = value.tolist() if isinstance(value, np.ndarray) else value
        if isinstance(several, bytes):
            return self.lines(several, name)
        several = [several] if isinstance(several, str) else several
        if not isinstance(several, list) or not all(isinstance(text, str) for text in several):
            raise ValueError(f"{name} has a caption that is no text ({value!r}): make it one")
        return [caption for text in several for caption in self.split(text, name)] or None

    def missing(self, columns: Iterable[str | None], picture: str = "") -> str:
        """What a row of a table without a caption has to be told; its picture's column aside."""
        there = [name for name in columns if name not in (None, picture)]
        names = COLUMNS if self.column is None else (self.column,)
        empty = [name for name in names if name in there]
        if empty:
            return f"no caption: its {empty[0]} is empty"
        return (
            f"no caption under {' or '.join(names)} (it has: {', '.join(map(str, there))}): name "
            "the column by --caption-column"
        )
