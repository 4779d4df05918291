"""Checkpoints: written whole or not at all, and read back to the bit."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shiva_dit.provenance import file_digest, write_json

TENSORS_FILE, STATE_FILE = "tensors.safetensors", "state.json"
DIGEST = "tensors_sha256"
PREFIX = "step-"
KEEP = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, and plain state."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint beside the earlier ones and rename it into place; keep the last two.

    Args:
        folder: Folder of all checkpoints of a run.
        step: Optimizer steps done.
        checkpoint: What to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{PREFIX}{step:08d}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        tensors = {name: value.detach().cpu().clone() for name, value in checkpoint.tensors.items()}
        save_file(tensors, temporary / TENSORS_FILE)
        digest = file_digest(temporary / TENSORS_FILE)
        write_json(temporary / STATE_FILE, {DIGEST: digest, "state": checkpoint.state})
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _all(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: If it is damaged; the error says which earlier one to go back to.
    """
    try:
        data = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.keys() != {DIGEST, "state"}:
            raise ValueError(f"{STATE_FILE} is not a checkpoint's")
        if file_digest(path / TENSORS_FILE) != data[DIGEST]:
            raise ValueError(f"{TENSORS_FILE} is not the file that was saved: its SHA-256 differs")
        return Checkpoint(load_file(path / TENSORS_FILE), data["state"])
    except (OSError, ValueError, SafetensorError) as error:
        others = ", ".join(p.name for p in _all(path.parent) if p != path) or "none"
        raise ValueError(
            f"checkpoint {path} is damaged ({error}). Remove it to go on from an earlier one "
            f"({others})."
        ) from error


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []
