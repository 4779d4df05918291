"""True FLOPs of a diffusion transformer at k tokens: 2 per multiply-add, attention included.

Linear layers and attention products are counted, as `torch.utils.flop_counter` counts them; norms,
activations, softmax and the sort are not. A layer costs so much per token and attention so much per
pair of tokens, so that a block's cost is a quadratic in its image tokens: three counts give all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A whole number for every number of tokens.

    >>> Polynomial.through({1: 3, 2: 7, 3: 13}).at(10)  # n^2 + n + 1
    111
    """

    numerators: tuple[int, ...]
    """Of the coefficients, from the constant up."""
    denominator: int
    """Of all of them."""

    @classmethod
    def through(cls, points: Mapping[int, int]) -> Polynomial:
        """The one of least degree that has these values (Lagrange's)."""
        total = [Fraction(0)] * len(points)
        for place, value in points.items():
            term = [Fraction(value)]
            for other in points.keys() - {place}:  # times (n - other) / (place - other)
                raised, kept = [Fraction(0), *term], [*term, Fraction(0)]
                term = [
                    (up - other * same) / (place - other)
                    for up, same in zip(raised, kept, strict=True)
                ]
            total = [a + b for a, b in zip(total, term, strict=True)]
        denominator = math.lcm(*(c.denominator for c in total))
        return cls(tuple(int(c * denominator) for c in total), denominator)

    def at(self, tokens: int) -> int:
        """The value; the nearest whole number at sizes that a model can't have.

        Wan Animate's are multiples of its frames, of which one is counted otherwise.

        >>> Polynomial.through({0: 0, 3: 5}).at(1)  # 5/3
        2
        """
        value = 0
        for numerator in reversed(self.numerators):
            value = value * tokens + numerator
        return round(Fraction(value, self.denominator))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of one forward pass of one sample, as a function of the tokens kept."""

    blocks: tuple[Polynomial, ...]
    """The blocks in order, by their image tokens."""
    constant: int
    """Everything outside the blocks: embedders, final norm and projection."""
    num_tokens: int
    """N image tokens."""

    def dense(self) -> int:
        """The unpruned model."""
        return self.constant + sum(block.at(self.num_tokens) for block in self.blocks)

    def pruned(self, counts: Sequence[int], extra: int = 0) -> int:
        """The pruned model.

        Args:
            counts: k of each block.
            extra: What a block with k < N pays beside its own work: router, update of the rest.
        """
        total = self.constant
        for block, k in zip(self.blocks, counts, strict=True):
            total += block.at(k) + (extra if k < self.num_tokens else 0)
        return total
