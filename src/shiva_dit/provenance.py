"""Where a number came from, and how files are written and read: whole, reproducible, named."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shiva_dit.ownership import open_locked
from shiva_dit.signals import undisturbed

WRITING = ".writing-"
"""What the name of something unfinished begins with."""
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


def write_atomically(path: Path, write: Callable[[Path], object], *, mode: int = 0o644) -> None:
    """Let `write` fill a file beside `path`, then rename it: readers never see half a file.

    The content is on the disk before it has its name, so that a crash of the machine leaves the old
    file or the new one. A process that is killed leaves at most `.writing-NAME`, which the next
    write of the same file takes over.

    Args:
        path: The file to make or replace; its folder is made.
        write: Receives the path of the temporary file.
        mode: What the system lets whom do with the file.

    Raises:
        OSError: If it can't be written; it names `path`.
    """
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open_locked(temporary, wait=True)
        assert lock is not None
        with lock:
            try:
                write(temporary)
                temporary.chmod(mode)
                sync(temporary)
                temporary.replace(path)
            except BaseException:
                with undisturbed():
                    temporary.unlink(missing_ok=True)
                raise
        sync(path.parent)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{path} can't be written: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"can't be written: {reason}", str(path)) from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_digest(data: object) -> str:
    """SHA-256 of plain data, whatever the layout of the file that holds it.

    Raises:
        ValueError: If JSON can't hold it.
    """
    text = json.dumps(data, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of all content of named tensors: names, dtypes, shapes and every byte.

    The same on every device. A GiB takes half a second on a CPU that knows SHA-256.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        for plain in _plain_tensors(tensor.detach()):
            flat = plain.cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def module_digest(module: nn.Module) -> str:
    """SHA-256 of all content of a module's parameters and buffers (`tensors_digest`).

    Raises:
        ValueError: If their values aren't at hand, as under sequential offload.
    """
    state = {n: v for n, v in module.state_dict().items() if isinstance(v, Tensor)}
    if any(value.is_meta for value in state.values()):
        raise ValueError(
            f"the weights of {type(module).__name__} are on the meta device: offload it afterwards."
        )
    return tensors_digest(state.items())


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of: a quantised one holds several."""
    if hasattr(tensor, "full_tensor"):  # of which each process holds a share
        yield tensor.full_tensor()  # type: ignore[operator]
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def read_text(path: Path, *, as_it_is: bool = False) -> str:
    """The text of a file, without the byte order mark that it may begin with.

    Args:
        path: The file.
        as_it_is: Leave the mark, and ends of lines as they are: for what is written back.

    Raises:
        ValueError: If it is not UTF-8; it names the file.
        OSError: If it can't be read.
    """
    try:
        if as_it_is:
            return path.read_bytes().decode("utf-8")
        return path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error


def read_json(path: Path) -> Any:
    """The data of a JSON file.

    Raises:
        ValueError: If it is damaged or nested too deeply, or holds NaN or infinite numbers; it
            names the file.
        OSError: If it can't be read.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}.") from error


@contextmanager
def read_as(what: str, *paths: Path) -> Iterator[None]:
    """Within: data from files is looked into; what it lacks is an error that names them.

    Raises:
        ValueError: For a missing key, a value of another type or out of range, and the like.
    """
    try:
        yield
    except ZeroDivisionError as error:
        names = ", ".join(str(path) for path in paths)
        raise ValueError(
            f"{names} can't be read as {what}: a list is empty, or a number 0, that something is "
            "divided by."
        ) from error
    except (ValueError, ArithmeticError) as error:
        names = ", ".join(str(path) for path in paths)
        if any(str(path) in str(error) for path in paths):
            raise
        raise ValueError(f"{names} can't be read as {what}: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        names = ", ".join(str(path) for path in paths)
        raise ValueError(
            f"{names}: no {what}, or another version's ({type(error).__name__}: {error})."
        ) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: If it is damaged; it names the file.
        OSError: If it can't be read.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from error


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
