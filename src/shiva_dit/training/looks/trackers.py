"""Where a run's scalars and pictures are sent to, by accelerate's trackers; what looks need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from shiva_dit.training.settings import WatchConfig

FOLDER = "tensorboard"
"""Within a run's folder."""


def check_installed(config: WatchConfig) -> None:
    """Check, before a run, that what its looks need is installed.

    Raises:
        ValueError: If not; says how to install it.
    """
    needed = {"matplotlib": "watch.every", "PIL": "watch.every"} if config.every else {}
    for name, setting in needed.items():
        if find_spec(name) is None:
            raise ValueError(
                f"{name} is not installed, and {setting} needs it: pip install 'shiva-dit[demo]'."
            )
    if config.tracker is not None and find_spec(config.tracker) is None:
        raise ValueError(
            f"{config.tracker} is not installed, and watch.tracker needs it: pip install "
            f"{config.tracker}, or set watch.tracker=none."
        )


class Tracker:
    """A tracker that is open.

    Args:
        kind: Its name.
        folder: The run's; its name is the run's.
        step: Steps done: what was written after them, by a run that was killed, goes.
        settings: The recipe, flat.

    Raises:
        ValueError: If it can't be started, such as without a login.
    """

    def __init__(self, kind: str, folder: Path, step: int, settings: dict[str, Any]) -> None:
        self.kind = kind
        made: Any = LOGGER_TYPE_TO_CLASS[kind]
        PartialState()  # which they log by; nothing new where processes have joined
        try:
            with self._calls():
                if kind == "tensorboard":
                    self._to = made(".", folder / FOLDER, purge_step=step + 1)
                    self._to.start()
                else:
                    self._to = made("shiva-dit", name=folder.absolute().name, dir=str(folder))
                    self._to.start()
                    self._to.store_init_configuration(settings)
        except RuntimeError as error:
            raise ValueError(
                f"{kind} can't be started ({error}): see to that, or set watch.tracker=none."
            ) from error

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send the numbers among values."""
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        with self._calls():
            self._to.log(numbers, step=step)

    def picture(self, path: Path, step: int) -> None:
        """Send a picture."""
        from PIL import Image  # noqa: PLC0415

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))[None]
        layout = {"dataformats": "NHWC"} if self.kind == "tensorboard" else {}
        with self._calls():
            self._to.log_images({path.parent.name: pixels}, step=step, **layout)

    def close(self) -> None:
        """Write what is left."""
        with self._calls():
            self._to.finish()

    @contextmanager
    def _calls(self) -> Iterator[None]:
        """Within: what the tracker raises of its own kind becomes a `RuntimeError`."""
        try:
            yield
        except self._errors() as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def _errors(self) -> tuple[Any, ...]:
        own = getattr(sys.modules.get(self.kind), "Error", None)
        return () if own is None else (own,)


def flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested plain data with keys as they stand on the command line."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[before + key] = str(value) if isinstance(value, (list, tuple)) else value
    return found
