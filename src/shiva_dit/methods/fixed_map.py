"""The strongest control on centred pictures: one map for all samples, times and prompts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.methods.base import Selector


class FixedMapSelector(Selector):
    """The same tokens for every sample and time: a map per block, given or learned.

    Args:
        maps: Scores per block and token; larger is kept first.
        learned: Whether training updates the maps (by the same gates as a router's scores).
    """

    def __init__(self, maps: Float[Tensor, "L N"], learned: bool = False) -> None:
        super().__init__()
        self.maps = nn.Parameter(maps.float().clone(), requires_grad=learned)
        self.learns_from_gates = learned

    @classmethod
    def centre(
        cls, num_blocks: int, height: int, width: int, learned: bool = False
    ) -> FixedMapSelector:
        """Tokens nearest to the middle of a height x width grid of tokens."""
        y = torch.arange(height) - (height - 1) / 2
        x = torch.arange(width) - (width - 1) / 2
        distance = (y[:, None].square() + x[None, :].square()).flatten()
        return cls(-distance.repeat(num_blocks, 1), learned)

    def scores(self, x: Float[Tensor, "B N D"], terms: None, block: int) -> Float[Tensor, "B N"]:
        """The block's map.

        Raises:
            ValueError: If the picture has another number of tokens than the map.
        """
        del terms
        if self.maps.shape[1] != x.shape[1]:
            raise ValueError(
                f"the fixed map was made for {self.maps.shape[1]} tokens, got {x.shape[1]}: "
                "a fixed map serves one resolution."
            )
        return self.maps[block].expand(x.shape[0], -1)
