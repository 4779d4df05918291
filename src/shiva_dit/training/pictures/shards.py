"""Encoded tensors by key, many to a file: safetensors that are only ever added."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from shiva_dit.provenance import write_atomically

MOST_BYTES = 256 * 2**20
MOST_RECORDS = 1024
"""When a file is full."""
NAME = re.compile(r"\d{6}\.safetensors")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
"""As safetensors calls them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What tensors a record has: the same object for all that are alike."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def num_bytes(self) -> int:
        """Of one record."""
        sizes = zip(self.dtypes, self.shapes, strict=True)
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in sizes)


class Shards:
    """Records of a folder, each some named tensors under a key.

    Files are read a record at a time, without mapping them: memory doesn't grow with what was read.
    What is added is in memory until its file is full, or `flush`.

    Args:
        folder: The folder; made when something is written.

    Raises:
        ValueError: If a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: dict[Kind, Kind] = {}
        self._places: dict[str, tuple[int, Kind, tuple[int, ...]]] = {}
        self._added: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0
        self._files: list[Path] = []
        for path in sorted(folder.glob("*.safetensors")):
            if NAME.fullmatch(path.name):  # not what is being written
                self._list(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._added

    def __len__(self) -> int:
        """Number of records."""
        return len(self._places) + len(self._added)

    def kind(self, key: str) -> Kind:
        """What a record that is in a file is made of."""
        return self._places[key][1]

    def add(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Add a record, and write a file if it is full."""
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        self._added[key] = plain
        self._bytes += sum(value.nbytes for value in plain.values())
        if self._bytes >= MOST_BYTES or len(self._added) >= MOST_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        if not self._added:
            return
        number = int(self._files[-1].stem) + 1 if self._files else 0
        path = self.folder / f"{number:06d}.safetensors"
        flat = {
            f"{k}.{n}": value for k, record in self._added.items() for n, value in record.items()
        }
        write_atomically(path, lambda file: save_file(flat, file))
        self._added, self._bytes = {}, 0
        self._list(path)

    def read(self, key: str) -> dict[str, Tensor]:
        """A record.

        Raises:
            KeyError: If there is none.
            ValueError: If its file is damaged.
        """
        number, kind, offsets = self._places[key]
        path, read = self._files[number], {}
        with path.open("rb", buffering=0) as file:
            for name, dtype, shape, offset in zip(
                kind.names, kind.dtypes, kind.shapes, offsets, strict=True
            ):
                buffer = torch.empty(shape, dtype=dtype)
                file.seek(offset)
                view = buffer.view(-1).view(torch.uint8).numpy().data
                done = 0
                while done < len(view) and (got := file.readinto(view[done:])):
                    done += got
                if done < len(view):
                    raise ValueError(damaged(path, "it ends too early"))
                read[name] = buffer
        return read

    def _list(self, path: Path) -> None:
        """Take up the records of a file by its header."""
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= size - 8:
                    raise ValueError("no header")
                header = json.loads(file.read(length))
            start, records = 8 + length, _records(header)
            if start + max((o[1] for r in records.values() for *_, o in r), default=0) != size:
                raise ValueError("its length isn't what its header says")
            found = {key: self._place(record, start) for key, record in records.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(damaged(path, error)) from error
        number = len(self._files)
        self._files.append(path)
        for key, (kind, offsets) in found.items():
            self._places[key] = number, kind, offsets

    def _place(
        self, record: list[tuple[str, torch.dtype, tuple[int, ...], tuple[int, int]]], start: int
    ) -> tuple[Kind, tuple[int, ...]]:
        names, dtypes, shapes, offsets = zip(*sorted(record, key=lambda r: r[0]), strict=True)
        made = Kind(names, dtypes, shapes)
        for dtype, shape, (begin, end) in zip(dtypes, shapes, offsets, strict=True):
            if end - begin != dtype.itemsize * math.prod(shape):
                raise ValueError("a tensor's length isn't what its shape says")
        return self.kinds.setdefault(made, made), tuple(start + begin for begin, _ in offsets)


def _records(
    header: dict[str, dict],
) -> dict[str, list[tuple[str, torch.dtype, tuple[int, ...], tuple[int, int]]]]:
    records: dict[str, list] = {}
    for flat, about in header.items():
        if flat == "__metadata__":
            continue
        key, _, name = flat.partition(".")
        begin, end = about["data_offsets"]
        one = name, DTYPES[about["dtype"]], tuple(about["shape"]), (begin, end)
        records.setdefault(key, []).append(one)
    return records


def damaged(path: Path, reason: object) -> str:
    """What to say of a file that can't be read."""
    return (
        f"{path} is not a whole safetensors file ({reason}): remove it and run the same "
        "`shiva-dit encode` again."
    )
