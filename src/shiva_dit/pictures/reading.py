"""Folders of pictures: which there are, whose prompts they are of, and their pixels."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from shiva_dit.pictures.generate import METADATA
from shiva_dit.pictures.prompts import Prompt
from shiva_dit.provenance import data_digest, file_digest, read_as, read_text

KINDS = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)
"""What Pillow's readers raise on damaged files."""
SHOWN = 3
"""Names that an error lists."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """A folder's pictures."""

    folder: Path
    names: tuple[str, ...]
    """Paths below the folder, sorted."""
    prompts: Mapping[str, Prompt]
    """By name; empty where nobody says."""

    def __len__(self) -> int:
        """How many."""
        return len(self.names)

    def read(self, name: str) -> UInt8[Tensor, "3 H W"]:
        """The pixels of one of them."""
        return read_picture(self.folder / name)

    def texts(self, names: Sequence[str]) -> list[str] | None:
        """The prompts of some; None if nobody says."""
        return [self.prompts[name].text for name in names] if self.prompts else None

    def file_digest(self, name: str) -> str:
        """SHA-256 of the file of one of them.

        Raises:
            ValueError: If it can't be read.
        """
        try:
            return file_digest(self.folder / name)
        except OSError as error:
            raise ValueError(f"{self.folder / name} can't be read: {error}") from error

    def digest(self, known: Mapping[str, str] | None = None) -> str:
        """SHA-256 of the names and contents of all, and of their prompts.

        Args:
            known: SHA-256 of files, by name.
        """
        given = known or {}
        said = [
            [
                name,
                given.get(name) or self.file_digest(name),
                self.prompts[name].text if self.prompts else "",
            ]
            for name in self.names
        ]
        return data_digest(said)


def find_pictures(folder: Path, prompts: Sequence[Prompt] | None = None) -> Pictures:
    """The pictures of a folder and those below it.

    Args:
        folder: With or without the `metadata.jsonl` that `generate` writes.
        prompts: Of the pictures, by their ids: the id that `metadata.jsonl` says, or the file's
            name, or that without "-" and a seed at its end. By default `metadata.jsonl`'s own.

    Raises:
        ValueError: If there are none, one that is listed is missing, one that is there isn't
            listed, or one has no prompt or another one.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} of pictures: check the path.")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in KINDS and not path.name.startswith(".") and path.is_file()
    )
    there = set(names)
    listed = _metadata(folder / METADATA)
    missing = [name for name in listed if name not in there]
    if missing:
        raise ValueError(
            f"{folder} is not complete, {_some(missing, len(listed))} that {METADATA} lists are "
            "missing: run the same `shiva-dit generate` again, it goes on."
        )
    if not names:
        raise ValueError(f"there are no pictures ({', '.join(KINDS)}) in {folder}.")
    strange = [name for name in names if listed and name not in listed]
    if strange:
        raise ValueError(
            f"{folder} holds {_some(strange, len(names))} that {METADATA} doesn't list: move them "
            "elsewhere."
        )
    said = {name: row for name, row in listed.items() if row is not None}
    own = said if len(said) == len(names) else {}
    if prompts is None:
        return Pictures(folder, tuple(names), own)
    return Pictures(folder, tuple(names), _given(folder, names, own, prompts))


def _given(
    folder: Path, names: Sequence[str], own: Mapping[str, Prompt], prompts: Sequence[Prompt]
) -> dict[str, Prompt]:
    """Each picture's prompt of those that were given."""
    by_id = {prompt.id: prompt for prompt in prompts}
    found: dict[str, Prompt] = {}
    for name in names:
        stem = Path(name).stem
        ids = [own[name].id] if name in own else [stem, stem.rpartition("-")[0]]
        prompt = next((by_id[key] for key in ids if key in by_id), None)
        if prompt is None:
            raise ValueError(
                f"{folder / name} has no prompt in the file of prompts: expected one with the id "
                f"{ids[0]!r}."
            )
        if name in own and own[name].text != prompt.text:
            raise ValueError(
                f"{folder / name} was made of another prompt than that of the file of prompts with "
                f"the id {prompt.id!r}: take the file that the pictures were made of."
            )
        found[name] = prompt
    return found


def _metadata(path: Path) -> dict[str, Prompt | None]:
    """What a folder's list says of each picture."""
    if not path.is_file():
        return {}
    found: dict[str, Prompt | None] = {}
    with read_as("list of pictures", path):
        for line in filter(str.strip, read_text(path).splitlines()):
            row: Any = json.loads(line)
            name, text = str(row["file_name"]), row.get("prompt", row.get("text"))
            key = str(row.get("id", Path(name).stem))
            found[name] = Prompt(key, text) if isinstance(text, str) else None
    return found


def paired(ours: Pictures, theirs: Pictures) -> tuple[str, ...]:
    """The names of pictures that are in two folders.

    Raises:
        ValueError: If one of them has a picture that the other lacks.
    """
    for one, other in ((ours, theirs), (theirs, ours)):
        lone = sorted(set(one.names) - set(other.names))
        if lone:
            raise ValueError(
                f"{_some(lone, len(one))} of {one.folder} have no picture of that name in "
                f"{other.folder}: pictures are paired by name, make both with the same prompts and "
                "seeds."
            )
    return ours.names


def _some(names: Sequence[str], of: int) -> str:
    shown = ", ".join(names[:SHOWN])
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} of {of} pictures ({shown}{more})"


def read_picture(path: Path) -> UInt8[Tensor, "3 H W"]:
    """A picture's pixels, as a viewer shows them: turned as its EXIF says, gray as RGB.

    Raises:
        ValueError: If it can't be read, shows what lies behind it (transparency), or has values
            that 8 bits don't hold; it names the file.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large a picture, make it smaller: {error}") from error
    except UNREADABLE as error:
        raise ValueError(f"{path} can't be read as a picture: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has more than 8 bits a channel: save it as plain RGB first.")
    if image.has_transparency_data and _alpha(image) < 255:
        raise ValueError(f"{path} is transparent in places: put it on a background first.")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _alpha(image: Image.Image) -> int:
    """The lowest opacity of a pixel."""
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    assert isinstance(lowest, int)
    return lowest
