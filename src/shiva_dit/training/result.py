"""The end of a run: the adapter, and what is to be said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shiva_dit.core.schedule import Schedule
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_flops
from shiva_dit.provenance import write_json
from shiva_dit.training.student import Student
from shiva_dit.training.trained import Trained
from shiva_dit.training.trainer import Trainer

RESULT_FILE = "result.json"
"""How a run went: what `shiva-dit publish` tells of it."""


def finish(trainer: Trainer, trained: Trained, folder: Path) -> None:
    """Write the adapter of a run, and how it went.

    Args:
        trainer: At the end of it.
        trained: What it gives.
        folder: Of the adapter.
    """
    config, looks = trainer.config, trainer.looks
    adapter = looks.chosen(trained)
    adapter.save_pretrained(folder)
    sample = trainer.data.batch(torch.zeros(1, dtype=torch.long), torch.Generator())
    text = sample.conditioning.get("encoder_hidden_states")
    num_text = trainer.student.spec.text_tokens if text is None else text.shape[1]
    result: dict[str, Any] = {
        "what": "training",
        "steps": trainer.step,
        "steps_of_recipe": config.total_steps,
        "steps_of_adapter": adapter.training_record["steps"],
        "seconds": round(looks.pace.seconds, 1),
        "processes": trainer.processes.count,
        "device": str(trainer.student.device),
        "last_look": looks.last,
        "cost": cost(trainer.student, adapter.schedule, num_text),
    }
    if config.watch.patience > 0 and looks.best.step is not None:
        result["best"] = {"step": looks.best.step, "error": looks.best.error}
        result["stopped_early"] = looks.enough
    write_json(config.out / RESULT_FILE, result)


def cost(student: Student, schedule: Schedule, text_tokens: int) -> dict[str, Any]:
    """FLOPs of one sample's forward with the adapter on, as `shiva_dit.summary` counts them.

    Args:
        student: With its hooks on.
        schedule: The adapter's.
        text_tokens: T, of the data.
    """
    num_tokens, attachment = student.planned_tokens, student.attachment
    table, beside = schedule.for_tokens(num_tokens), student.num_references
    kept = attachment.counts.reference_row(beside) if beside else (0,) * schedule.num_blocks
    every = num_tokens + beside
    try:
        by_frame = student.roles.clean is not None
        dense = model_flops(student.model, every, text_tokens, by_frame).dense()
        every_row = [[*map(sum, zip(row, kept, strict=True))] for row in table.counts]
        rows = [pruned_flops(attachment, every, text_tokens, row, by_frame) for row in every_row]
    except ValueError as error:  # blocks that the config doesn't tell of
        return {"not_known": str(error)}
    return {
        "num_tokens": num_tokens,
        "num_references": beside,
        "text_tokens": text_tokens,
        "keep_ratio": table.mean_keep_ratio,
        "flops_dense": dense,
        "flops_pruned": round(table.weighed([float(flops) for flops in rows])),
        "law": schedule.law.name,
    }
