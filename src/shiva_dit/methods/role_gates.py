"""A selection by groups in training: every role is ranked by itself, and all learn as one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.core.roles import Group, in_order
from shiva_dit.core.selection import best_tokens
from shiva_dit.core.soft_rank import inclusion_scores, soft_rank, standardize
from shiva_dit.methods.gates import SelectionGates


@dataclass(slots=True, kw_only=True)
class GroupGates(SelectionGates):
    """Gates of a block whose image tokens are in groups.

    Scores are standardised, ranked and chosen within each group; what the block's output teaches
    (the benefit of each token) is the block's, as ever.
    """

    groups: tuple[Group, ...]
    """All tokens'."""
    soft_ks: tuple[Float[Tensor, ""] | float, ...]
    """k of each before rounding."""
    orders: list[Int[Tensor, "B n"]] = field(default_factory=list, init=False)
    """Of each group its tokens, the best first, counted from its own first."""

    @classmethod
    def of(
        cls, gates: SelectionGates, groups: Sequence[Group], soft_ks: Sequence[Tensor | float]
    ) -> GroupGates:
        """The same gates with groups.

        Args:
            gates: Made for one group; not used yet.
            groups: All tokens'.
            soft_ks: k of each before rounding.
        """
        given = {f.name: getattr(gates, f.name) for f in fields(SelectionGates) if f.init}
        return cls(**given, groups=tuple(groups), soft_ks=tuple(soft_ks))

    def choose(self, scores: Float[Tensor, "B N"], k: int) -> Int[Tensor, "B k"]:
        """The best of each group, one group's after the other's; `learn` follows."""
        parts = [standardize(own) for own in self._parts(scores.detach())]
        if self.noise is None:
            self.noise = self._draw(in_order(self.groups, parts))
        if self.order is None:
            noise = self._parts(self.noise)
            self.orders = [
                best_tokens(part + own, part.shape[1])
                for part, own in zip(parts, noise, strict=True)
            ]
            places = [
                group.places(order) for order, group in zip(self.orders, self.groups, strict=True)
            ]
            kept = [place[:, : g.k] for place, g in zip(places, self.groups, strict=True)]
            rest = [place[:, g.k :] for place, g in zip(places, self.groups, strict=True)]
            self.order = torch.cat([*kept, *rest], dim=1)
        self.chosen = self.order[:, :k]
        self.values_gated = 0
        return self.chosen

    def learn(self, scores: Float[Tensor, "B N"]) -> None:
        """Inclusion scores of each group by its own k (Eq. 5, 6); where none competes, 0 or 1."""
        assert self.noise is not None
        found = []
        parts = zip(self.groups, self._parts(scores), self._parts(self.noise), strict=True)
        for (group, own, noise), soft_k in zip(parts, self.soft_ks, strict=True):
            if group.is_fixed:
                found.append(torch.full_like(own, float(group.k > 0)))
                continue
            ranks = soft_rank(standardize(own) + noise, self.tau_rank)
            found.append(inclusion_scores(ranks, soft_k, self.tau_select))
        self.inclusion = in_order(self.groups, found)

    def scored(
        self,
        score: Callable[[Tensor, Any], Tensor],
        terms: Sequence[Any],
        scores: Float[Tensor, "B N"],
        x: Float[Tensor, "B N D"],
        before: Float[Tensor, "B k D"],
    ) -> Float[Tensor, "B N"]:
        """As for one group, with each group's own terms.

        Args:
            score: Scores of tokens by terms.
            terms: Of each group.
            scores: Those of all tokens.
            x: All tokens.
            before: The chosen ones.
        """
        found, taken = [], 0
        for group, own, order in zip(self.groups, terms, self.orders, strict=True):
            chosen = before[:, taken : taken + group.k]
            mine = group.of(scores)
            if not group.is_fixed:
                mine = self._recomputed(score, own, mine, order, group.of(x), chosen)
            found.append(mine)
            taken += group.k
        return in_order(self.groups, found)

    def _parts(self, values: Float[Tensor, "B N"]) -> list[Float[Tensor, "B n"]]:
        return [group.of(values) for group in self.groups]
