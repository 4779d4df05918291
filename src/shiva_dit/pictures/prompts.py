"""Prompts from a file: lines of text, or JSON lines with names of their own."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiva_dit.provenance import read_text

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
"""What a prompt's id may be: it becomes a part of file names on every system."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and the name that its pictures go by."""

    id: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order.

    Args:
        path: Text with one prompt in a line (ids are "00000", "00001" and so on; empty lines don't
            count), or `.jsonl` of objects with "prompt" (or "text") and, if wanted, "id". The
            `metadata.jsonl` of generated pictures is such a file.

    Raises:
        ValueError: If there are none, a line is no such object, an id can't stand in a file's name,
            or two prompts have one id; it names the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} of prompts: check the path.")
    lines = [
        (number, line.strip())
        for number, line in enumerate(read_text(path).splitlines(), start=1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path} holds no prompts: write one in a line.")
    is_json = path.suffix.lower() in (".jsonl", ".ndjson")
    found: dict[str, Prompt] = {}
    places: dict[str, int] = {}
    for index, (number, line) in enumerate(lines):
        where = f"{path}, line {number}"
        prompt = _object(line, index, where) if is_json else Prompt(f"{index:05d}", line)
        key = prompt.id.casefold()  # on some systems "A.png" is "a.png"
        if key not in found:
            found[key], places[key] = prompt, number
        elif found[key] != prompt:
            raise ValueError(
                f"{where}: the id {prompt.id!r} is taken by line {places[key]} with another "
                "prompt: give each its own."
            )
    return list(found.values())


def _object(line: str, index: int, where: str) -> Prompt:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}.") from error
    text = data.get("prompt", data.get("text")) if isinstance(data, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where} is no prompt: expected {{"id": "...", "prompt": "..."}}.')
    name = data.get("id", f"{index:05d}")
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{where}: an id becomes a part of a file's name: up to 100 letters, digits, '.', '_' "
            f"and '-', got {name!r:.120}."
        )
    return Prompt(name, text)
