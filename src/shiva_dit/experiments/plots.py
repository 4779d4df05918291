"""Plots of records: each is drawn from a record alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from shiva_dit.provenance import read_as, read_json, write_atomically

Cost = Callable[[Mapping[str, Any]], float | None]
"""What a row costs, where that is known."""
GROUP_COLOURS = {"all": "0.25", "selected": "tab:blue", "rejected": "tab:orange"}


def _some(values: Sequence[Any]) -> int:
    """How many there are to draw.

    Raises:
        ValueError: If there are none.
    """
    if not values:
        raise ValueError("there is nothing to draw in it.")
    return len(values)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all, and close it."""

    def write(file: Path) -> None:
        figure.savefig(file, format="png", dpi=110)

    write_atomically(path, write)
    plt.close(figure)


def draw_flips(record: dict[str, Any], path: Path) -> None:
    """Spearman correlations of a flip test: a bar per estimator and group, a dot per block."""
    names = list(record["estimators"])
    figure, axis = plt.subplots(figsize=(9, 0.52 * _some(names) + 1.6), layout="constrained")
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


def draw_synthetic(record: dict[str, Any], path: Path) -> None:
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
    for name, found in record["cosines"].items():
        counts = found["histogram"]
        low, high = record["histogram_range"]
        edges = np.linspace(low, high, len(counts) + 1)
        axes[2].stairs(counts, edges, fill=True, alpha=0.6, label=name.replace("_", " "))
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


def draw_comparison(record: dict[str, Any], path: Path) -> None:
    """A comparison's arms: held-out error and distance to real, a dot per seed, a bar the mean."""
    rows = record["rows"]
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 0.3 * _some(rows) + 1.2), sharey=True, layout="constrained"
    )
    panels = (
        ("held_out_error", 1000.0, "held-out error x 1000, to the unpruned model"),
        ("frechet", 1.0, "Frechet distance to real images"),
    )
    for axis, (measured, scale, label) in zip(axes, panels, strict=True):
        for place, row in enumerate(rows):
            values = [scale * value for value in row.get(f"{measured}_by_seed", [])]
            if not values:
                why = " diverged" if "frechet" not in row else " not measured"
                axis.text(0.0, place, why, va="center", fontsize=8)
                continue
            axis.barh(place, scale * row[measured], 0.7, color="0.8")
            axis.plot(values, [place] * len(values), "o", ms=4, color="tab:blue", alpha=0.8)
        axis.set_xlabel(label, fontsize=9)
    axes[1].axvline(record["floor"]["frechet"], color="black", ls=":", lw=1, label="floor")
    axes[1].legend(fontsize=8)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(record["about"], fontsize=10)
    save_figure(figure, path)


def draw_schedules(record: dict[str, Any], path: Path) -> None:
    """The learned tables of a comparison, first seeds: keep ratio by block and time."""
    rows = [row for row in record["rows"] if row.get("schedules")]
    columns = min(3, _some(rows))
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 2.1 * lines), squeeze=False, layout="constrained"
    )
    for axis, row in zip(axes.flat, rows, strict=False):
        table = np.array(row["schedules"][0]).T[:, ::-1]  # noisiest first, as a sampler goes
        shown = axis.imshow(table, aspect="auto", origin="lower", vmin=0, vmax=1)
        axis.set_title(row["name"], fontsize=8)
        axis.set_yticks(range(len(table)), range(1, len(table) + 1), fontsize=7)
        axis.set_ylabel("block", fontsize=7)
        axis.set_xticks([-0.5, table.shape[1] - 0.5], ["t = 1 (noise)", "0"], fontsize=7)
        figure.colorbar(shown, ax=axis)
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    figure.suptitle("Learned keep ratios, first seed", fontsize=10)
    save_figure(figure, path)


def draw_tradeoff(record: dict[str, Any], path: Path) -> None:
    """A comparison's arms by series: held-out error and distance to real over FLOPs."""
    rows, arms = record["rows"], record["config"]["arms"]
    _some([arm for arm in arms.values() if "series" in arm] and rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    panels = (
        ("held_out_error", 1000.0, "held-out error x 1000, to the unpruned model"),
        ("frechet", 1.0, "Frechet distance to real images"),
    )
    for axis, (measured, scale, label) in zip(axes, panels, strict=True):
        for series in dict.fromkeys(arm["series"] for arm in arms.values() if "series" in arm):
            ours = [row for row in rows if arms.get(row["method"], {}).get("series") == series]
            ours = [row for row in ours if measured in row]  # all seeds of others diverged
            ours.sort(key=lambda row: row["flops"])
            at = [row["flops"] / rows[0]["flops"] for row in ours]
            (line,) = axis.plot(at, [scale * row[measured] for row in ours], lw=1, label=series)
            for x, row in zip(at, ours, strict=True):
                values = [scale * value for value in row[f"{measured}_by_seed"]]
                axis.plot([x] * len(values), values, "o", ms=4, color=line.get_color(), alpha=0.7)
        axis.set_xlabel("FLOPs, as a share of the unpruned model's", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        axis.set_yscale("log")
    axes[1].axhline(record["floor"]["frechet"], color="black", ls=":", lw=1, label="floor")
    axes[1].legend(fontsize=8)
    figure.suptitle(record["about"], fontsize=10)
    save_figure(figure, path)


def draw_scaling(record: dict[str, Any], path: Path) -> None:
    """Time of a forward over the number of tokens, and speed-ups beside those by FLOPs alone."""
    sizes = record["sizes"]
    _some(sizes and sizes[0]["rows"])
    tokens = [size["image_tokens"] for size in sizes]
    arms = [row["arm"] for row in sizes[0]["rows"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for arm in arms:
        rows = [{row["arm"]: row for row in size["rows"]}[arm] for size in sizes]
        times = [float(np.median(row["latency_ms"])) for row in rows]
        (line,) = axes[0].plot(tokens, times, "o-", ms=4, label=arm)
        if "parts_ms" in rows[0]:
            colour = line.get_color()
            measured = [row["speed_up"] for row in rows]
            ideal = [row["ideal_speed_up"] for row in rows]
            axes[1].plot(tokens, measured, "o-", ms=4, color=colour, label=arm)
            axes[1].plot(tokens, ideal, ":", color=colour, label=f"{arm}, by FLOPs")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("ms per forward")
    axes[1].axhline(1.0, color="black", lw=0.8)
    axes[1].set_ylabel("speed-up")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axis.set_xlabel("image tokens, N")
        axis.legend(fontsize=8)
    config = record["config"]
    figure.suptitle(f"{config['model']}, {config['dtype']}, {config['mode']}", fontsize=10)
    save_figure(figure, path)


def draw_front(record: dict[str, Any], path: Path) -> None:
    """PSNR over cost: a column for each guidance, FLOPs above and, where it was taken, time below.

    The front is drawn through all arms; what is on it has a ring.
    """
    fronts, modes = record["fronts"], list(record["modes"])
    _some(fronts)
    costs: dict[str, Cost] = {
        "FLOPs, in forwards of the unpruned model": lambda row: row.get("forwards")
    }
    for mode in modes:
        costs[f"time, {mode}, share of the unpruned model's"] = _time(mode)
    figure, axes = plt.subplots(
        len(costs),
        len(fronts),
        figsize=(7.2 * len(fronts), 5.2 * len(costs)),
        squeeze=False,
        layout="constrained",
    )
    for line, (label, cost) in zip(axes, costs.items(), strict=True):
        for axis, front in zip(line, fronts, strict=True):
            _draw(axis, front["rows"], cost)
            axis.set_xlabel(label)
            axis.set_ylabel("PSNR to the unpruned model, dB")
            scale = front["guidance"]
            axis.set_title("no guidance" if scale == 1 else f"guidance {scale:g}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


def _time(mode: str) -> Cost:
    return lambda row: row.get("times", {}).get(mode, {}).get("share")


def _draw(axis: Axes, rows: Sequence[Mapping[str, Any]], cost: Cost) -> None:
    found = [(c, row) for row in rows if "psnr" in row and (c := cost(row)) is not None]
    colours = plt.get_cmap("tab20")
    for place, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
        mine = sorted((c, row["psnr"]) for c, row in found if row["series"] == series)
        costs, values = [c for c, _ in mine], [value for _, value in mine]
        colour = colours(place % 20)
        axis.plot(costs, values, "o-", color=colour, label=series, ms=4, lw=1.2, alpha=0.9)
    best, front = -float("inf"), []
    for c, row in sorted(found, key=lambda pair: (pair[0], -pair[1]["psnr"])):
        if row["psnr"] > best:
            best = row["psnr"]
            front.append((c, best))
    axis.step(
        [c for c, _ in front], [v for _, v in front], where="post", color="0.6", lw=3, zorder=0
    )
    axis.plot([c for c, _ in front], [v for _, v in front], "o", mfc="none", mec="black", ms=9)
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "comparison": draw_comparison,
    "flips": draw_flips,
    "scaling": draw_scaling,
    "schedules": draw_schedules,
    "synthetic": draw_synthetic,
    "frontier": draw_front,
    "tradeoff": draw_tradeoff,
}
_MARKER = re.compile(
    r"<!-- plot (?P<kind>\w+): (?P<record>\S+) -->\r?\n!\[[^\]]*\]\((?P<file>\S+)\)"
)


def draw_plots(text: str, folder: Path) -> list[Path]:
    """Draw every plot of a document from its record.

    A plot is an image under `<!-- plot KIND: RECORD -->`; paths are relative to the document.

    Raises:
        ValueError: If a kind is unknown, a record missing, or a marker has no image under it.
    """
    found = list(_MARKER.finditer(text))
    if len(found) != text.count("<!-- plot "):
        raise ValueError(f"a plot's marker in {folder} has no image on the line below it.")
    for match in found:
        if match["kind"] not in PLOTS:
            raise ValueError(f"there is no plot {match['kind']!r}; known: {', '.join(PLOTS)}.")
        record = folder / match["record"]
        if not record.is_file():
            raise ValueError(f"the record {record} is missing.")
        with read_as(f"record of a plot {match['kind']!r}", record):
            PLOTS[match["kind"]](read_json(record), folder / match["file"])
    return [folder / match["file"] for match in found]
