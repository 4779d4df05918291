"""Faults on demand: the n-th step at the file system fails, or the process is killed there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = ("open", "replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "chmod")
"""What writing goes through, in `os`; `pathlib` calls these too."""


class Steps:
    """Counts steps at the file system below a folder; at the n-th, before or after it, acts.

    Args:
        folder: Steps elsewhere don't count. Those that have a handle alone (fsync) do.
        at: Which step, from 0; -1 acts never.
        act: What is done there: it may raise, or end the process.
        after: Act after the step is done, not before.
    """

    def __init__(
        self, folder: Path, at: int, act: Callable[[], Any], *, after: bool = False
    ) -> None:
        self.folder, self.at, self.act, self.after = str(folder), at, act, after
        self.count = 0

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(target: Any, *args: Any, **kwargs: Any) -> Any:
            by_name = isinstance(target, (str, os.PathLike))
            if by_name and not os.fspath(target).startswith(self.folder):
                return real(target, *args, **kwargs)
            is_it = self.count == self.at
            self.count += 1
            if is_it and not self.after:
                self.act()
            result = real(target, *args, **kwargs)
            if is_it and self.after:
                self.act()
            return result

        return step

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in STEPS:
            patch.setattr(os, name, self.wrap(getattr(os, name)))


def listing(folder: Path) -> dict[str, bytes]:
    """Everything in a folder and below it, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }
