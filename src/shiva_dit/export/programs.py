"""Runs exported programs by torch and safetensors alone. A copy lies in every folder of programs.

programs = Programs("folder")
for step, timestep in enumerate(programs.timesteps):
    prediction = programs(hidden_states=latents, timestep=..., ...)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
TOLERANCE = 1e-3
"""How far a call's timestep may lie from the nearest one of the run, as a share of the largest."""


class Programs:
    """The programs of one run of a model: call it as the model was called.

    Args:
        folder: That `shiva_dit.export.export_run` filled.
        device: Where programs run: the device that they were exported on, or another one of its
            kind; that one by default.

    Raises:
        ValueError: If the folder holds something else, or a device of another kind is asked for.
    """

    def __init__(self, folder: str | Path, device: str | torch.device | None = None) -> None:
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.programs: list[dict[str, Any]] = about["programs"]
            self.steps: list[tuple[float, int]] = [
                (s["timestep"], s["program"]) for s in about["calls"]
            ]
            self.timestep: str = about["timestep"]
            own = torch.device(about["device"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{self.folder} holds no exported programs ({error}): pass a folder that "
                "shiva-dit export has filled."
            ) from error
        self.device = torch.device(device or own)
        if self.device.type != own.type:
            raise ValueError(
                f"these programs are for {own.type}, and {self.device.type} was asked for: export "
                "on a device of that kind."
            )
        weights = load_file(self.folder / WEIGHTS, device=str(self.device))
        self.weights = dict(sorted(weights.items()))  # in the order in which they were traced
        self._loaded: dict[int, Callable[..., Any]] = {}

    @property
    def timesteps(self) -> list[float]:
        """What the model was called with, one for each call of the run."""
        return [timestep for timestep, _ in self.steps]

    def place(self, timestep: float) -> int:
        """Which call of the run has a timestep.

        Raises:
            ValueError: If none has.
        """
        near = min(range(len(self.steps)), key=lambda call: abs(self.steps[call][0] - timestep))
        if abs(self.steps[near][0] - timestep) > TOLERANCE * max(map(abs, self.timesteps)):
            raise ValueError(
                f"no program is for timestep {timestep:g}, the run had {self.timesteps}: export a "
                "run that has it."
            )
        return near

    def __call__(self, *, call: int | None = None, **inputs: Any) -> Any:
        """The model's prediction.

        Args:
            call: Which call of the run, from 0. None: by its timestep, which is then read from the
                device that it lies on.
            **inputs: Tensors, as the model was given them, of the same shapes and dtypes.

        Raises:
            ValueError: If the run had no such call.
        """
        if call is None:
            if not isinstance(inputs.get(self.timestep), Tensor):
                raise ValueError(f"a call needs a tensor {self.timestep!r}, or call=.")
            call = self.place(self._time(inputs[self.timestep]))
        program = self.steps[call][1]
        self._check(inputs, self.programs[program]["inputs"])
        if program not in self._loaded:
            entry = self.programs[program]
            path = self.folder / entry["file"]
            self._loaded[program] = load_program(path, entry["engine"], self.device)
        with torch.no_grad():
            return self._loaded[program](self.weights, **inputs)

    def _time(self, timestep: Tensor) -> float:
        """The first sample's time; where each token or frame has one, the noisy ones'."""
        times = timestep[0].flatten() if timestep.ndim > 1 else timestep.flatten()
        given = [str(timestep.dtype), list(timestep.shape)]
        fitting = (p for p in self.programs if p["inputs"].get(self.timestep) == given)
        return float(times[next((p.get("entry", 0) for p in fitting), 0)])

    def _check(self, inputs: dict[str, Any], expected: dict[str, Any]) -> None:
        """Compare shapes and dtypes: a compiled program takes the memory that it expects."""
        given = dict(leaves(inputs))
        for name in (*expected, *given):
            there, wanted = given.get(name), expected.get(name)
            found = None if there is None else [str(there.dtype), list(there.shape)]
            if found != wanted:
                raise ValueError(
                    f"{name} is {_said(found)}, and the program was exported for {_said(wanted)}: "
                    "pass what the model was given then, or export another run."
                )


def load_program(path: Path, engine: str, device: torch.device) -> Callable[..., Any]:
    """A program that takes weights and inputs."""
    if engine == "inductor":
        from torch._inductor import aoti_load_package  # noqa: PLC0415 (slow, and often not needed)

        index = -1 if device.index is None else device.index
        return aoti_load_package(str(path), device_index=index)
    return torch.export.load(path).module()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a call's arguments, by the path to each.

    >>> [name for name, _ in leaves({"a": torch.ones(1), "b": [torch.ones(2)]})]
    ['a', 'b.0']
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from leaves(each, f"{name}.{key}" if name else str(key))


def _said(tensor: list[Any] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} of {tuple(tensor[1])}"
