"""Which Triton kernels stand in for the torch code of selection, and when.

A kernel is used where its name is switched on, by `use` or by the environment variable
`SHIVA_DIT_KERNELS`, on CUDA tensors that need no gradient; everywhere else the torch code runs,
which is the truth that tests hold the kernels to. Triton is imported by the first use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

NAMES: tuple[str, ...] = ("router_scores", "select_top_k", "gather_tokens", "scatter_tokens")
"""The kernels that can be switched. The soft rank's is chosen by `soft_rank(method="triton")`."""

# A kernel is used by default only where a record shows it faster than compiled torch code.
MEASURED_FASTER: frozenset[str] = frozenset()
"""The kernels that are on unless `SHIVA_DIT_KERNELS` says otherwise."""

VARIABLE = "SHIVA_DIT_KERNELS"
"""Names with commas, "all" or "none": the kernels that a process starts with."""

_switched: frozenset[str] | None = None  # by `use`; None outside


def enabled() -> frozenset[str]:
    """The kernels that are switched on.

    Raises:
        ValueError: If the environment variable names an unknown kernel.
    """
    return _at_start() if _switched is None else _switched


@contextmanager
def use(*names: str) -> Iterator[None]:
    """Within: these kernels, and no others, are switched on, for the whole process.

    Compiled code notices the switch and is compiled once more.

    Args:
        names: Among `NAMES`; none switches all kernels off.

    Raises:
        ValueError: If a name is unknown.

    >>> with use("gather_tokens"):
    ...     print(sorted(enabled()))
    ['gather_tokens']
    """
    global _switched
    before, _switched = _switched, _checked(names, "kernels")
    try:
        yield
    finally:
        _switched = before


def should_use(name: str, *tensors: Tensor) -> bool:
    """Whether a kernel runs on these tensors instead of the torch code.

    It does if it is switched on, all tensors are on a CUDA device (or Triton's interpreter is on,
    `TRITON_INTERPRET=1`: for tests), none is in double precision (kernels accumulate in single),
    and none needs a gradient.

    Args:
        name: One of `NAMES`.
        tensors: All that the result depends on.

    Raises:
        ValueError: If the name is unknown.
    """
    _checked((name,), "kernels")
    if not (_on_at_start(name) if _switched is None else name in _switched):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    if any(x.dtype in (torch.float64, torch.complex128) for x in tensors):
        return False
    return all(x.is_cuda for x in tensors) or interpreted()


# Compiled code takes as constant what the environment says.
@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on a CPU too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _on_at_start(name: str) -> bool:
    return name in _at_start()


@cache
def _at_start() -> frozenset[str]:
    text = os.environ.get(VARIABLE)
    if text is None:
        return MEASURED_FASTER
    if text in ("all", "none"):
        return frozenset(NAMES if text == "all" else ())
    return _checked(tuple(name.strip() for name in text.split(",")), VARIABLE)


def _checked(names: tuple[str, ...], where: str) -> frozenset[str]:
    for name in names:
        if name not in NAMES:
            more = ', "all" or "none"' if where == VARIABLE else ""
            raise ValueError(f"{where} must be among {', '.join(NAMES)}{more}, got {name!r}.")
    return frozenset(names)
