"""A look's picture, and the curves of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.provenance import write_atomically
from shiva_dit.training.log import read_log

STAGES = {"warmup": "0.93", "policy": "0.87", "joint": "1.0"}
"""Shades behind the stages."""
KEPT = (
    (),
    ("kept",),
    ("kept at the start", "kept at the end"),
    ("kept at the start", "kept in the middle", "kept at the end"),
)
"""Titles of as many parts of a sampling."""
FRAMES = 3
"""Of a video, that a picture shows."""
SMOOTHED = 50
"""Points that a thick line shows of a curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt of a look, as pixels (C, H, W) in [-1, 1]."""

    title: str
    dense: Float[Tensor, "C H W"]
    pruned: Float[Tensor, "C H W"]
    kept: Float[Tensor, "parts h w"] | None
    """Share of the blocks that kept a token, in each third of the steps."""


def draw_look(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a look's picture: the unpruned model's, the pruned one's, and kept tokens."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    parts = 0 if rows[0].kept is None else len(rows[0].kept)
    names, columns = ["unpruned", "pruned", *KEPT[parts]], 2 + parts
    heights = [1.7 * row.dense.shape[1] / row.dense.shape[2] for row in rows]
    figure: Any = Figure(
        figsize=(1.9 * columns, 0.7 + sum(heights) + 0.32 * len(rows)), layout="constrained"
    )
    figure.suptitle(textwrap.fill(title, 20 * columns), fontsize=10)
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    shades = None
    for line, row in zip(axes, rows, strict=True):
        for axis, name in zip(line, names, strict=False):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(name if row is rows[0] else "", fontsize=9)
        for axis, pixels in zip(line, (row.dense, row.pruned), strict=False):
            image = (pixels.permute(1, 2, 0).float().clamp(-1, 1) + 1) / 2
            axis.imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        short = textwrap.shorten(row.title, 88, placeholder=" ...")
        line[0].set_xlabel(textwrap.fill(short, 30, break_long_words=True), fontsize=7)
        for axis, shares in zip(line[2:], row.kept if row.kept is not None else (), strict=True):
            shades = axis.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1)
            axis.set_xlabel(f"{float(shares.mean()):.0%}", fontsize=7)
    if shades is not None:
        bar = figure.colorbar(shades, ax=axes[:, 2:], fraction=0.03, pad=0.02)
        bar.set_label("share of the pruned blocks that keep a token", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    save(figure, path)


def latent_pictures(
    latents: Sequence[Float[Tensor, "B C H W"]],
) -> list[Float[Tensor, "B c H W"]]:
    """The first three channels of latents, as pictures of one range for all of them."""
    several = latents[0].shape[1] >= 3
    chosen = [one[:, :3] if several else one[:, :1] for one in latents]
    values = chosen[0].transpose(0, 1).flatten(1).float()
    low, high = (values.quantile(q, dim=1).view(1, -1, 1, 1) for q in (0.01, 0.99))
    return [2 * (one - low) / (high - low).clamp(min=1e-6) - 1 for one in chosen]


def strip(values: Float[Tensor, "B ..."], axis: int) -> Float[Tensor, "B C H W"]:
    """Some frames of videos side by side, from the first to the last; images as they are.

    >>> strip(torch.arange(5.0).view(1, 1, 5, 1, 1), 2)
    tensor([[[[0., 2., 4.]]]])
    """
    if values.ndim == 4:
        return values
    frames = values.unbind(axis)
    places = torch.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().int().tolist()
    return torch.cat([frames[place] for place in places], dim=-1)


def draw_curves(path: Path, log: Path, target: float | None = None) -> bool:
    """Write the curves of a run, read from its log; False if that holds none.

    Args:
        path: Where.
        log: The run's `log.jsonl`.
        target: The mean keep ratio that it aims at.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    lines = read_log(log)
    if not lines:
        return False
    looks = [line for line in lines if "ratios" in line]
    figure: Any = Figure(figsize=(11, 7), layout="constrained")
    (losses, errors), (kept, learned) = figure.subplots(2, 2)
    for axis in (losses, errors, kept):
        _shade_stages(axis, lines)
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _curve(losses, lines, "loss", "tab:blue", "loss")
    losses.set_title("loss", fontsize=10)
    _curve(errors, lines, "distill", "tab:orange", "in training")
    _curve(errors, lines, "guided", "tab:red", "in training, guided")
    _points(errors, lines, "held_out", "tab:blue", "held out")
    _points(errors, lines, "held_out_guided", "tab:purple", "held out, guided")
    errors.set_title("squared error to the unpruned model", fontsize=10)
    if any(line.get(name, 0) > 0 for line in lines for name in ("distill", "held_out")):
        errors.set_yscale("log")
    _curve(kept, lines, "keep", "tab:green", "kept")
    if target is not None:
        kept.axhline(target, color="black", ls=":", lw=1, label="target")
    kept.set_ylim(0, 1.02)
    kept.set_title("mean keep ratio", fontsize=10)
    for axis in (losses, errors, kept):
        axis.tick_params(which="both", labelsize=8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    _draw_ratios(figure, learned, looks)
    save(figure, path)
    return True


def _shade_stages(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    for place, (stage, shade) in enumerate(STAGES.items()):
        steps = [line["step"] for line in lines if line.get("stage") == stage]
        if steps and stage != "joint":
            axis.axvspan(min(steps) - 1, max(steps), color=shade, lw=0)
            axis.annotate(
                stage,
                (min(steps) - 1, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, -9 - 10 * place),
                textcoords="offset points",
                fontsize=7,
                color="0.45",
            )
    if lines[-1]["step"] > lines[0]["step"]:
        axis.set_xlim(lines[0]["step"] - 1, lines[-1]["step"])


def _curve(
    axis: Any, lines: Sequence[Mapping[str, Any]], name: str, colour: str, label: str
) -> None:
    """All values, faint, and their means over equal parts of the run."""
    pairs = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]
    if not pairs:
        return
    steps, values = zip(*pairs, strict=True)
    size = max(1, len(pairs) // SMOOTHED)
    axis.plot(steps, values, color=colour, lw=0.6, alpha=0.35)
    means = [
        (sum(steps[at : at + size]) / size, sum(values[at : at + size]) / size)
        for at in range(0, len(pairs) - size + 1, size)
    ]
    axis.plot(*zip(*means, strict=True), color=colour, lw=1.6, label=label)


def _points(
    axis: Any, lines: Sequence[Mapping[str, Any]], name: str, colour: str, label: str
) -> None:
    pairs = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]
    if pairs:
        axis.plot(
            *zip(*pairs, strict=True), "o-", color=colour, ms=4, lw=1.2, label=label, clip_on=False
        )


def _draw_ratios(figure: Any, axis: Any, looks: Sequence[Mapping[str, Any]]) -> None:
    """The learned ratios of the last look over time and depth."""
    if not looks:
        axis.axis("off")
        axis.text(0.5, 0.5, "no look at the ratios yet", ha="center", fontsize=9, color="0.4")
        return
    ratios = torch.tensor(looks[-1]["ratios"])  # (bins, L)
    shades = axis.imshow(
        ratios.flip(0).numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none"
    )
    bins, blocks = ratios.shape
    axis.set_yticks([-0.5, bins / 2 - 0.5, bins - 0.5], ["1 (noise)", "0.5", "0 (picture)"])
    some = range(0, blocks, max(1, -(-blocks // 12)))
    axis.set_xticks(list(some), [str(block + 1) for block in some])
    axis.set_xlabel("block", fontsize=9)
    axis.set_ylabel("time t", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_title(f"keep ratios at step {looks[-1]['step']}", fontsize=10)
    if ratios.numel() <= 120:
        for row, values in enumerate(ratios.flip(0).tolist()):
            for block, value in enumerate(values):
                colour = "black" if value > 0.6 else "white"
                axis.text(
                    block, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour
                )
    bar = figure.colorbar(shades, ax=axis, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=7)


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all, the same to the byte each time."""

    def write(file: Path) -> None:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})

    write_atomically(path, write)
