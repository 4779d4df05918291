"""Captions in metadata.jsonl and metadata.csv, as the Hub's image folders have them."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shiva_dit.provenance import read_text
from shiva_dit.training.pictures.entry import Problem, Words

METADATA = ("metadata.jsonl", "metadata.csv")
FILE = "file_name"
KIND = "metadata"


@dataclass(slots=True)
class Metadata:
    """Captions by file, and which were asked for."""

    captions: dict[str, list[str]] = field(default_factory=dict)
    lines: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Of each file that is named: its path, and the line that names it."""
    problems: list[Problem] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def take(self, picture: Path) -> list[str]:
        """The captions of a picture; none if it isn't named."""
        key = _key(picture)
        self.taken.add(key)
        return self.captions.get(key, [])

    def unused(self) -> Iterator[tuple[Path, str]]:
        """Files that are named and weren't asked for, and the lines that name them."""
        for key, (path, line) in self.lines.items():
            if key not in self.taken:
                yield path, line


def read_metadata(files: list[Path], words: Words) -> Metadata:
    """All rows of all files; what is wrong with one is a problem."""
    metadata = Metadata()
    for file in files:
        try:
            rows = list(_rows(file))
        except (ValueError, csv.Error, OSError) as error:
            said = str(error) if str(file) in str(error) else f"{file} can't be read: {error}"
            metadata.problems.append(Problem(KIND, said))
            continue
        for number, row in rows:
            _add(metadata, file, f"{file}, line {number},", row, words)
    return metadata


def _add(metadata: Metadata, file: Path, line: str, row: Any, words: Words) -> None:
    name = row.get(FILE) if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        said = f"{line} has no {FILE}: write the picture's there, or remove the line"
        metadata.problems.append(Problem(KIND, said))
        return
    picture = file.parent / name.replace("\\", "/")
    key = _key(picture)
    try:
        captions = words.of_row(row, line)
    except ValueError as error:
        captions = None
        metadata.problems.append(Problem(KIND, str(error)))
        metadata.taken.add(key)
    else:
        if captions is not None:
            metadata.captions.setdefault(key, []).extend(captions)
        elif all(value in (None, "") for name, value in row.items() if name != FILE):
            metadata.captions.setdefault(key, []).append("")
        else:
            said = f"{line} has {words.missing(row, FILE)}"
            metadata.problems.append(Problem(KIND, said))
    metadata.lines.setdefault(key, (picture, line))


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    text = read_text(file)
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}, line {number}, is damaged, it is not JSON: {error}"
            ) from error


def _key(path: Path) -> str:
    """The same for one name, however its accents are written."""
    return unicodedata.normalize("NFC", str(path.absolute()))
