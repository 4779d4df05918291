"""Adam's moments in 8 bits: a quarter of what they take in float32 (torchao's AdamW8bit)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Names of the moments, and whether they have signs."""
NAME = "eight_bit"
"""What the names of its tensors in a checkpoint begin with."""


def check_library() -> None:
    """Raise unless torchao is installed.

    Raises:
        ValueError: Says what to do.
    """
    if find_spec("torchao") is None:
        raise ValueError(
            "optimizer.eight_bit needs torchao: pip install torchao, or set optimizer.eight_bit = "
            "false."
        )


class EightBitAdam:
    """AdamW of some parameters, of whose moments blocks of 256 values share a scale.

    Those of fewer than 4,096 values, or of no whole number of blocks, stay float32: torchao's rule.
    It runs without torchao's compilation, which takes a minute on a CPU and needs a compiler.

    Args:
        parameters: What it moves.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        check_library()
        self.parameters = list(parameters)
        make = import_module("torchao.optim").AdamW8bit
        self.adamw = make(self.parameters, lr=0.0, weight_decay=0.0)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.adamw.param_groups[0]["lr"])

    @rate.setter
    def rate(self, value: float) -> None:
        self.adamw.param_groups[0]["lr"].fill_(value)

    def step(self) -> None:
        """Move all that have a gradient."""
        with torch.compiler.set_stance("force_eager"):
            self.adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        found: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            for key, value in self.adamw.state.get(parameter, {}).items():
                if hasattr(value, "codes"):
                    for part in ("codes", "scale", "qmap"):
                        found[f"{NAME}.{index}.{key}.{part}"] = getattr(value, part)
                else:
                    found[f"{NAME}.{index}.{key}"] = value
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave, among other tensors."""
        made = import_module("torchao.optim.subclass_8bit").OptimState8bit
        self.adamw.state.clear()
        for index, parameter in enumerate(self.parameters):
            prefix = f"{NAME}.{index}."
            if f"{prefix}step" not in tensors:
                continue
            state: dict[str, Any] = {"step": tensors[f"{prefix}step"].clone()}
            for key, signed in MOMENTS.items():
                name = prefix + key
                if name in tensors:
                    state[key] = tensors[name].to(parameter.device, copy=True)
                    continue
                parts = (tensors[f"{name}.{part}"] for part in ("codes", "scale", "qmap"))
                held = [part.to(parameter.device, copy=True) for part in parts]
                state[key] = made(*held, signed, parameter.dtype)
            self.adamw.state[parameter] = state
