"""What must still hold when a forward runs: entries of dictionaries, looked at all together.

Modules keep children, parameters and replaced forwards in dictionaries. Whether hundreds of their
entries are the objects that they were is a matter of microseconds; only where one has changed is
asked what that means. So it is with values: which tensors may have been written since, their
counts of writes and their addresses say, and a sample where values may be read (`Written`).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import torch

from shiva_dit.models.written import Written


class Watch:
    """Entries of dictionaries, and who judges a change of each.

    Args:
        fill: Adds them all; called again after a change that was accepted.
    """

    def __init__(self, fill: Callable[[Watch], object]) -> None:
        self._fill = fill
        self._refill()

    def _refill(self) -> None:
        self._places: set[tuple[int, Any]] = set()
        self._dicts: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._judges: list[Callable[[], object]] = []
        self._lists: list[list[Any]] = []
        self._judges_of_lists: list[Callable[[], object]] = []
        self._values: list[tuple[Written, Callable[[list[int]], object]]] = []
        self._fill(self)
        self._held = self._found()
        self._lengths = list(map(len, self._lists))

    def _found(self) -> list[Any]:
        return list(map(dict.get, self._dicts, self._keys))

    def add(self, entries: dict[Any, Any], key: Any, judge: Callable[[], object]) -> None:
        """Watch an entry, present or not.

        Args:
            entries: The dictionary.
            key: Its key; of several judges of one entry the first stays.
            judge: Called before a forward when the entry has become another object. It raises if
                the forward would then not run what was put on.
        """
        place = id(entries), key
        if place not in self._places:
            self._places.add(place)
            self._dicts.append(entries)
            self._keys.append(key)
            self._judges.append(judge)

    def add_length(self, watched: list[Any], judge: Callable[[], object]) -> None:
        """Watch how long a list is; the judge is as that of `add`."""
        self._lists.append(watched)
        self._judges_of_lists.append(judge)

    def add_values(self, written: Written, judge: Callable[[list[int]], object]) -> None:
        """Watch the values of tensors; the judge gets the places of those that may have changed."""
        self._values.append((written, judge))

    @torch.compiler.disable()
    def check(self, *, reads: bool = True) -> None:
        """Have every change judged.

        Args:
            reads: Whether values may be read from a device, so that no write is missed.

        Raises:
            Exception: By a judge.
        """
        same = all(map(is_, map(dict.get, self._dicts, self._keys), self._held))
        same = same and list(map(len, self._lists)) == self._lengths
        changed = [written.changed(reads=reads or not same) for written, _ in self._values]
        if same and not any(changed):
            return
        for now, then, judge in zip(self._found(), self._held, self._judges, strict=True):
            if now is not then:
                judge()
        watched = zip(self._lists, self._lengths, self._judges_of_lists, strict=True)
        for each, length, judge in watched:
            if len(each) != length:
                judge()
        for (_, judge_values), places in zip(self._values, changed, strict=True):
            if places:
                judge_values(places)
        self._refill()
