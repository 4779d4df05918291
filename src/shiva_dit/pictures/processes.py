"""Work dealt out over processes that know nothing of each other but their numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shiva_dit.ownership import owned

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """Which of how many this process is."""

    rank: int = 0
    count: int = 1
    local: int = 0
    """Its number on this machine, which is that of its device."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count or self.local < 0:
            raise ValueError(
                f"RANK must lie in [0, WORLD_SIZE) = [0, {self.count}), got {self.rank}, and "
                f"LOCAL_RANK must be at least 0, got {self.local}."
            )

    @classmethod
    def launched(cls, environment: Mapping[str, str] | None = None) -> Process:
        """As `torchrun` or `accelerate launch` says; one alone if neither started it.

        Raises:
            ValueError: If the variables are no such numbers.
        """
        said = os.environ if environment is None else environment
        try:
            rank, count = int(said.get("RANK", 0)), int(said.get("WORLD_SIZE", 1))
            local = int(said.get("LOCAL_RANK", 0))
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error
        return cls(rank=rank, count=count, local=local)

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """Its part of some work: together the processes have all of it, and none twice.

        >>> [Process(rank=rank, count=2).share([1, 2, 3]) for rank in range(2)]
        [[1, 3], [2]]
        """
        return things[self.rank :: self.count]

    def device(self, name: str) -> str:
        """Its own of a machine's devices, where a name leaves that open."""
        return f"{name}:{self.local}" if name == "cuda" and self.count > 1 else name

    @contextmanager
    def owning(self, folder: Path) -> Iterator[None]:
        """Within: no other run has a process of this number at work in a folder.

        Raises:
            ValueError: If one has.
        """
        place = folder / f".process-{self.rank}"
        with owned(place):
            yield
        with contextlib.suppress(OSError):  # that of a run that was killed
            place.rmdir()
