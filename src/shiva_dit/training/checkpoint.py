"""Checkpoints: written whole or not at all, and read back to the bit."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from shiva_dit.provenance import (
    WRITING,
    data_digest,
    file_digest,
    load_tensors,
    read_json,
    sync,
    write_atomically,
    write_json,
)
from shiva_dit.signals import undisturbed

TENSORS_FILE, STATE_FILE = "tensors.safetensors", "state.json"
DIGEST, OWN_DIGEST = "tensors_sha256", "sha256"
PREFIX = "step-"
KEEP = 2
_NAME = re.compile(PREFIX + r"\d{8}")
REPLACED, REMOVED = ".replaced-", ".removed-"
"""Begin the names of a checkpoint that makes room for another of the same step, and of one that
is being deleted."""
_LEFT = re.compile(rf"({re.escape(WRITING)}|{re.escape(REMOVED)}){_NAME.pattern}")
_LEFT_BY_OLDER = re.compile(re.escape(WRITING) + r"[a-z0-9_]{8}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, and plain state."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint beside the earlier ones and rename it into place; keep the last two.

    Whatever breaks it off, at whatever instant, `latest_checkpoint` gives a whole one: this, or
    the one before. Only folders that are checkpoints by name and content are ever deleted.

    Args:
        folder: Folder of all checkpoints of a run, which no other process writes into.
        step: Optimizer steps done.
        checkpoint: What to write.

    Raises:
        OSError: If it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{PREFIX}{step:08d}"
    target, temporary = folder / name, folder / f"{WRITING}{name}"
    tensors = {name: value.detach().cpu().clone() for name, value in checkpoint.tensors.items()}
    tidy(folder)
    try:
        write_atomically(temporary / TENSORS_FILE, lambda path: save_file(tensors, path))
        about = {DIGEST: file_digest(temporary / TENSORS_FILE), "state": checkpoint.state}
        write_json(temporary / STATE_FILE, {**about, OWN_DIGEST: data_digest(about)})
        if target.exists():
            target.rename(folder / f"{REPLACED}{name}")
        temporary.rename(target)
    except BaseException:
        with undisturbed():
            tidy(folder)
        raise
    sync(folder)
    tidy(folder)
    return target


def tidy(folder: Path) -> None:
    """Keep the last checkpoints, and finish what a killed process has left unfinished.

    No other process may be writing checkpoints there.
    """
    for old in _all(folder)[:-KEEP]:
        if _NAME.fullmatch(old.name) and _is_ours(old):
            old.rename(folder / f"{REMOVED}{old.name}")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir() or path.is_symlink():
            continue
        if _LEFT.fullmatch(path.name) or _LEFT_BY_OLDER.fullmatch(path.name):
            shutil.rmtree(path)
        elif _NAME.fullmatch(path.name.removeprefix(REPLACED)) and path.name.startswith(REPLACED):
            new = folder / path.name.removeprefix(REPLACED)
            shutil.rmtree(path) if new.exists() else path.rename(new)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: If it is damaged; the error says which earlier one to go back to.
        PermissionError: If it may not be read.
    """
    try:
        data = read_json(path / STATE_FILE)
        # Older ones have no digest of the state itself.
        if not isinstance(data, dict) or data.keys() - {OWN_DIGEST} != {DIGEST, "state"}:
            raise ValueError(f"{STATE_FILE} is not a checkpoint's")
        own = data.pop(OWN_DIGEST, None)
        if own is not None and own != data_digest(data):
            raise ValueError(f"{STATE_FILE} is not the file that was saved: its SHA-256 differs")
        if not isinstance(data["state"], dict):
            raise ValueError(f"{STATE_FILE} is not a checkpoint's")
        if file_digest(path / TENSORS_FILE) != data[DIGEST]:
            raise ValueError(f"{TENSORS_FILE} is not the file that was saved: its SHA-256 differs")
        return Checkpoint(load_tensors(path / TENSORS_FILE), data["state"])
    except PermissionError:
        raise  # it may be whole: nobody shall be told to remove it
    except (OSError, ValueError) as error:
        others = ", ".join(p.name for p in _all(path.parent) if p != path) or "none"
        raise ValueError(
            f"checkpoint {path} is damaged ({error}). Remove it to go on from an earlier one "
            f"({others})."
        ) from error


def _all(folder: Path) -> list[Path]:
    """Checkpoints, the earliest first; one that is about to be replaced counts until it is."""
    found = {
        path.name.removeprefix(REPLACED): path
        for path in sorted(folder.iterdir() if folder.is_dir() else [])  # REPLACED sorts first
        if _NAME.fullmatch(path.name.removeprefix(REPLACED)) and path.is_dir()
    }
    return [found[name] for name in sorted(found)]


def _is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint as we write it, and nothing else."""
    held = {entry.name for entry in path.iterdir()}
    return not path.is_symlink() and held == {TENSORS_FILE, STATE_FILE}
