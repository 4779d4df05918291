"""A frontier's contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from torch import Tensor

from shiva_dit.experiments.frontier.config import REFERENCE, Frontier, points
from shiva_dit.experiments.frontier.run import POINTS
from shiva_dit.experiments.plots import save_figure
from shiva_dit.provenance import load_tensors

SHOWN = 8
"""Pictures of a line of the contact sheet."""


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
