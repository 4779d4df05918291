"""All methods by name: what recipes, comparisons, the command line and documents offer.

A new method is a file beside this one and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shiva_dit.methods.base import Reducer
from shiva_dit.methods.diffcr import DiffCR
from shiva_dit.methods.dydit import DyDiT
from shiva_dit.methods.fixed_map import FixedMapSelector
from shiva_dit.methods.ibtm import IBTM
from shiva_dit.methods.norm import NormSelector
from shiva_dit.methods.random_tokens import RandomSelector
from shiva_dit.methods.refresh import Refresh
from shiva_dit.methods.sdtm import SDTM
from shiva_dit.methods.settings import DiffCRConfig, DyDiTConfig, SparseDiTConfig
from shiva_dit.methods.shiva import ShivaSelector
from shiva_dit.methods.sparsedit import SparseDiT
from shiva_dit.methods.tofu import ToFu
from shiva_dit.methods.toma import ToMA
from shiva_dit.methods.tomesd import ToMeSD
from shiva_dit.modules.router import ShivaRouter


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a model, of which parameters are made."""

    width: int
    """D of the image tokens."""
    time_dim: int
    """Width of the time embedding."""
    num_heads: int
    """H."""
    full_blocks: tuple[int, ...] = (0,)
    """Blocks that are never pruned."""


def _unknown_shape() -> Shape:
    raise ValueError("a method that is trained asked for the sizes of the model.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """What a method may be made of, for one model."""

    num_blocks: int
    """L."""
    grid: Callable[[], tuple[int, int]]
    """Height and width of its images in tokens."""
    keep_ratio: float
    """As asked for; selectors get their counts from a schedule."""
    router: ShivaRouter | None
    """Of the recipe's size; None where a control is built again from its file."""
    generator: torch.Generator
    """Source of choices of chance, and of first weights."""
    shape: Callable[[], Shape] = _unknown_shape
    """Of the model."""
    settings: Any = None
    """The method's own, `TrainConfig`'s field of its name; None: their defaults."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to run a model on fewer tokens."""

    about: str
    """What it does, in a few words."""
    make: Callable[[Making], Reducer | None]
    """None where nothing is left out."""
    learns: bool = False
    """Whether training updates something of its own."""
    tunes: bool = True
    """Whether a backbone can be tuned under it (selectors: by the same training as ours)."""
    rejects: bool = True
    """Whether whole blocks leave tokens out, which can get something else instead."""


def _shiva(made_of: Making) -> ShivaSelector:
    assert made_of.router is not None
    return ShivaSelector(made_of.router)


def _diffcr(made_of: Making) -> DiffCR:
    shape, settings = made_of.shape(), made_of.settings or DiffCRConfig()
    return DiffCR(
        shape.width,
        made_of.num_blocks,
        made_of.keep_ratio,
        settings,
        full_blocks=shape.full_blocks,
        generator=made_of.generator,
    )


def _dydit(made_of: Making) -> DyDiT:
    shape, settings = made_of.shape(), made_of.settings or DyDiTConfig()
    return DyDiT(
        shape.width,
        shape.time_dim,
        shape.num_heads,
        made_of.num_blocks,
        made_of.keep_ratio,
        settings,
        generator=made_of.generator,
    )


def _sparsedit(made_of: Making) -> SparseDiT:
    settings = made_of.settings or SparseDiTConfig()
    return SparseDiT(made_of.shape().width, made_of.num_blocks, made_of.keep_ratio, settings)


METHODS: Mapping[str, Method] = {
    "shiva": Method("learned routers", _shiva, learns=True),
    "random": Method("tokens by chance", lambda m: RandomSelector(m.generator)),
    "norm": Method("largest features", lambda m: NormSelector()),
    "centre": Method("the middle", lambda m: FixedMapSelector.centre(m.num_blocks, *m.grid())),
    "fixed_map": Method(
        "a learned map",
        lambda m: FixedMapSelector.centre(m.num_blocks, *m.grid(), learned=True),
        learns=True,
    ),
    "diffcr": Method("learned routers and ratios by region", _diffcr, learns=True),
    "dydit": Method("gates of heads, channels and tokens", _dydit, learns=True, rejects=False),
    "sparsedit": Method("sparse blocks between dense ones", _sparsedit, learns=True, rejects=False),
    "tomesd": Method("Token Merging", lambda m: ToMeSD(m.keep_ratio), tunes=False),
    "tofu": Method("Token Fusion", lambda m: ToFu(m.keep_ratio), tunes=False),
    "ibtm": Method("merging by importance", lambda m: IBTM(m.keep_ratio), tunes=False),
    "toma": Method("merging by attention", lambda m: ToMA(m.keep_ratio), tunes=False),
    "sdtm": Method("structure, then detail", lambda m: SDTM(m.keep_ratio), tunes=False),
    "refresh": Method("last updates", lambda m: Refresh(m.keep_ratio), tunes=False),
    "dense": Method("no pruning", lambda m: None),
}
