"""A frontier's plot and contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from shiva_dit.experiments.frontier.config import REFERENCE, Frontier, points
from shiva_dit.experiments.frontier.run import POINTS
from shiva_dit.experiments.plots import save_figure
from shiva_dit.provenance import load_tensors

Cost = Callable[[Mapping[str, Any]], float | None]
SHOWN = 8
"""Pictures of a line of the contact sheet."""


def draw_front(record: dict[str, Any], path: Path) -> None:
    """PSNR over cost: a column for each guidance, FLOPs above and, where it was taken, time below.

    The front is drawn through all arms; what is on it has a ring.
    """
    fronts, modes = record["fronts"], list(record["modes"])
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
    axis.grid(alpha=0.3)


def draw_sheet(frontier: Frontier, record: dict[str, Any], out: Path, path: Path) -> None:
    """The first pictures of the truth and of each arm at its middle number of steps, last guidance.

    Args:
        frontier: What was run.
        record: Its record.
        out: Its folder.
        path: The PNG.
    """
    front = record["fronts"][-1]
    rows = {(row["arm"], row["steps"]): row for row in front["rows"]}
    lines: list[tuple[str, Tensor]] = []
    seen: set[str] = set()
    for point in points(frontier):
        if point.guidance != front["guidance"] or point.seed != frontier.seeds[0]:
            continue
        middle = sorted(point.arm.steps)[len(point.arm.steps) // 2]
        row = rows.get((point.key, point.steps))
        wanted = point.key == REFERENCE or (row is not None and "psnr" in row)
        if point.steps != middle or point.key in seen or not wanted:
            continue
        seen.add(point.key)
        file = out / POINTS / f"{point.name}.safetensors"
        images = load_tensors(file)["images"][:SHOWN].float()
        said = f"unpruned, {point.steps} steps"
        if row is not None:
            said = f"{point.arm.name}, {point.steps} steps\n"
            said += f"{row['forwards']:.2f} forwards, {row['psnr']:.1f} dB"
        lines.append((said, images))
    figure, axes = plt.subplots(
        len(lines),
        SHOWN + 1,
        figsize=(1.15 * SHOWN + 3.2, 1.2 * len(lines)),
        squeeze=False,
        width_ratios=[2.8] + [1.0] * SHOWN,
        layout="constrained",
    )
    for line, (said, images) in zip(axes, lines, strict=True):
        line[0].text(0.0, 0.5, said, va="center", fontsize=9)
        for axis, image in zip(line[1:], images, strict=False):
            shown = (image.clamp(-1, 1) + 1) / 2
            axis.imshow(shown.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
        for axis in line:
            axis.axis("off")
    save_figure(figure, path)
