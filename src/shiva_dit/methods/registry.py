"""All methods by name: what recipes, comparisons, the command line and documents offer.

A new method is a file beside this one and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from shiva_dit.methods.base import Reducer
from shiva_dit.methods.fixed_map import FixedMapSelector
from shiva_dit.methods.ibtm import IBTM
from shiva_dit.methods.norm import NormSelector
from shiva_dit.methods.random_tokens import RandomSelector
from shiva_dit.methods.sdtm import SDTM
from shiva_dit.methods.shiva import ShivaSelector
from shiva_dit.methods.tofu import ToFu
from shiva_dit.methods.toma import ToMA
from shiva_dit.methods.tomesd import ToMeSD
from shiva_dit.modules.router import ShivaRouter


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
    """Source of choices of chance."""


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


def _shiva(made_of: Making) -> ShivaSelector:
    assert made_of.router is not None
    return ShivaSelector(made_of.router)


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
    "tomesd": Method("Token Merging", lambda m: ToMeSD(m.keep_ratio), tunes=False),
    "tofu": Method("Token Fusion", lambda m: ToFu(m.keep_ratio), tunes=False),
    "ibtm": Method("merging by importance", lambda m: IBTM(m.keep_ratio), tunes=False),
    "toma": Method("merging by attention", lambda m: ToMA(m.keep_ratio), tunes=False),
    "sdtm": Method("structure, then detail", lambda m: SDTM(m.keep_ratio), tunes=False),
    "dense": Method("no pruning", lambda m: None),
}
