"""Fewer tokens into a module, and its output back on all of them: six ways, and room for more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shiva_dit.core.selection import flat_rows, gather_tokens, scatter_tokens


class Plan(ABC):
    """What a module gets in the place of its tokens, and what becomes of its output."""

    @abstractmethod
    def reduce(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "b k d"]:
        """What the module runs on."""

    @abstractmethod
    def restore(
        self, y: Float[Tensor, "b k d"], rest: Float[Tensor, "B N d"]
    ) -> Float[Tensor, "B N d"]:
        """The module's output for all tokens.

        Args:
            y: Its output.
            rest: Of a token that had no part in it: its own value around a block, 0 around what
                gives an update.
        """


@dataclass(frozen=True, slots=True)
class GatherPlan(Plan):
    """Keep k tokens; the others pass by.

    >>> plan = GatherPlan(torch.tensor([[0, 2]]))
    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> plan.restore(10 * plan.reduce(x), rest=x).flatten()
    tensor([10.,  2., 30.])
    """

    chosen: Int[Tensor, "B k"]
    """Distinct in each row."""

    def reduce(self, x: Tensor) -> Tensor:
        """The chosen tokens."""
        return gather_tokens(x, self.chosen)

    def restore(self, y: Tensor, rest: Tensor) -> Tensor:
        """`rest`, with the chosen ones replaced."""
        return scatter_tokens(rest, self.chosen, y)


@dataclass(frozen=True, slots=True)
class AssignPlan(Plan):
    """Every token belongs to one of k groups: merged by their mean, unmerged by copying.

    >>> plan = AssignPlan(torch.tensor([[0, 1, 0]]), 2)
    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> plan.reduce(x).flatten(), plan.restore(plan.reduce(x), rest=x).flatten()
    (tensor([2., 2.]), tensor([2., 2., 2.]))
    """

    group: Int[Tensor, "B N"]
    """Of each token, in [0, k); none is empty."""
    k: int

    def reduce(self, x: Tensor) -> Tensor:
        """The mean of each group, summed up in float32 at least."""
        batch, _, width = x.shape
        rows = flat_rows(self.group, self.k)  # (B * N,)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
        sums = wide.new_zeros(batch * self.k, width).index_add(0, rows, wide)
        sizes = wide.new_zeros(batch * self.k).index_add(0, rows, wide.new_ones(len(rows)))
        return (sums / sizes[:, None]).to(x.dtype).view(batch, self.k, width)

    def restore(self, y: Tensor, rest: Tensor) -> Tensor:
        """To each token what its group got."""
        del rest
        batch, _, width = y.shape
        copied = y.reshape(batch * self.k, width).index_select(0, flat_rows(self.group, self.k))
        return copied.view(batch, -1, width)


@dataclass(frozen=True, slots=True)
class CachedPlan(AssignPlan):
    """Merged by the mean; merged tokens get a mixture of their group's output and a cached one.

    >>> both = torch.tensor([[True, True]])
    >>> plan = CachedPlan(torch.tensor([[0, 0]]), 1, both, 0.5, torch.ones(1, 2, 1))
    >>> plan.restore(torch.tensor([[[3.0]]]), torch.zeros(1, 2, 1)).flatten()
    tensor([2., 2.])
    """

    together: Bool[Tensor, "B N"]
    """The tokens whose outputs are mixed."""
    weight: float = 1.0
    """That of the group's output."""
    cache: Float[Tensor, "B N D"] | None = None
    """None where nothing is mixed."""

    def restore(self, y: Tensor, rest: Tensor) -> Tensor:
        """To each token what its group got, mixed."""
        copied = AssignPlan.restore(self, y, rest)
        if self.cache is None:
            return copied
        return torch.where(self.together[..., None], self.cache.lerp(copied, self.weight), copied)


@dataclass(frozen=True, slots=True)
class FillPlan(Plan):
    """All tokens run, and what they get is remembered."""

    memory: dict[Any, Any]
    """Where."""
    key: Hashable
    """As what."""

    def reduce(self, x: Tensor) -> Tensor:
        """As they are."""
        return x

    def restore(self, y: Tensor, rest: Tensor) -> Tensor:
        """As it is."""
        del rest
        self.memory[self.key] = y.detach()
        return y


@dataclass(frozen=True, slots=True)
class LinearPlan(Plan):
    """Any k mixtures of the tokens, and mixtures of these: pooling, soft merging.

    >>> plan = LinearPlan(torch.full((1, 2), 0.5), torch.ones(2, 1))
    >>> plan.restore(plan.reduce(torch.tensor([[[1.0], [3.0]]])), torch.zeros(1, 2, 1)).flatten()
    tensor([2., 2.])
    """

    mix: Float[Tensor, "*B k N"]
    back: Float[Tensor, "*B N k"]

    def reduce(self, x: Tensor) -> Tensor:
        """The mixtures."""
        return self.mix.to(x.dtype) @ x

    def restore(self, y: Tensor, rest: Tensor) -> Tensor:
        """Mixed back."""
        del rest
        return self.back.to(y.dtype) @ y


@dataclass(frozen=True, slots=True)
class RaggedPlan(Plan):
    """Each sample keeps a number of its own, around modules that see tokens one by one.

    The kept ones of all samples stand in one row. How many they are is read from the device.

    >>> plan = RaggedPlan(torch.tensor([[True, False], [True, True]]))
    >>> x = torch.ones(2, 2, 1)
    >>> plan.restore(2 * plan.reduce(x), torch.zeros_like(x)).squeeze()
    tensor([[2., 0.],
            [2., 2.]])
    """

    kept: Bool[Tensor, "B N"]

    def reduce(self, x: Tensor) -> Tensor:
        """The kept tokens, (1, their number, D)."""
        return x[self.kept][None]

    def restore(self, y: Tensor, rest: Tensor) -> Tensor:
        """`rest`, with the kept ones replaced."""
        return rest.index_put((self.kept,), y[0].to(rest.dtype))
