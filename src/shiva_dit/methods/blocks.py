"""What a joint block may do otherwise than by itself: other tokens, other keys, less width."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from shiva_dit.methods.base import Reducer, Site, Where

Width = Float[Tensor, "*b H"] | tuple[int, ...]
"""Which of H equal parts are on: a mask by sample, which is multiplied; or, the same for all, those
that run, the others being left out of the products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRun:
    """How a block of joint attention runs."""

    tokens: Float[Tensor, "B n D"] | None = None
    """The image's tokens that it runs on, and changes; None: those that it is given."""
    keys: Float[Tensor, "B m D"] | None = None
    """Those that give the image's keys and values; None: the ones that it runs on."""
    is_pooled: bool = False
    """Whether every image token attends to all tokens alike. The text's attend as ever."""
    heads: Width | None = None
    """Of attention, image and text; None: all."""
    hidden: Width | None = None
    """Of the image's feed-forward: as many groups as there are heads; None: all."""
    kept: Callable[[Float[Tensor, "B n D"]], Float[Tensor, "B n"] | Bool[Tensor, "B n"]] | None = (
        None
    )
    """From the image's tokens after attention: which get an update by the feed-forward. What
    multiplies it or, if boolean, those that run through it; None: all."""
    finish: Callable[[Float[Tensor, "B n D"]], Float[Tensor, "B m D"]] | None = None
    """From the image's tokens that it ran on to those that it gives; None: the same."""

    @property
    def is_inside_alike(self) -> bool:
        """Whether the block itself runs as ever."""
        others = (self.tokens, self.keys, self.heads, self.hidden, self.kept)
        return not self.is_pooled and all(other is None for other in others)


class BlockReducer(Reducer):
    """Makes blocks of joint attention (Stable Diffusion 3 and 3.5) run otherwise."""

    sites: tuple[Site, ...] = ("block",)
    resizes: bool = False
    """Whether blocks give other numbers of tokens than the model has."""

    @abstractmethod
    def around(self, x: Float[Tensor, "B n D"], where: Where) -> BlockRun | None:
        """How one block runs in one forward; None leaves it as it is.

        Args:
            x: The image's tokens that it is given.
            where: Which block it is.
        """

    def plan(self, x: Float[Tensor, "B N D"], where: Where) -> None:
        """None: it works by `around`."""
        del x, where
