"""The first control: tokens chosen by chance, afresh in every block and step."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.methods.base import Selector


class RandomSelector(Selector):
    """Uniformly random selection.

    Args:
        generator: Source of the draws; seed it for reproducible images.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def scores(self, x: Float[Tensor, "B N D"], terms: None, block: int) -> Float[Tensor, "B N"]:
        """Fresh uniform scores."""
        del terms, block
        draws = torch.rand(x.shape[:2], generator=self.generator, device=self.generator.device)
        return draws.to(x.device)

    def seeded(self, seed: int) -> RandomSelector:
        """Another one, with a generator of its own."""
        return RandomSelector(torch.Generator().manual_seed(seed))
