"""Image tokens in groups, each with a budget of its own: of the target, and of references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from shiva_dit.core.selection import best_tokens

TARGET, REFERENCE = 0, 1
"""Roles of tokens: of what is sampled, and of what it goes by (pictures, clean frames). The first
is every router's usual one; others have a vector of their own in routers that read the role."""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring image tokens of one role."""

    role: int
    size: int
    """At least 1."""


@dataclass(frozen=True, slots=True)
class Group:
    """All spans of a role in one block, and how many of their tokens are kept there."""

    role: int
    parts: tuple[tuple[int, int], ...]
    """Of each span its first token among the image's, and the one after its last; in order."""
    k: int
    """In [0, size]; in running blocks a `DynamicInt`."""

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return sum(stop - start for start, stop in self.parts)

    @property
    def is_fixed(self) -> bool:
        """Whether none of its tokens competes: all or none are kept, and it isn't the target's."""
        return self.role != TARGET and self.k in (0, self.size)

    def of(self, values: Shaped[Tensor, "B N ..."]) -> Shaped[Tensor, "B n ..."]:
        """The rows of its tokens, of those of all."""
        found = [values[:, start:stop] for start, stop in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def places(self, order: Int[Tensor, "B m"]) -> Int[Tensor, "B m"]:
        """Places among all tokens of places among its own.

        >>> Group(TARGET, ((1, 3), (5, 7)), 2).places(torch.tensor([[0, 1, 2, 3]]))
        tensor([[1, 2, 5, 6]])
        """
        found = order + self.parts[0][0]
        before = 0
        for (start, stop), (following, _) in zip(self.parts[:-1], self.parts[1:], strict=True):
            before += stop - start
            found = found + (order >= before) * (following - stop)
        return found


def grouped(spans: Sequence[Span], counts: Sequence[int]) -> tuple[Group, ...]:
    """One group of each role, in the order in which these first come.

    Args:
        spans: Of all image tokens, one after the other.
        counts: k of each group.

    Raises:
        ValueError: If a k lies outside [0, size].

    >>> [(g.parts, g.k) for g in grouped([Span(TARGET, 4), Span(REFERENCE, 6)], [2, 3])]
    [(((0, 4),), 2), (((4, 10),), 3)]
    """
    parts: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for span in spans:
        parts.setdefault(span.role, []).append((start, start + span.size))
        start += span.size
    groups = []
    for (role, own), k in zip(parts.items(), counts, strict=True):
        group = Group(role, tuple(own), k)
        if not 0 <= k <= group.size:
            raise ValueError(
                f"k of a group must lie in [0, its size] = [0, {group.size}], got {k}."
            )
        groups.append(group)
    return tuple(groups)


def in_order(
    groups: Sequence[Group], values: Sequence[Shaped[Tensor, "B _ ..."]]
) -> Shaped[Tensor, "B N ..."]:
    """Rows of all tokens in their order, of those of each group (`Group.of`).

    >>> groups = grouped([Span(TARGET, 1), Span(REFERENCE, 2), Span(TARGET, 1)], [1, 1])
    >>> in_order(groups, [torch.tensor([[1, 4]]), torch.tensor([[2, 3]])])
    tensor([[1, 2, 3, 4]])
    """
    found = {}
    for group, own in zip(groups, values, strict=True):
        sizes = [stop - start for start, stop in group.parts]
        for (start, _), part in zip(group.parts, own.split(sizes, dim=1), strict=True):
            found[start] = part
    return torch.cat([found[start] for start in sorted(found)], dim=1)


def roles_in(spans: Sequence[Span]) -> tuple[int, ...]:
    """Roles in the order in which they first come.

    >>> roles_in([Span(REFERENCE, 1), Span(TARGET, 4), Span(REFERENCE, 1)])
    (1, 0)
    """
    return tuple(dict.fromkeys(span.role for span in spans))


def num_of(spans: Sequence[Span], role: int) -> int:
    """How many tokens have a role.

    >>> num_of([Span(TARGET, 4), Span(REFERENCE, 6)], REFERENCE)
    6
    """
    return sum(span.size for span in spans if span.role == role)


def best_by_group(scores: Float[Tensor, "B N"], groups: Sequence[Group]) -> Int[Tensor, "B k"]:
    """The best tokens of each group, one group's after the other's; within a group the best first.

    Args:
        scores: Larger is better; compared within a group alone.
        groups: All tokens'.

    >>> groups = grouped([Span(TARGET, 2), Span(REFERENCE, 2)], [1, 1])
    >>> best_by_group(torch.tensor([[1.0, 2.0, 9.0, 8.0]]), groups)
    tensor([[1, 2]])
    """
    parts = []
    for group in groups:
        order = best_tokens(group.of(scores), group.size)
        parts.append(group.places(order[:, : group.k]))
    return torch.cat(parts, dim=1)
