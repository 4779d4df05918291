"""Emoji pictures and their names, from packages of the npm registry; nothing of them ships here."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor

from shiva_dit.ownership import check_folder, owned
from shiva_dit.provenance import load_tensors, read_as, read_json, write_atomically, write_json

SIDE = 64
PICTURES, NAMES = "emoji.safetensors", "emoji.json"
SKIN_TONES = {0x1F3FB, 0x1F3FC, 0x1F3FD, 0x1F3FE, 0x1F3FF}
TAGS, END_OF_TAGS = range(0xE0020, 0xE007F), 0xE007F
"""Spell the flags of regions."""
VARIATION = 0xFE0F
"""Asks for a picture instead of a letter; file names have it where names of emoji may not."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package at a version, by the SHA-256 of its file."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """As `npm pack` names it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


DRAWINGS = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
"""Fluent emoji in 3D, MIT."""
WORDS = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
"""What each emoji is called, MIT."""


@dataclass(frozen=True, slots=True)
class Emoji:
    """Pictures, by code points, and what they are called."""

    codes: tuple[str, ...]
    labels: tuple[str, ...]
    """Such as "grinning face"."""
    images: UInt8[Tensor, "M 3 H W"]


def place() -> Path:
    """Where the pictures lie: `$SHIVA_DIT_DATA`, or shiva-dit in the user's cache."""
    given = os.environ.get("SHIVA_DIT_DATA")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "shiva-dit"


def load(folder: Path | None = None) -> Emoji:
    """The pictures that `fetch` prepared.

    Raises:
        ValueError: If they aren't there, or damaged.
    """
    folder = place() if folder is None else folder
    if not (folder / NAMES).is_file() or not (folder / PICTURES).is_file():
        raise ValueError(
            f"there are no emoji pictures in {folder}: fetch them by `shiva-dit fetch emoji`."
        )
    with read_as("emoji pictures", folder / NAMES, folder / PICTURES):
        rows = read_json(folder / NAMES)["emoji"]
        images = load_tensors(folder / PICTURES)["images"]
        if len(rows) != len(images):
            raise ValueError(f"{len(rows)} names, {len(images)} pictures")
        codes, labels = ([row[name] for row in rows] for name in ("code", "label"))
    return Emoji(tuple(codes), tuple(labels), images)


def fetch(folder: Path, packages: Path | None = None) -> int:
    """Prepare the pictures at 64 x 64 on white, without skin tones.

    Args:
        folder: Where to write them.
        packages: A folder with both packages' files; by default `npm` fetches them.

    Returns:
        How many there are.

    Raises:
        ValueError: If a package can't be had, or is another file than the one that is known.
    """
    check_folder(folder)
    with TemporaryDirectory() as made, ExitStack() as stack:
        drawings, words = (
            stack.enter_context(tarfile.open(_package(package, packages, Path(made))))
            for package in (DRAWINGS, WORDS)
        )
        emoji = read(drawings, words)
    with owned(folder):
        images = {"images": emoji.images}
        write_atomically(folder / PICTURES, lambda path: save_file(images, path))
        rows = [
            {"code": code, "label": label}
            for code, label in zip(emoji.codes, emoji.labels, strict=True)
        ]
        sources = [f"{p.name} {p.version}, MIT" for p in (DRAWINGS, WORDS)]
        write_json(folder / NAMES, {"from": sources, "emoji": rows})
    return len(emoji.codes)


def read(drawings: tarfile.TarFile, words: tarfile.TarFile) -> Emoji:
    """The pictures that have a name and tags, in the order of their code points."""
    named = _named(words)
    found: dict[tuple[int, ...], tuple[str, UInt8[Tensor, "3 H W"]]] = {}
    for member in sorted(drawings.getmembers(), key=lambda one: one.name):
        path = Path(member.name)
        code = _code(path.stem) if path.suffix == ".webp" and member.isfile() else ()
        if not code or SKIN_TONES & set(code) or code not in named or code in found:
            continue
        file = drawings.extractfile(member)
        assert file is not None
        found[code] = named[code], pixels(file.read())
    codes = sorted(found)
    return Emoji(
        tuple("-".join(f"{point:x}" for point in code) for code in codes),
        tuple(found[code][0] for code in codes),
        torch.stack([found[code][1] for code in codes]),
    )


def pixels(content: bytes) -> UInt8[Tensor, "3 H W"]:
    """A picture on white, its sides made equal, at 64 x 64."""
    with Image.open(io.BytesIO(content)) as image:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
    made = ImageOps.pad(
        ground.convert("RGB"), (SIDE, SIDE), method=Image.Resampling.LANCZOS, color="white"
    )
    return torch.from_numpy(np.array(made)).permute(2, 0, 1).contiguous()


def _named(words: tarfile.TarFile) -> Mapping[tuple[int, ...], str]:
    file = words.extractfile("package/en/data.json")
    assert file is not None
    rows: list[dict[str, Any]] = json.loads(file.read())
    return {_code(row["hexcode"]): row["label"] for row in rows if row.get("tags")}


def _code(text: str) -> tuple[int, ...]:
    """Code points of "1f3f4-e0067_e0062"; () if it is no such name."""
    try:
        points = [int(part, 16) for part in text.replace("_", "-").split("-")]
    except ValueError:
        return ()
    ended = [END_OF_TAGS] if points[-1] in TAGS else []  # which file names leave out
    return tuple(point for point in [*points, *ended] if point != VARIATION)


def _package(package: Package, given: Path | None, fetched: Path) -> Path:
    path = (given or fetched) / package.file
    if given is None:
        _npm_pack(package, fetched)
    if not path.is_file():
        raise ValueError(
            f"there is no {path}: get it by `npm pack {package.name}@{package.version}`."
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path} isn't {package.name} {package.version} as it is known (SHA-256 {found[:12]}, "
            f"expected {package.sha256[:12]}): fetch it again."
        )
    return path


def _npm_pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            "npm isn't installed, which fetches the pictures: install it, or give a folder with "
            f"{DRAWINGS.file} and {WORDS.file} by --packages."
        )
    what = f"{package.name}@{package.version}"
    command = [npm, "pack", what, "--pack-destination", str(folder), "--silent"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ValueError(f"npm can't fetch {what}: {said}")
