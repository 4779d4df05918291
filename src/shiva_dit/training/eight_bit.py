"""Adam's moments in 8 bits: a quarter of what they take in float32 (torchao's AdamW8bit)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from shiva_dit.models.sharded import as_share, is_shared, own_share, shared_as

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Names of the moments, and whether they have signs."""
NAME = "eight_bit"
"""What the names of its tensors in a checkpoint begin with."""
PARTS = ("codes", "scale", "qmap")
"""What torchao holds of a moment in 8 bits."""
MOST, LEAST, FEW = 256, 32, 4096
"""Values that share a scale, at most and at least; tensors of fewer values stay float32."""


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


def block_within(row: int) -> int | None:
    """Values that share a scale where no block may reach from one row into the next: at most 256.

    None if that leaves too few of them: then moments stay float32.

    >>> [block_within(row) for row in (1536, 1152, 32, 1, 509)]
    [256, 192, 32, None, None]
    """
    best = next(size for size in range(min(row, MOST), 0, -1) if row % size == 0)
    return best if best >= LEAST else None


class EightBitAdam:
    """AdamW of some parameters, of whose moments blocks of values share a scale.

    A block has 256 values of a tensor; those of fewer than 4,096 values, or of no whole number of
    blocks, stay float32: torchao's rule. It runs without torchao's compilation, which takes a
    minute on a CPU and needs a compiler.

    Args:
        parameters: What it moves.
        by_rows: Whether blocks lie within rows instead (`block_within`), by which processes share
            weights: then any number of them has the same blocks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, by_rows: bool = False) -> None:
        check_library()
        self.parameters, self.by_rows = list(parameters), by_rows
        # Of shared ones torchao gets this process's share: all that it does is by value or block.
        self._own = [
            nn.Parameter(own_share(p.detach())) if is_shared(p) else p for p in self.parameters
        ]
        self._blocks: dict[int, int | None] = {}
        make = import_module("torchao.optim").AdamW8bit
        self.adamw = make(self._own, lr=0.0, weight_decay=0.0)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.adamw.param_groups[0]["lr"])

    @rate.setter
    def rate(self, value: float) -> None:
        self.adamw.param_groups[0]["lr"].fill_(value)

    @torch.no_grad()
    def step(self) -> None:
        """Move all that have a gradient."""
        for index, (parameter, own) in enumerate(zip(self.parameters, self._own, strict=True)):
            if own is not parameter:
                own.data = own_share(parameter)
                own.grad = None if parameter.grad is None else own_share(parameter.grad)
            if self.by_rows and own.grad is not None and index not in self._blocks:
                self._begin(index)
        with torch.compiler.set_stance("force_eager"):
            self.adamw.step()
        for parameter, own in zip(self.parameters, self._own, strict=True):
            if own is not parameter:
                own.grad = None

    def _begin(self, index: int) -> None:
        """Moments of a parameter, all zero."""
        own, parameter = self._own[index], self.parameters[index]
        block = block_within(_row(parameter)) if parameter.numel() >= FEW else None
        self._blocks[index] = block
        state: dict[str, Any] = {"step": torch.tensor(0.0)}
        for key, signed in MOMENTS.items():
            state[key] = torch.zeros_like(own)
            if block is not None and own.numel():
                state[key] = _library().zeros(own.shape, signed, block, own.device)
        self.adamw.state[own] = state

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name; shared as the parameters are."""
        found: dict[str, Tensor] = {}
        for index, own in enumerate(self._own):
            for key, value in self.adamw.state.get(own, {}).items():
                name = f"{NAME}.{index}.{key}"
                if key != "step" and is_shared(self.parameters[index]):
                    found |= self._shares(index, name, value)
                elif hasattr(value, "codes"):
                    found |= {f"{name}.{part}": getattr(value, part) for part in PARTS}
                else:
                    found[name] = value
        return found

    def _shares(self, index: int, name: str, value: Any) -> dict[str, Tensor]:
        """A moment that is shared, under the same names in all processes."""
        parameter, block = self.parameters[index], self._blocks[index]
        if block is None:
            return {name: as_share(value, parameter)}
        codes, scale, qmap = value.byte(), value, value  # of a share without values
        if value.numel():
            codes, scale, qmap = (getattr(value, part) for part in PARTS)
        rows = scale.reshape(len(codes), _row(parameter) // block)
        found = as_share(codes, parameter), as_share(rows, parameter), qmap
        return {f"{name}.{part}": each for part, each in zip(PARTS, found, strict=True)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave, among other tensors, as wholes.

        Moments in blocks that don't lie within rows are taken as float32 ones by rows.
        """
        self.adamw.state.clear()
        self._blocks.clear()
        for index, own in enumerate(self._own):
            prefix = f"{NAME}.{index}."
            if f"{prefix}step" not in tensors:
                continue
            state: dict[str, Any] = {"step": tensors[f"{prefix}step"].clone()}
            for key, signed in MOMENTS.items():
                state[key], self._blocks[index] = self._loaded(index, tensors, key, signed)
            self.adamw.state[own] = state

    def _loaded(
        self, index: int, tensors: Mapping[str, Tensor], key: str, signed: bool
    ) -> tuple[Tensor, int | None]:
        """This process's share of a moment, and how many of its values share a scale."""
        parameter, name = self.parameters[index], f"{NAME}.{index}.{key}"

        def own(value: Tensor) -> Tensor:
            there = value.to(parameter.device, copy=True)
            return own_share(shared_as(there, parameter)) if is_shared(parameter) else there

        if name in tensors:
            return own(tensors[name]), None
        codes, scale, qmap = (tensors[f"{name}.{part}"] for part in PARTS)
        block = codes.numel() // scale.numel()
        if self.by_rows and _row(codes) % block:
            held = _library()(codes, scale.flatten(), qmap, signed).dequantize()
            return own(held), None
        share = own(codes)
        if not share.numel():
            return torch.zeros_like(self._own[index]), block
        scales = own(scale.view(len(codes), -1)) if is_shared(parameter) else own(scale)
        qmap = qmap.to(parameter.device, copy=True)
        return _library()(share, scales.flatten(), qmap, signed, parameter.dtype), block


def _library() -> Any:
    return import_module("torchao.optim.subclass_8bit").OptimState8bit


def _row(tensor: Tensor) -> int:
    """How many values each of its rows has."""
    return math.prod(tensor.shape[1:])
