"""Sizes that pictures are brought to: one square, or several shapes of about its area."""

from __future__ import annotations

import math

WIDEST = 2.0
"""Ratio of the sides of the widest and the tallest shape."""


def shapes(
    size: int, step: int, *, several: bool, largest: int | None = None
) -> list[tuple[int, int]]:
    """Width and height of every shape, in pixels; the square is the first.

    Args:
        size: Side of the square.
        step: Every side is a multiple of it.
        several: Whether there are others than the square, of at most its area.
        largest: No side is longer.

    >>> shapes(1024, 16, several=True)[:5]
    [(1024, 1024), (704, 1408), (704, 1472), (768, 1280), (768, 1344)]
    """
    square = (size, size)
    if not several:
        return [square]
    stride = max(size // 16 // step, 1) * step
    found = set()
    for width in range(stride, int(size * math.sqrt(WIDEST)) + stride, stride):
        height = size * size // width // stride * stride
        longest = max(width, height)
        fits = largest is None or longest <= largest
        if height and fits and longest <= WIDEST * 1.05 * min(width, height):
            found |= {(width, height), (height, width)}
    return [square, *sorted(found - {square})]


def nearest(width: int, height: int, among: list[tuple[int, int]]) -> tuple[int, int]:
    """The shape whose ratio of sides is nearest to a picture's."""
    ratio = math.log(width / height)
    return min(among, key=lambda shape: abs(math.log(shape[0] / shape[1]) - ratio))


def kept_share(width: int, height: int, shape: tuple[int, int]) -> float:
    """Share of a picture that is left where it covers a shape and is cut to it, in (0, 1].

    >>> kept_share(300, 100, (64, 64))
    0.3333333333333333
    """
    relative = (width / height) / (shape[0] / shape[1])
    return min(relative, 1.0 / relative)
