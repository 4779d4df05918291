"""What a folder of encoded pictures says of itself: `data.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiva_dit.provenance import read_as, read_json, write_atomically
from shiva_dit.training.pictures.pipelines import SD3

ABOUT = "data.json"
FORMAT = 2
"""Of the folder; the first had a file per picture."""
LATENTS = "latents"
TEXT = "text"
AGAIN = "run the same `shiva-dit encode` again"


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture that was encoded."""

    name: str
    key: str
    """Of its latents."""
    shape: tuple[int, int]
    """Width and height in pixels."""
    texts: tuple[str, ...]
    """Keys of its captions."""
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What was encoded, and by what."""

    samples: list[Sample]
    encoders: dict[str, str]
    """Digests: "vae" names the folder of latents, "text" that of captions."""
    empty: str
    """Key of the empty caption."""
    size: int
    pipeline: str
    """Its class."""
    model: str
    source: str
    """Where the pictures are."""
    files: str
    """Digest of the names, sizes and times of the pictures' files."""
    saved_as: dict[str, str] | None
    """Signature of the encoders' files, where they are on this machine."""
    summary: list[str]

    def folder(self, out: Path, kind: str) -> Path:
        """Where latents, or captions, lie."""
        return out / kind / self.encoders["vae" if kind == LATENTS else "text"][:16]

    def write(self, out: Path) -> None:
        """Write it into a folder: a line for each sample."""
        rest = {name: getattr(self, name) for name in sorted(self.__slots__) if name != "samples"}
        rest["format"] = FORMAT
        rows = (json.dumps([s.name, s.key, s.shape, s.texts, s.repeats]) for s in self.samples)
        lines = ",\n".join(rows)
        text = (
            json.dumps(rest, indent=2, sort_keys=True)[:-2] + f',\n  "samples": [\n{lines}\n]}}\n'
        )
        write_atomically(out / ABOUT, lambda file: file.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, out: Path) -> About:
        """Of a folder.

        Raises:
            ValueError: If it is damaged, or of another version.
        """
        path = out / ABOUT
        found = read_json(path)
        if isinstance(found, dict) and "format" not in found and "pictures" in found:
            raise ValueError(
                f"{path} is an older version's, with a file for each picture: encode into another "
                "folder."
            )
        with read_as("an encoding of pictures", path):
            return cls._of(found)

    @classmethod
    def _of(cls, found: dict[str, Any]) -> About:
        if found["format"] != FORMAT:
            raise ValueError("it is another version's: encode into another folder")
        samples = [
            Sample(name, key, (shape[0], shape[1]), tuple(texts), int(repeats))
            for name, key, shape, texts, repeats in found["samples"]
        ]
        if not samples or not all(isinstance(s.key, str) and s.texts for s in samples):
            raise ValueError("it doesn't say which pictures were encoded: encode them again")
        encoders = {name: str(found["encoders"][name]) for name in ("vae", "text")}
        rest = {
            name: found[name]
            for name in ("empty", "size", "model", "source", "files", "saved_as", "summary")
        }
        pipeline = str(found.get("pipeline", SD3))  # at first there was no other
        return cls(samples=samples, encoders=encoders, pipeline=pipeline, **rest)
