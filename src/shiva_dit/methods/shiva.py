"""Shiva: tokens are scored by a learned, context-aware router (Eq. 8, 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.methods.base import Selector
from shiva_dit.modules.router import ScoreTerms, ShivaRouter, token_scores


class ShivaSelector(Selector):
    """Selection by a `ShivaRouter`.

    Args:
        router: The trained router, or one in training.
    """

    learns_from_gates = True
    scores_alone = True

    def __init__(self, router: ShivaRouter) -> None:
        super().__init__()
        self.router = router

    def terms(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"]
    ) -> list[ScoreTerms]:
        """The context term h of Eq. 8, and weights."""
        return self.router.terms(time, context)

    def of_role(self, terms: Sequence[ScoreTerms], role: int) -> Sequence[ScoreTerms]:
        """With the role's vector, where the router has one."""
        return self.router.of_role(terms, role)

    def freeze(self, dtype: torch.dtype) -> None:
        """Stack and cast the weights."""
        self.router.freeze(dtype)

    def condition_flops(self) -> int:
        """FLOPs of these terms."""
        return self.router.condition_flops()

    def scores(
        self, x: Float[Tensor, "B N D"], terms: ScoreTerms, block: int
    ) -> Float[Tensor, "B N"]:
        """Router scores (Eq. 9)."""
        del block
        return token_scores(x, terms, normalize_inputs=self.router.normalize_inputs)

    def scorer(self, block: int) -> Callable[[Tensor, ScoreTerms], Tensor]:
        """One function for all blocks: its weights come with the terms."""
        del block
        return partial(token_scores, normalize_inputs=self.router.normalize_inputs)

    def flops(self, num_tokens: int) -> int:
        """FLOPs of one block's router."""
        return self.router.flops(num_tokens)
