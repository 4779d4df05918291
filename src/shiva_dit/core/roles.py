"""Image tokens in groups, each with a budget of its own: of the target, of references, of times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.core.selection import best_tokens

TARGET, REFERENCE = 0, 1
"""Roles of tokens: of what is sampled, and of pictures to go by. The first is every router's
usual one; others have a vector of their own in routers that read the role."""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring image tokens of one role."""

    role: int
    size: int
    """At least 1."""


@dataclass(frozen=True, slots=True)
class Group:
    """A span in one block, and how many of its tokens are kept there."""

    role: int
    start: int
    """Its first token among the image's."""
    size: int
    k: int
    """In [0, size]; in running blocks a `DynamicInt`."""

    @property
    def stop(self) -> int:
        """The token after its last."""
        return self.start + self.size


def grouped(spans: Sequence[Span], counts: Sequence[int]) -> tuple[Group, ...]:
    """Spans in their order with how many of each are kept.

    Args:
        spans: Of all image tokens, one after the other.
        counts: k of each.

    Raises:
        ValueError: If a k lies outside [0, size].

    >>> [(g.start, g.k) for g in grouped([Span(TARGET, 4), Span(REFERENCE, 6)], [2, 3])]
    [(0, 2), (4, 3)]
    """
    groups, start = [], 0
    for span, k in zip(spans, counts, strict=True):
        if not 0 <= k <= span.size:
            raise ValueError(f"k of a group must lie in [0, its size] = [0, {span.size}], got {k}.")
        groups.append(Group(span.role, start, span.size, k))
        start += span.size
    return tuple(groups)


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
        own = scores[:, group.start : group.stop]
        order = best_tokens(own, group.size)
        parts.append(order[:, : group.k] + group.start)
    return torch.cat(parts, dim=1)
