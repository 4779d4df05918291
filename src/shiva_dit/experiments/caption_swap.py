"""Do the kept tokens follow the caption? Own, no, and another image's caption side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import shiva_dit
from shiva_dit.demo.base import load_backbone, shipped_adapter
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.held_out import Captions, masks, noisy_arguments, recorded
from shiva_dit.experiments.plots import draw_caption_swap
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.provenance import provenance, write_json
from shiva_dit.report.estimators import caption_rows
from shiva_dit.report.layout import plain_rows

KINDS: tuple[Captions, ...] = ("true", "empty", "swapped")
TIMES = (1.0, 0.7, 0.4)
COUNT = 200
SHOWN = (0, 3, 4, 7)
"""Held-out images of the picture."""


@torch.no_grad()
def kept_share(
    task: DemoTask, attachment: Attachment, images: list[int], t: float, captions: Captions
) -> Float[Tensor, "L B N"]:
    """Whether each pruned block keeps each token of noisy held-out images, as 0 and 1."""
    with recorded(attachment) as chosen:
        attachment.model(**noisy_arguments(task, images, t, captions))
    return torch.stack(masks(chosen, task.num_tokens)).float()


def caption_swap(task: DemoTask, attachment: Attachment, count: int = COUNT) -> dict[str, Any]:
    """Share of ink tokens kept by kind of caption, time and pruned block, as a plain record.

    At t = 1 nothing of the image is left: there the right place can come from the caption alone.
    "chance" is the share of all tokens kept, which is what a selection blind to both would keep.
    """
    images = list(range(count))
    ink = task.ink(images)
    shares: dict[str, Any] = {kind: {} for kind in (*KINDS, "chance")}
    for t in TIMES:
        kept = {kind: kept_share(task, attachment, images, t, kind) for kind in KINDS}
        for kind in KINDS:
            shares[kind][str(t)] = [float(block[ink].mean()) for block in kept[kind]]
        shares["chance"][str(t)] = [float(block.mean()) for block in kept["true"]]
    return {"shares": shares, "ink": float(ink.double().mean()), "count": count}


def run_caption_swap(task_name: str, adapter: Path | None, out: Path) -> str:
    """Run the ablation and write `captions.json` and `captions.png`; returns what to print.

    Raises:
        ValueError: If no adapter is given and none ships.
    """
    task = load_task(task_name)
    model = load_backbone(task)
    shiva_dit.apply(model, adapter or shipped_adapter(task))
    attachment = attachment_of(model)
    assert attachment is not None
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "what": f"captions-{task_name}",
        **caption_swap(task, attachment),
        "provenance": provenance(),
    }
    write_json(out / "captions.json", record)
    shown = list(SHOWN)
    columns = [("own caption, pure noise", 1.0, "true"), ("own caption, t = 0.7", 0.7, "true")]
    columns += [("no caption, pure noise", 1.0, "empty")]
    columns += [("caption of the next row, pure noise", 1.0, "swapped")]
    maps = [
        (name, kept_share(task, attachment, shown, t, kind).mean(0))  # type: ignore[arg-type]
        for name, t, kind in columns
    ]
    pictures = task.held_out_images[shown]
    draw_caption_swap(pictures, task.held_out_captions(shown), maps, out / "captions.png")
    return (
        f"\n{plain_rows(caption_rows(record))}\n\nPicture: {out / 'captions.png'}\n"
        f"Record:  {out / 'captions.json'}"
    )
