"""The flip test on a demo task: record, table and plot."""

from __future__ import annotations

from pathlib import Path

import torch

import shiva_dit
from shiva_dit.config import to_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.demo.base import load_backbone, shipped_adapter
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.plots import draw_flips
from shiva_dit.inspection import FlipConfig, flips
from shiva_dit.methods.random_tokens import RandomSelector
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.provenance import provenance, write_json
from shiva_dit.report.estimators import flips_rows
from shiva_dit.report.layout import plain_rows


def run_flips(
    task_name: str,
    adapter: Path | None,
    random_keep_ratio: float | None,
    config: FlipConfig,
    out: Path,
) -> str:
    """Run the flip test and write its record and plot.

    Args:
        task_name: A demo task.
        adapter: An adapter's folder; the shipped one by default.
        random_keep_ratio: Select by chance at this keep ratio, instead of by an adapter.
        config: How much is flipped.
        out: Folder for `flips.json` and `flips.png`.

    Returns:
        The table and where things are, to print.

    Raises:
        ValueError: If both selections are asked for, or none is there.
    """
    if adapter is not None and random_keep_ratio is not None:
        raise ValueError("select by --adapter or by --random, not by both.")
    task = load_task(task_name)
    model = load_backbone(task)
    out.mkdir(parents=True, exist_ok=True)
    if random_keep_ratio is not None:
        schedule = Schedule.uniform(random_keep_ratio, num_blocks=task.num_blocks)
        attach(model, RandomSelector(torch.Generator().manual_seed(config.seed)), schedule)
        chosen_by = f"random selection at {random_keep_ratio:g}"
    else:
        shiva_dit.apply(model, adapter or shipped_adapter(task))
        chosen_by = "a trained adapter"
    attachment = attachment_of(model)
    assert attachment is not None
    record = flips(attachment, task, config)
    ratio = record["keep_ratio"]
    record |= {
        "what": f"flips-{task_name}-{'adapter' if random_keep_ratio is None else 'random'}",
        "title": f"Flip test on the {task_name}, {chosen_by}, mean keep ratio {ratio:.2f}",
        "config": to_dict(config),
        "provenance": provenance(),
    }
    write_json(out / "flips.json", record)
    draw_flips(record, out / "flips.png")
    return (
        f"\n{plain_rows(flips_rows(record))}\n\nPlot:   {out / 'flips.png'}\n"
        f"Record: {out / 'flips.json'}"
    )
