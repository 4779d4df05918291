"""Encoded tensors by key, many to a file: safetensors that are only ever added."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shiva_dit.provenance import write_atomically

MOST_BYTES = 128 * 2**20
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

    @classmethod
    def of(cls, record: dict[str, Tensor]) -> Kind:
        """That of a record."""
        names = tuple(sorted(record))
        values = [record[name] for name in names]
        return cls(names, tuple(v.dtype for v in values), tuple(tuple(v.shape) for v in values))


@dataclass(frozen=True, slots=True)
class Block:
    """Records of one kind in a file, their tensors stacked."""

    path: Path
    prefix: str
    kind: Kind
    starts: tuple[int, ...]
    """Where each tensor begins in the file."""

    def check(self, count: int, header: dict[str, Any]) -> None:
        """Raise unless the file's tensors are so many records.

        Raises:
            ValueError: If not.
        """
        for name, dtype, shape in zip(
            self.kind.names, self.kind.dtypes, self.kind.shapes, strict=True
        ):
            begin, end = header[self.prefix + name]["data_offsets"]
            if end - begin != count * dtype.itemsize * math.prod(shape) or not count:
                raise ValueError("a tensor's length isn't what its keys say")
        if not self.kind.names:
            raise ValueError("records without tensors")


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
        self._places: dict[str, tuple[Block, int]] = {}
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
        return self._places[key][0].kind

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
        alike: dict[Kind, list[str]] = {}
        for key, record in self._added.items():
            alike.setdefault(Kind.of(record), []).append(key)
        tensors, keys = {}, {}
        for number, (kind, own) in enumerate(alike.items()):
            keys[str(number)] = " ".join(own)
            for name in kind.names:
                stacked = torch.stack([self._added[key][name] for key in own])
                tensors[f"{number}.{name}"] = stacked
        last = int(self._files[-1].stem) if self._files else -1
        path = self.folder / f"{last + 1:06d}.safetensors"
        write_atomically(path, lambda file: save_file(tensors, file, metadata=keys))
        self._added, self._bytes = {}, 0
        self._list(path)

    def read(self, keys: Sequence[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """Records that are alike, one after the other along a new first axis.

        Args:
            keys: Of the records.
            pinned: Whether to read into pinned memory, from which a GPU copies by itself.

        Raises:
            KeyError: If one isn't there.
            ValueError: If a file is damaged, or they aren't alike.
        """
        places = [self._places[key] for key in keys]
        kind = places[0][0].kind
        if any(block.kind is not kind for block, _ in places):
            raise ValueError(f"{self.folder} has tensors of several kinds: encode into another.")
        columns = zip(kind.names, kind.dtypes, kind.shapes, strict=True)
        read = {
            name: torch.empty((len(keys), *shape), dtype=dtype, pin_memory=pinned)
            for name, dtype, shape in columns
        }
        views = [value.flatten(1).view(torch.uint8).numpy() for value in read.values()]
        for at, (block, row) in enumerate(places):
            with block.path.open("rb", buffering=0) as file:
                for view, start in zip(views, block.starts, strict=True):
                    file.seek(start + row * view.shape[1])
                    if not _fill(file, view[at].data):
                        raise ValueError(damaged(block.path, "it ends too early"))
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
            keys = header.pop("__metadata__")
            if 8 + length + max(about["data_offsets"][1] for about in header.values()) != size:
                raise ValueError("its length isn't what its header says")
            blocks = [
                (self._block(path, f"{number}.", header, 8 + length), own.split())
                for number, own in keys.items()
            ]
            for block, own in blocks:
                block.check(len(own), header)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(damaged(path, error)) from error
        self._files.append(path)
        for block, own in blocks:
            self._places.update((key, (block, row)) for row, key in enumerate(own))

    def _block(self, path: Path, prefix: str, header: dict[str, Any], start: int) -> Block:
        names = sorted(name for name in header if name.startswith(prefix))
        own = [header[name] for name in names]
        made = Kind(
            tuple(name.removeprefix(prefix) for name in names),
            tuple(DTYPES[about["dtype"]] for about in own),
            tuple(tuple(about["shape"][1:]) for about in own),
        )
        starts = tuple(start + about["data_offsets"][0] for about in own)
        return Block(path, prefix, self.kinds.setdefault(made, made), starts)


def _fill(file: FileIO, content: memoryview) -> bool:
    """Read until memory is full; whether there was enough."""
    while len(content):
        count = file.readinto(content)
        if not count:
            return False
        content = content[count:]
    return True


def damaged(path: Path, reason: object) -> str:
    """What to say of a file that can't be read."""
    return (
        f"{path} is not a whole safetensors file ({reason}): remove it and run the same "
        "`shiva-dit encode` again."
    )
