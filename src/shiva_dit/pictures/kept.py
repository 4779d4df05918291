"""What was found of pictures, kept part by part: dealt out over processes, and not found twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from shiva_dit.pictures.processes import Process
from shiva_dit.provenance import data_digest, write_atomically
from shiva_dit.training.processes import ALONE, Processes

Columns = Mapping[str, Tensor]
KEY = "files"
"""Of the digests of pictures, in what a file says beside its tensors."""


@dataclass(frozen=True, slots=True)
class Part:
    """What somebody has to say of some pictures."""

    asked: Any
    """All that decides the answer but the files: names, prompts, weights; plain JSON."""
    files: Callable[[], Sequence[str]]
    """Gives digests of the files."""
    found: Callable[[], Columns]
    """Gives the answer."""

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{data_digest(self.asked)[:32]}.safetensors"


@contextmanager
def kept_answers(folder: Path, processes: Processes) -> Iterator[Answers]:
    """Within: what was found lies in a folder that belongs to this run.

    Raises:
        ValueError: If it belongs to another that is going on.
    """
    try:
        with Process(rank=processes.rank, count=processes.count).owning(folder):
            yield Answers(folder, processes)
    finally:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


@dataclass(slots=True)
class Answers:
    """Finds parts and keeps them.

    Which pictures make a part is the same for any number of processes, and so are its bits.
    """

    folder: Path | None = None
    """Where they lie, for all processes and a later try; None: in memory, of one process."""
    processes: Processes = ALONE
    """Which share the work."""
    _held: dict[str, tuple[Sequence[str], Columns]] = field(default_factory=dict)

    def find(self, parts: Sequence[Part], what: str, *, show_progress: bool) -> bool:
        """Find some parts, each process its share; whether this is the one that reads them then.

        Args:
            parts: The same in all processes.
            what: Stands before the bar.
            show_progress: Whether a bar counts this process's share.
        """
        first = self.processes.is_first
        mine = self.processes.mine(len(parts))
        for number in tqdm(mine, desc=what, disable=not (show_progress and first)):
            part, now = parts[number], list(parts[number].files())
            known = self._read(part.name)
            if known is None or list(known[0]) != now:
                found = part.found()
                if self.folder is None:
                    self._held[part.name] = now, found
                else:
                    tensors = {name: rows.contiguous() for name, rows in found.items()}
                    said = {KEY: json.dumps(now)}
                    write_atomically(
                        self.folder / part.name, lambda p, t=tensors, s=said: save_file(t, p, s)
                    )
        self.processes.wait()
        return first

    def read(self, part: Part) -> tuple[Sequence[str], Columns]:
        """Digests of a part's files, and the answer, which some process has found.

        Raises:
            ValueError: If it is gone.
        """
        found = self._read(part.name)
        if found is None:
            raise ValueError(f"{self.folder}/{part.name} is gone: evaluate again.")
        return found

    def remove(self) -> None:
        """Forget all of it: what was asked for is answered."""
        self._held.clear()
        if self.folder is None:
            return
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def _read(self, name: str) -> tuple[Sequence[str], Columns] | None:
        if self.folder is None:
            return self._held.get(name)
        try:
            with safe_open(self.folder / name, "pt") as file:
                files = json.loads((file.metadata() or {})[KEY])
                return files, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError, KeyError, json.JSONDecodeError):
            return None  # not there, or not whole
