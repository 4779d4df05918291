"""Drawing coloured shapes from their signed distances, with smooth edges, many at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

BACKGROUND = -0.9
"""Grey level of the empty canvas, in [-1, 1]."""


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.84


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, a corner up; y points down."""
    y = y - 0.2
    slope = 0.5 * math.sqrt(3.0)
    return torch.maximum(slope * x.abs() - 0.5 * y, y) - 0.6


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five-pointed, a point up: one tenth of it, mirrored and turned, is a half-plane."""
    tip, notch, sector = 1.15, 0.5, math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
    radius = torch.hypot(x, y)
    across, along = radius * torch.sin(folded), radius * torch.cos(folded)
    edge_x, edge_y = notch * math.cos(sector) - tip, notch * math.sin(sector)
    length = math.hypot(edge_x, edge_y)
    return -(edge_x * across - edge_y * (along - tip)) / length


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def _cross(x: Tensor, y: Tensor) -> Tensor:
    wide = torch.maximum(x.abs() - 1.0, y.abs() - 0.32)
    high = torch.maximum(x.abs() - 0.32, y.abs() - 1.0)
    return torch.minimum(wide, high)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
"""Signed distances to shapes of radius about 1 at the origin, by name; negative inside."""


def draw(
    shape: Int[Tensor, "B O"],
    centre: Float[Tensor, "B O 2"],
    radius: Float[Tensor, "B O"],
    angle: Float[Tensor, "B O"],
    colour: Float[Tensor, "B O 3"],
    size: int,
) -> tuple[Float[Tensor, "B 3 H H"], Float[Tensor, "B H H"]]:
    """Pictures of objects, later ones over earlier ones.

    Args:
        shape: Index into `SHAPES`; -1 draws nothing.
        centre: x and y in [0, 1], y pointing down.
        radius: As a share of the picture's side.
        angle: Clockwise, in radians.
        colour: Red, green and blue in [-1, 1].
        size: H, pixels of a side.

    Returns:
        Pictures in [-1, 1] and the share of each pixel that objects cover, in [0, 1].
    """
    axis = (torch.arange(size) + 0.5) / size
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    dx = (grid_x - centre[..., 0, None, None]) / radius[..., None, None]  # (B, O, H, H)
    dy = (grid_y - centre[..., 1, None, None]) / radius[..., None, None]
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    distance = torch.full_like(x, math.inf)
    for index, signed in enumerate(SHAPES.values()):
        picked = shape == index
        distance[picked] = signed(x[picked], y[picked])
    # In pixels: half a pixel inside is fully covered, half a pixel outside not at all.
    cover = (0.5 - distance * radius[..., None, None] * size).clamp(0.0, 1.0)
    picture = torch.full((shape.shape[0], 3, size, size), BACKGROUND)
    for index in range(shape.shape[1]):
        alpha = cover[:, index, None]
        picture = picture + alpha * (colour[:, index, :, None, None] - picture)
    return picture, cover.amax(1)
