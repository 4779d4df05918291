"""Plots of records: each is drawn from a record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from shiva_dit.provenance import write_atomically

GROUP_COLOURS = {"all": "0.25", "selected": "tab:blue", "rejected": "tab:orange"}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all, and close it."""

    def write(file: Path) -> None:
        figure.savefig(file, format="png", dpi=110)

    write_atomically(path, write)
    plt.close(figure)


def draw_flips(record: dict[str, Any], path: Path) -> None:
    """Spearman correlations of a flip test: a bar per estimator and group, a dot per block."""
    names = list(record["estimators"])
    figure, axis = plt.subplots(figsize=(9, 0.52 * len(names) + 1.6), layout="constrained")
    height = 0.26
    for place, (group, colour) in enumerate(GROUP_COLOURS.items()):
        at = np.arange(len(names)) + (place - 1) * height
        found = [record["estimators"][name][group] for name in names]
        axis.barh(at, [g["spearman"] or 0.0 for g in found], height, color=colour, label=group)
        for y, g in zip(at, found, strict=True):
            dots = [value for value in g["spearman_by_block"] if value is not None]
            axis.plot(dots, [y] * len(dots), ".", color="white", mec=colour, ms=6, mew=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(0.0, color="black", lw=0.8)
    axis.set_xlim(-1, 1)
    axis.set_xlabel("rank correlation with the true effect of flipping a token (dots: blocks)")
    axis.set_title(record["title"], fontsize=11)
    axis.legend(loc="lower right", fontsize=9)
    save_figure(figure, path)


def draw_synthetic(record: dict[str, Any], cosines: dict[str, list[float]], path: Path) -> None:
    """Figure 6a by seed with its control, and the two cosines' histograms."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for axis, what, label in (
        (axes[0], "k", "tokens kept, k"),
        (axes[1], "recall", "share of the 20 signal tokens kept"),
    ):
        control, ours = (
            axis.plot(record["every"] * np.arange(len(values)), values, color=colour, lw=1)
            for values, colour in (
                (record[f"control_{what}_by_step_and_seed"], "0.7"),
                (record[f"{what}_by_step_and_seed"], "tab:blue"),
            )
        )
        axis.legend([ours[0], control[0]], ["Eq. 7, a line per seed", "selected path alone"])
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[0].axhline(20, color="black", ls=":", lw=0.8)
    for name, values in cosines.items():
        axes[2].hist(values, bins=40, alpha=0.6, label=name.replace("_", " "))
    axes[2].set_xlabel("cosine of the gradients, 1,000 trials")
    axes[2].legend(fontsize=8)
    save_figure(figure, path)


def draw_caption_swap(
    pictures: Tensor, captions: list[str], maps: list[tuple[str, Tensor]], path: Path
) -> None:
    """Held-out pictures with their captions, and the share of blocks that keep each token.

    Args:
        pictures: (B, C, H, W) in [-1, 1].
        captions: Of the pictures.
        maps: Title and shares (B, N) in [0, 1] of each column.
        path: The PNG.
    """
    rows, columns = len(pictures), 1 + len(maps)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.1 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    side = round(maps[0][1].shape[1] ** 0.5)
    for row in range(rows):
        image = (pictures[row].permute(1, 2, 0).clamp(-1, 1) + 1) / 2
        axes[row, 0].imshow(image.squeeze(-1), cmap="gray", vmin=0, vmax=1)
        axes[row, 0].set_title(captions[row].replace(" and ", "\nand "), fontsize=6.5)
        for axis, (title, shares) in zip(axes[row, 1:], maps, strict=True):
            axis.imshow(shares[row].view(side, side), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title if row == 0 else "", fontsize=7.5)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    save_figure(figure, path)


def draw_schedule(ratios: list[list[float]], title: str, path: Path) -> None:
    """A learned table as a heat map: keep ratio by block (from below) and time.

    Args:
        ratios: By time bin (t rising from 0) and block.
        title: Above it.
        path: The PNG.
    """
    table = np.array(ratios).T[:, ::-1]  # noisiest first, as a sampler goes
    figure, axis = plt.subplots(figsize=(7, 0.4 * len(table) + 1.6), layout="constrained")
    shown = axis.imshow(table, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1)
    axis.set_yticks(range(len(table)), [f"block {i + 1}" for i in range(len(table))], fontsize=8)
    ends = (-0.5, table.shape[1] / 2 - 0.5, table.shape[1] - 0.5)
    axis.set_xticks(ends, ["t = 1 (noise)", "0.5", "0"])
    axis.set_title(title, fontsize=10)
    figure.colorbar(shown, label="keep ratio")
    save_figure(figure, path)
