"""The best adapter of a run: kept on the disk until the run ends, or is stopped early."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.saved_folder import CONFIG_FILE

FOLDER = "best"
"""Within a run's folder."""
_NAME = re.compile(r"step-\d{8}")


class Best:
    """The look with the smallest error, and how many came since.

    A checkpoint says which one it was then, and that one's adapter stays on the disk as long as a
    checkpoint that is kept may be gone on from.

    Args:
        out: The run's folder.
        patience: Looks without a better error that end the run; 0: nothing is kept.
    """

    def __init__(self, out: Path, patience: int) -> None:
        self.out, self.patience = out / FOLDER, patience
        self.step: int | None = None
        self.error = math.inf
        self.since = 0
        self._before: int | None = None

    @property
    def enough(self) -> bool:
        """Whether the run ends."""
        return 0 < self.patience <= self.since

    def folder(self, step: int) -> Path:
        """Where the adapter of a look lies."""
        return self.out / f"step-{step:08d}"

    def is_better(self, error: float) -> bool:
        """Whether a look's error is the best so far."""
        return self.patience > 0 and error < self.error

    def add(self, step: int, error: float, *, counts: bool) -> None:
        """Take a look's error, whose adapter has been written if it is the best.

        Args:
            step: The look's.
            error: It.
            counts: Whether patience is lost by it: not before the joint stage.
        """
        if self.is_better(error):
            self.step, self.error, self.since = step, error, 0
        elif counts and self.patience > 0:
            self.since += 1

    def adapter(self) -> ShivaAdapter | None:
        """The best one, if one is kept."""
        if self.patience == 0 or self.step is None:
            return None
        return ShivaAdapter.from_pretrained(self.folder(self.step))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        error = None if self.step is None else self.error
        return {"step": self.step, "error": error, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If the adapter that was the best is gone.
        """
        self.step = self._before = state["step"]
        self.since = state["since"]
        self.error = math.inf if state["error"] is None else float(state["error"])
        if self.patience and self.step is not None:
            folder = self.folder(self.step)
            if not (folder / CONFIG_FILE).is_file():
                raise ValueError(
                    f"{folder}, the best adapter of this run, is gone: put it back, or go on "
                    "without early stop by watch.patience=0."
                )

    def saved(self) -> None:
        """A checkpoint has been written: remove what neither it nor the one before it names."""
        named = {self.folder(step).name for step in (self.step, self._before) if step is not None}
        self._before = self.step
        for path in sorted(self.out.iterdir()) if self.out.is_dir() else []:
            ours = _NAME.fullmatch(path.name) and not path.is_symlink() and path.is_dir()
            if ours and path.name not in named and (path / CONFIG_FILE).is_file():
                shutil.rmtree(path)
