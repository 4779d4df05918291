"""The quickstart's picture: what each method makes of the digits, and which tokens were kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from jaxtyping import Bool
from matplotlib.figure import SubFigure
from torch import Tensor

from shiva_dit.experiments.plots import save_figure


def draw_quickstart(
    path: Path,
    rows: Mapping[str, tuple[Tensor, str]],
    maps: Bool[Tensor, "L T B N"],
    title: str,
    digit: int = 8,
) -> None:
    """Write the picture as a PNG.

    Args:
        path: Where.
        rows: Ten images (10, 1, H, W) in [-1, 1] and a caption, per method.
        maps: Kept tokens of the trained adapter, as `kept_maps` gives them.
        title: Above everything.
        digit: The digit whose maps are shown beside the average.
    """
    num_blocks, num_steps = maps.shape[:2]
    figure = plt.figure(figsize=(12, 0.95 * len(rows) + 0.72 * (num_blocks - 1) + 1.9), dpi=110)
    figure.suptitle(title, fontsize=12, y=0.99)
    above, below = figure.subfigures(  # type: ignore[misc]
        2, 1, height_ratios=[0.95 * len(rows) + 0.5, 0.72 * (num_blocks - 1) + 1.2]
    )
    _draw_rows(above, rows)
    left, right = below.subfigures(1, 2, wspace=0.02)
    steps = [round(i * (num_steps - 1) / 5) for i in range(6)]
    blocks = range(1, num_blocks)
    one = maps[:, :, digit].float()
    _draw_maps(left, one, steps, blocks, f'Tokens kept for one "{digit}" (white)')
    _draw_maps(right, maps.float().mean(2), steps, blocks, "Share of the ten digits that keep it")

    save_figure(figure, path)


def _draw_rows(figure: SubFigure, rows: Mapping[str, tuple[Tensor, str]]) -> None:
    axes = figure.subplots(len(rows), 11, squeeze=False, width_ratios=[3.4] + [1] * 10)
    top = 1.0 - 0.45 / (0.95 * len(rows) + 0.5)  # room for the title, however many rows
    figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=0.02, wspace=0.06, hspace=0.08)
    for line, (name, (images, caption)) in zip(axes, rows.items(), strict=True):
        line[0].text(0.0, 0.62, name, fontsize=11, weight="bold", va="center")
        line[0].text(0.0, 0.26, caption, fontsize=9, va="center", color="0.3")
        for axis, image in zip(line[1:], images, strict=True):
            axis.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
        for axis in line:
            axis.axis("off")


def _draw_maps(
    figure: SubFigure, maps: Tensor, steps: list[int], blocks: range, title: str
) -> None:
    axes = figure.subplots(len(blocks), len(steps), squeeze=False)
    figure.subplots_adjust(left=0.13, right=0.97, top=0.84, bottom=0.03, wspace=0.08, hspace=0.12)
    figure.suptitle(title, fontsize=10, y=0.97)
    side = round(maps.shape[-1] ** 0.5)
    for line, block in zip(axes, blocks, strict=True):
        for axis, step in zip(line, steps, strict=True):
            axis.imshow(maps[block, step].view(side, side), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if block == blocks[0]:
                axis.set_title(f"step {step + 1}", fontsize=8)
        line[0].set_ylabel(f"block {block + 1}", fontsize=8, rotation=0, ha="right", va="center")
