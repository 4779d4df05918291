"""An adapter's folder: weights, and the config that names them by digest, changed in one step.

The config is what decides: new files lie beside the old ones until it is replaced, and take their
names afterwards. A reader in between, or after a kill, finds them under their digests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shiva_dit.provenance import (
    WRITING,
    data_digest,
    file_digest,
    read_json,
    sync,
    write_atomically,
    write_json,
)
from shiva_dit.signals import undisturbed

CLASS_NAME = "ShivaAdapter"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
BACKBONE_FILE = "tuned_backbone.safetensors"
CARD_FILE = "README.md"
WEIGHTS_FILES = (WEIGHTS_FILE, LORA_FILE, BACKBONE_FILE)
"""Of an adapter, or of the first part of several; `part_file` names those of the others."""
PART_NAME = r"[a-z0-9]{1,20}(?:-[a-z0-9]{1,20}){0,3}(?:\.[0-9]{1,6})?"
"""What a part may be called: nothing that could be a path, or the end of a file's name."""
ALL_WEIGHTS = tuple(p for n in WEIGHTS_FILES for p in (n, n.replace(".safe", ".*.safe")))
"""The same of all parts, as patterns for the Hub."""
CARD_START = "---\nlibrary_name: diffusers\n"
LARGEST_JSON = 2 * 2**20
"""Bytes of a config or of a weights file's header: far more than the largest models need, and
few enough for any content to be read before it is judged."""
_STEMS = "|".join(name.removesuffix(".safetensors") for name in WEIGHTS_FILES)
_OURS = rf"(?:{_STEMS})(?:\.{PART_NAME})?\.safetensors|{re.escape(CARD_FILE)}"
"""The files that are ours to write and to remove: weights of any part, and the card."""
_BESIDE = re.compile(rf"\.({_OURS})\.(.+)", re.DOTALL)
_STAGED = re.compile(r"[0-9a-f]{64}|new|removed|[a-z0-9_]{8}")
"""Ends the names of files that a save hasn't finished: a digest where the content is whole, eight
letters in older versions."""
Header = dict[str, tuple[str, tuple[int, ...]]]
"""Of a safetensors file: dtype, in its words, and shape of each tensor."""


def plain_config(folder: Path) -> Any:
    """What a folder's config holds, whatever it is; None if there is none.

    Raises:
        ValueError: If it is no JSON, or larger than any adapter's.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} has {size} bytes, an adapter's has at most {LARGEST_JSON}.")
    return read_json(path)


def commit(
    folder: Path, data: dict[str, Any], weights: Mapping[str, Callable[[Path], None]], card: str
) -> None:
    """Put an adapter into a folder that no other process writes into.

    Whatever breaks it off, the folder holds the adapter that was there or this one, and the next
    call removes what is left over.

    Args:
        folder: The folder.
        data: The config; the digests of the files are added.
        weights: By name of the file, what writes it.
        card: Text of the card. A card that the user has changed stays as it is.

    Raises:
        ValueError: If the folder holds something that isn't an adapter's under one of our names.
        OSError: If it can't be written.
    """
    remedy = f"Move {folder} away, or save into another folder."
    before = check_place(folder, weights, remedy)
    _settle(folder, before)
    writers: dict[str, Callable[[Path], object]] = dict(weights)
    if _card_is_ours(folder / CARD_FILE, before):
        writers[CARD_FILE] = lambda path: path.write_text(card, encoding="utf-8")
    digests: dict[str, str] = {}
    try:
        for name, write in writers.items():
            new = folder / f".{name}.new"
            write_atomically(new, write)
            digests[name] = file_digest(new)
            new.replace(folder / f".{name}.{digests[name]}")
        digests.setdefault(CARD_FILE, before.get(CARD_FILE, ""))  # of our last, not of the user's
        for name in before.keys() - digests.keys() - {CARD_FILE}:
            (folder / f".{name}.removed").touch()
        sync(folder)
        data["files"] = digests
        size = len(json.dumps(data, indent=2))
        if size > LARGEST_JSON:
            raise ValueError(
                f"{CONFIG_FILE} would have {size} bytes, it may have {LARGEST_JSON}: give the "
                "schedule fewer time bins, or the training record less."
            )
        write_json(folder / CONFIG_FILE, {**data, "digest": data_digest(data)})
    finally:
        with undisturbed():
            _settle(folder, _listed(folder))


def part_file(name: str, part: str | None) -> str:
    """The name of a part's weights file; None: of the first part, or of an adapter without parts.

    >>> part_file("diffusion_pytorch_model.safetensors", "low")
    'diffusion_pytorch_model.low.safetensors'
    """
    return name if part is None else name.replace(".safetensors", f".{part}.safetensors")


def weights_files(backbone: str, part: str | None = None) -> tuple[str, ...]:
    """Names of the weights files of an adapter that did this to the backbone (`ShivaConfig`).

    Args:
        backbone: "frozen", "lora", "dora" or "full".
        part: Of which part, as for `part_file`.
    """
    tuned = {"full": BACKBONE_FILE, "lora": LORA_FILE, "dora": LORA_FILE}
    names = (WEIGHTS_FILE, tuned[backbone]) if backbone in tuned else (WEIGHTS_FILE,)
    return tuple(part_file(name, part) for name in names)


def check_place(folder: Path, weights: Iterable[str], remedy: str) -> dict[str, str]:
    """Check that an adapter can be saved into a folder, whatever is there.

    Args:
        folder: The folder.
        weights: Names of the weights files that it would have.
        remedy: What to do if not; ends the error.

    Returns:
        What an adapter that is there lists: digests of its files, by name.

    Raises:
        ValueError: If something there is damaged, or isn't ours to replace.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file where an adapter's folder is expected. {remedy}")
    weights = tuple(weights)
    for name in (CONFIG_FILE, *dict.fromkeys((*WEIGHTS_FILES, *weights)), CARD_FILE):
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder where a file is expected. {remedy}")
    try:
        listed = _listed(folder)
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from error
    for name in weights:
        if name not in listed and (folder / name).exists():
            raise ValueError(
                f"{folder} holds a {name} that no adapter there lists: it is not ours to replace. "
                f"{remedy}"
            )
    return listed


def _listed(folder: Path) -> dict[str, str]:
    """Digests by name of the files that an adapter in a folder lists; none where there is none.

    Raises:
        ValueError: If the folder is something else's.
    """
    data = plain_config(folder)
    if data is None:
        return {}
    if not isinstance(data, dict) or data.get("_class_name") != CLASS_NAME:
        raise ValueError(f"{folder / CONFIG_FILE} is not an adapter's, and not ours to replace.")
    files = data.get("files")
    if not isinstance(files, dict):
        return {}
    return {name: digest for name, digest in files.items() if re.fullmatch(_OURS, name)}


def _settle(folder: Path, listed: Mapping[str, str]) -> None:
    """Finish a save by what the config lists, or undo it: new files get their names, or go."""
    for path in sorted(folder.glob(".*")):
        found = _BESIDE.fullmatch(path.name)
        if found is None:
            continue
        name, kind = found[1], found[2]
        if kind == listed.get(name):
            path.replace(folder / name)
        elif kind == "removed" and name not in listed:
            (folder / name).unlink(missing_ok=True)
            path.unlink()
        elif _STAGED.fullmatch(kind):
            path.unlink()
    for path in sorted(folder.glob(f"{WRITING}.*.new")):
        if re.fullmatch(_OURS, path.name.removeprefix(f"{WRITING}.").removesuffix(".new")):
            path.unlink()
    sync(folder)


def _card_is_ours(path: Path, listed: Mapping[str, str]) -> bool:
    """Whether a folder's card may be replaced: it is as we wrote it, or there is none."""
    if not path.exists():
        return True
    if CARD_FILE in listed:
        return file_digest(path) == listed[CARD_FILE]
    return bool(listed) and path.read_bytes().startswith(CARD_START.encode())  # older versions'


def weights_file(folder: Path, name: str, digests: Mapping[str, Any]) -> Path:
    """The file that the config means, also where a save was killed before it had its name.

    Raises:
        ValueError: If it is missing, or not the one that the config was written with.
    """
    path = folder / name
    digest = digests.get(name)
    if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
        staged = folder / f".{name}.{digest}"
        path = staged if staged.is_file() else path
    if not path.is_file():
        raise ValueError(f"{path} is missing: the adapter is incomplete, fetch it again.")
    if name not in digests:
        raise ValueError(
            f"{folder / CONFIG_FILE} doesn't list {name}: the two don't belong together."
        )
    if file_digest(path) != digest:
        raise ValueError(
            f"{path} is not the file that {CONFIG_FILE} was written with (its SHA-256 differs): "
            "it is truncated or was altered. Fetch or train the adapter again."
        )
    return path


def read_header(path: Path) -> Header:
    """Names, dtypes and shapes of a safetensors file; its tensors are not read.

    Raises:
        ValueError: If it is none, or its header is larger than any adapter's.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_JSON:
        raise ValueError(
            f"{path} is not a safetensors file of an adapter: its header would have {size} bytes, "
            f"at most {LARGEST_JSON} are read."
        )
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}.") from error
