"""Plots of records: each is drawn from a record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

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
        control = axis.plot(record[f"control_{what}_by_step_and_seed"], color="0.7", lw=1)
        ours = axis.plot(record[f"{what}_by_step_and_seed"], color="tab:blue", lw=1)
        axis.legend([ours[0], control[0]], ["Eq. 7, a line per seed", "selected path alone"])
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[0].axhline(20, color="black", ls=":", lw=0.8)
    for name, values in cosines.items():
        axes[2].hist(values, bins=40, alpha=0.6, label=name.replace("_", " "))
    axes[2].set_xlabel("cosine of the gradients, 1,000 trials")
    axes[2].legend(fontsize=8)
    save_figure(figure, path)
