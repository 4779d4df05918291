"""Where a number came from, and how it is written down: atomically and reproducibly."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def provenance() -> dict[str, Any]:
    """Commit, versions and hardware, for a record.

    Returns:
        Keys `commit`, `dirty`, `versions`, `python`, `device`, `threads`. `commit` is None outside
        a checkout of this project.
    """
    # Installed below another project's checkout, git would answer with that project's commit.
    ours = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git("rev-parse", "HEAD") if ours else None
    status = _git("status", "--porcelain") if ours else None
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "commit": commit,
        "dirty": None if status is None else bool(status),
        "versions": versions,
        "python": platform.python_version(),
        "device": _device_name(),
        "threads": torch.get_num_threads(),
    }


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def hardware_name(record: dict[str, Any]) -> str:
    """Short name of the hardware in a `provenance`, for names of files.

    >>> hardware_name({"device": "AMD EPYC 7B13, 2 cores"})
    'epyc-2-cores'
    >>> hardware_name({"device": "NVIDIA H200"})
    'nvidia-h200'
    """
    words = re.sub(r"\(R\)|\(TM\)", " ", record["device"])
    model, _, cores = words.partition(", ")
    if not cores:
        return "-".join(model.lower().split())
    known = re.search(r"EPYC|Xeon|Ryzen|Core|Apple|Neoverse", model)
    name = known[0] if known else model
    return "-".join(f"{name} {cores}".lower().split())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,  # it takes milliseconds, save where the machine or its disk is busy
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: readers never see half a file.

    Args:
        path: The file to make or replace; its folder is made.
        write: Receives the path of the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_NUMBERS = re.compile(r"\[\n([-+.\deE,\s]+)\]")  # no string holds a raw line break


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, with sorted keys; dataclasses become objects, paths strings.

    A list of numbers stands on one line.
    """
    text = json.dumps(value, indent=2, sort_keys=True, default=_plain, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")
