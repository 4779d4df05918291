"""What a token-selection method is: something that scores the tokens of a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn


class Selector(nn.Module, ABC):
    """Scores tokens; the k best run through the block, the others pass it by.

    A selector keeps no state between forwards, so that requests cannot disturb each other.
    """

    learns_from_gates: bool = False
    """Whether training gives its scores a gradient (`shiva_dit.methods.gates`)."""

    def condition(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"]
    ) -> Float[Tensor, "L B H"] | None:
        """What the scores of each block need beside its tokens, computed once per forward.

        Args:
            time: The backbone's time embedding.
            context: Pooled text or class embedding.
        """
        del time, context
        return None

    def condition_flops(self) -> int:
        """FLOPs of `condition` for one sample."""
        return 0

    def flops(self, num_tokens: int) -> int:
        """FLOPs that the scores of one block cost, per sample; 0 where nothing is multiplied."""
        del num_tokens
        return 0

    @abstractmethod
    def scores(
        self, x: Float[Tensor, "B N D"], condition: Tensor | None, block: int
    ) -> Float[Tensor, "B N"]:
        """Scores of all tokens of a block, float32; larger is better."""

    def scorer(self, block: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        """`scores` of one block, made once when the selector is attached.

        A selector whose blocks have weights of their own returns the module that holds a block's:
        compiled blocks then reach them by one path and share one graph, whatever the depth.
        """
        return partial(self.scores, block=block)
