"""Shiva: tokens are scored by a learned, context-aware router (Eq. 8, 9)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from shiva_dit.methods.base import Selector
from shiva_dit.modules.router import ShivaRouter, TokenScorer


class ShivaSelector(Selector):
    """Selection by a `ShivaRouter`.

    Args:
        router: The trained router, or one in training.
    """

    learns_from_gates = True

    def __init__(self, router: ShivaRouter) -> None:
        super().__init__()
        self.router = router

    def condition(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"]
    ) -> Float[Tensor, "L B H"]:
        """The context term h of Eq. 8."""
        return self.router.condition(time, context)

    def condition_flops(self) -> int:
        """FLOPs of that term."""
        return self.router.condition_flops()

    def scores(
        self, x: Float[Tensor, "B N D"], condition: Tensor | None, block: int
    ) -> Float[Tensor, "B N"]:
        """Router scores (Eq. 9)."""
        assert condition is not None
        return self.router(x, condition, block)

    def scorer(self, block: int) -> TokenScorer:
        """The block's own weights."""
        scorer: TokenScorer = self.router.group(block)
        return scorer

    def flops(self, num_tokens: int) -> int:
        """FLOPs of one block's router."""
        return self.router.flops(num_tokens)
