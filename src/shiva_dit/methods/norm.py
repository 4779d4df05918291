"""A training-free control: tokens with the largest features are kept."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from shiva_dit.methods.base import Selector


class NormSelector(Selector):
    """Selection by the Euclidean norm of the token's features, largest first."""

    scores_alone = True

    def scores(self, x: Float[Tensor, "B N D"], terms: None, block: int) -> Float[Tensor, "B N"]:
        """Feature norms."""
        del terms, block
        return x.float().norm(dim=-1)
