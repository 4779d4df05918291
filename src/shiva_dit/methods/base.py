"""What a token-selection method is: something that scores the tokens of a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Selector(nn.Module, ABC):
    """Scores tokens; the k best run through the block, the others pass it by.

    A selector keeps no state between forwards, so that requests cannot disturb each other.
    """

    learns_from_gates: bool = False
    """Whether training gives its scores a gradient (`shiva_dit.methods.gates`)."""

    def terms(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"]
    ) -> Sequence[Any] | None:
        """What the scores of each block need beside its tokens, computed once per forward.

        Args:
            time: The backbone's time embedding.
            context: Pooled text or class embedding.
        """
        del time, context
        return None

    def freeze(self, dtype: torch.dtype) -> None:
        """Prepare for forwards without gradients; weights don't change any more.

        Args:
            dtype: Of the tokens.
        """
        del dtype

    def condition_flops(self) -> int:
        """FLOPs of `terms` for one sample."""
        return 0

    def flops(self, num_tokens: int) -> int:
        """FLOPs that the scores of one block cost, per sample; 0 where nothing is multiplied."""
        del num_tokens
        return 0

    @abstractmethod
    def scores(self, x: Float[Tensor, "B N D"], terms: Any, block: int) -> Float[Tensor, "B N"]:
        """Scores of all tokens of a block, float32; larger is better.

        Args:
            x: Its tokens.
            terms: What `terms` gave for this block, or None.
            block: Its index.
        """

    def scorer(self, block: int) -> Callable[[Tensor, Any], Tensor]:
        """`scores` of one block, made once when the selector is attached.

        Where it is one function for all, compiled blocks share one graph.
        """
        return partial(self.scores, block=block)
