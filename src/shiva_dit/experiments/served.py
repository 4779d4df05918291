"""What the shipped adapter gives at 1,024 tokens, beside the unpruned model, here and now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import shiva_dit
from shiva_dit.benchmark.timing import interleaved
from shiva_dit.demo.base import load_backbone, shipped_adapter
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.frontier.executed import counted
from shiva_dit.experiments.maps import kept_maps
from shiva_dit.experiments.plots import save_figure
from shiva_dit.experiments.scoring import sample
from shiva_dit.metrics import psnr
from shiva_dit.models.attach import attachment_of
from shiva_dit.provenance import provenance, write_json

CAPTION_LINE = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """What is sampled."""

    task: str = "scenes64"
    """A demo task that an adapter ships for."""
    batch: int = 4
    """Pictures at a time."""
    num_steps: int = 8
    """UniPC steps."""
    guidance: float = 4.0
    """Guidance scale."""
    repeats: int = 3
    """Rounds of each, in turn."""
    seed: int = 0
    """Of the initial noise."""

    def sampling(self) -> dict[str, Any]:
        """How, as `sample` takes it."""
        return {
            "seed": self.seed,
            "num_steps": self.num_steps,
            "sampler": "unipc",
            "guidance": self.guidance,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What came of it."""

    record: dict[str, Any]
    """Seconds per picture, speed-up, what FLOPs give, decibels."""
    captions: list[str]
    unpruned: Float[Tensor, "B C H W"]
    ours: Float[Tensor, "B C H W"]
    maps: Bool[Tensor, "L T B N"]
    """Kept tokens by block, step and picture."""


def serve(serving: Serving) -> Served:
    """Sample by the unpruned model and by the shipped adapter, in turns, on all cores.

    Raises:
        ValueError: If no adapter ships for the task.
    """
    task = load_task(serving.task)
    models: dict[str, Any] = {name: load_backbone(task) for name in ("unpruned", "ours")}
    shiva_dit.apply(models["ours"], shipped_adapter(task))
    attachment = attachment_of(models["ours"])
    assert attachment is not None
    pictures: dict[str, Tensor] = {}
    flops: dict[str, int] = {}
    with _all_cores() as threads:
        for name, model in models.items():
            with counted(model) as counts:
                pictures[name] = _sampled(task, model, serving)
            flops[name] = sum(counts)
        calls: dict[str, Callable[[], object]] = {
            name: partial(_sampled, task, model, serving) for name, model in models.items()
        }
        times = interleaved(calls, repeats=serving.repeats, device=torch.device("cpu"))
        how = provenance()
    maps = kept_maps(task, attachment, serving.batch, **serving.sampling())
    record = {
        "what": f"served-{serving.task}",
        "config": serving,
        "num_tokens": task.num_tokens,
        "keep_ratio": attachment.schedule.mean_keep_ratio,
        "threads": threads,
        "seconds": {n: t.median_ms / 1000.0 / serving.batch for n, t in times.items()},
        "speed_up": 1.0 / times["ours"].share_of(times["unpruned"]),
        "flops_ratio": flops["unpruned"] / flops["ours"],
        "psnr": psnr(pictures["ours"], pictures["unpruned"]),
        "provenance": how,
    }
    captions = task.prompts(0, serving.batch)[0]
    return Served(record=record, captions=captions, maps=maps, **pictures)


def _sampled(task: DemoTask, model: Any, serving: Serving) -> Tensor:
    return sample(task, model, serving.batch, **serving.sampling())[0]


@contextmanager
def _all_cores() -> Iterator[int]:
    """Within: torch runs on as many threads as this process has cores."""
    before = torch.get_num_threads()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or 1)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def said(record: dict[str, Any]) -> str:
    """The record in a few lines, for a terminal."""
    serving, seconds = record["config"], record["seconds"]
    return (
        f"Captioned scenes of {record['num_tokens']} tokens by the shipped adapter, keep ratio "
        f"{record['keep_ratio']:.2f}: {serving.num_steps} UniPC steps, guidance "
        f"{serving.guidance:g}, {serving.batch} pictures at a time, {record['threads']} threads, "
        f"in turns\n"
        f"  unpruned  {seconds['unpruned']:.2f} s per picture\n"
        f"  ours      {seconds['ours']:.2f} s per picture: {record['speed_up']:.2f} times as fast "
        f"(FLOPs say {record['flops_ratio']:.2f}), {record['psnr']:.1f} dB to the unpruned pictures"
    )


def draw_served(path: Path, served: Served) -> None:
    """Write the picture as a PNG: both models' pictures, and the tokens that ran.

    Args:
        path: Where.
        served: What came of serving.
    """
    record, maps = served.record, served.maps
    shares = maps[1:].float().mean((0, 1))  # (B, N), over pruned blocks and all steps
    side = round(maps.shape[-1] ** 0.5)
    rows = {
        f"unpruned\n{record['seconds']['unpruned']:.2f} s each": served.unpruned,
        f"ours\n{record['seconds']['ours']:.2f} s each": served.ours,
        "share of blocks and\nsteps that a token ran in": shares.view(-1, side, side),
    }
    count = len(served.captions)
    figure, axes = plt.subplots(len(rows), count, figsize=(2.1 * count + 1.9, 7.4), squeeze=False)
    figure.subplots_adjust(left=0.17, right=0.99, top=0.86, bottom=0.02, wspace=0.05, hspace=0.05)
    title = (
        f"{record['num_tokens']} tokens, keep ratio {record['keep_ratio']:.2f}: "
        f"{record['speed_up']:.2f} times as fast here, FLOPs say {record['flops_ratio']:.2f}"
    )
    figure.suptitle(title, fontsize=12)
    for row, (name, images) in enumerate(rows.items()):
        for axis, image in zip(axes[row], images, strict=True):
            if image.ndim == 3:
                axis.imshow(((image.clamp(-1, 1) + 1) / 2).movedim(0, -1))
            else:
                axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row][0].set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center")
    for axis, caption in zip(axes[0], served.captions, strict=True):
        axis.set_title(_wrapped(caption), fontsize=8)
    save_figure(figure, path)


def _wrapped(caption: str) -> str:
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) > CAPTION_LINE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def run_served(serving: Serving, out: Path) -> str:
    """Serve, and write `served.png` and `served.json`; what is to be printed.

    Args:
        serving: What is sampled.
        out: Folder, which is there.
    """
    served = serve(serving)
    write_json(out / "served.json", served.record)
    draw_served(out / "served.png", served)
    return f"{said(served.record)}\n\nPicture: {out / 'served.png'}"
