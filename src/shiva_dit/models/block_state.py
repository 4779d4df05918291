"""What one block does in one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shiva_dit.core.roles import Group
from shiva_dit.core.selection import Share
from shiva_dit.methods.base import Mixture
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.models.context_parallel import Shards


@dataclass(slots=True)
class BlockState:
    """What one block does in one forward.

    Made anew each time, so that a recomputation in backward can be given its own forward's.
    """

    k: int
    """A `DynamicInt`: compiled blocks take it as a symbolic size from their first call on."""
    dense: bool
    idle: bool = False
    """Whether no forward of the model runs."""
    num_tokens: int = 0
    """N."""
    share: Share | None = None
    """Which half of the batch decides, where both keep the same tokens."""
    groups: tuple[Group, ...] = ()
    """Tokens that have a budget of their own, with k each; empty: all have one."""
    terms: Any = None
    """What its scores need beside its tokens (`Selector.terms`); with groups, of each of them."""
    update_condition: Tensor | None = None
    """That of the rejected tokens' update."""
    gates: SelectionGates | None = None
    leads: bool = False
    """Whether another pass will keep this one's tokens: they are left in `chosen`."""
    chosen: Tensor | None = None
    """The tokens to keep, (B, k), where another pass has chosen them."""
    observer: Callable[[int, Tensor], None] | None = None
    follows: BlockState | None = None
    """The block whose scores this one uses (`select_every`)."""
    is_followed: bool = False
    scores: Tensor | None = None
    """Left for those who follow, (B, N)."""
    mixture: Mixture | None = None
    """How often the block runs in training, where it does so more than once."""
    shards: Shards | None = None
    """How the tokens are split among processes, where they are."""
    weights: Tensor | None = None
    """What its feed-forward's update is multiplied by, (B, k, 1), while it runs."""


IDLE = BlockState(k=0, dense=True, idle=True)
"""Of all blocks while no forward of the model runs. Shared, as the next: never written to."""
DENSE = BlockState(k=0, dense=True)
"""Of blocks that run as they are."""


class Slot:
    """Holds a block's current state. Not a module: dynamo then treats k as a symbolic size."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = IDLE
