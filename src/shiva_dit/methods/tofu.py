"""Token Fusion (Kim et al. 2024, arXiv 2312.01026), from its formulas.

Tokens are matched as in Token Merging. In the first half of the blocks, where a mean of inputs is
far from the input of the mean, a group runs as its destination alone; in the second half as the
mean, made as long as the longest token of the group (MLERP). Nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.core.selection import flat_rows, gather_tokens
from shiva_dit.methods.base import Where
from shiva_dit.methods.matching import merged
from shiva_dit.methods.plans import AssignPlan
from shiva_dit.methods.tomesd import ToMeSD


@dataclass(frozen=True, slots=True)
class PrunedPlan(AssignPlan):
    """One token of each group runs, and the others get a copy.

    >>> plan = PrunedPlan(torch.tensor([[0, 1, 0]]), 2, torch.tensor([[2, 1]]))
    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> plan.reduce(x).flatten(), plan.restore(plan.reduce(x), rest=x).flatten()
    (tensor([3., 2.]), tensor([3., 2., 3.]))
    """

    leader: Int[Tensor, "B k"]
    """The token of each group that runs."""

    def reduce(self, x: Tensor) -> Tensor:
        """The leaders."""
        return gather_tokens(x, self.leader)


@dataclass(frozen=True, slots=True)
class LongMeanPlan(AssignPlan):
    """Means of groups, as long as their longest token.

    >>> plan = LongMeanPlan(torch.tensor([[0, 0]]), 1)
    >>> plan.reduce(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
    tensor([[[2.4000, 3.2000]]])
    """

    def reduce(self, x: Tensor) -> Tensor:
        """The mean of each group by its own norm, times the largest norm of the group."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = AssignPlan.reduce(self, wide)
        lengths = wide.norm(dim=-1).flatten()
        longest = lengths.new_zeros(len(x) * self.k)
        longest = longest.scatter_reduce(0, flat_rows(self.group, self.k), lengths, "amax")
        own = mean.norm(dim=-1)
        factor = torch.where(own > 0, longest.view_as(own) / own, 1.0)  # a mean of 0 stays
        return (mean * factor[..., None]).to(x.dtype)


class ToFu(ToMeSD):
    """Prunes the most alike tokens in the first half of the blocks, merges them in the second.

    Its arguments are those of `ToMeSD`.
    """

    def merge(
        self,
        x: Float[Tensor, "B N D"],
        places: Int[Tensor, " M"],
        num_merged: int,
        where: Where,
    ) -> AssignPlan:
        """By the destination alone, or by MLERP.

        Raises:
            ValueError: If nothing says how many blocks there are.
        """
        if where.num_blocks is None:
            raise ValueError("ToFu prunes in the first half of the blocks: it needs their number.")
        plan = merged(x, places, num_merged)
        if 2 * where.block >= where.num_blocks:
            return LongMeanPlan(plan.group, plan.k)
        return PrunedPlan(plan.group, plan.k, leaders(plan, places))


def leaders(plan: AssignPlan, places: Int[Tensor, " M"]) -> Int[Tensor, "B k"]:
    """Of each group of a matching, its destination, or the source that is alone in it."""
    batch, num_tokens = plan.group.shape
    leads = plan.group < plan.k - len(places)  # the sources that are alone
    leads = leads.index_fill(1, places, True)
    slot = torch.where(leads, plan.group, plan.k)  # all others in one that is thrown away
    tokens = torch.arange(num_tokens, device=slot.device).expand(batch, -1)
    return slot.new_zeros(batch, plan.k + 1).scatter(1, slot, tokens)[:, : plan.k]
