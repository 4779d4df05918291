"""What a run was made from, recipe, backbone and data, and whether another could go on with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shiva_dit.config import from_dict, to_dict
from shiva_dit.provenance import module_digest
from shiva_dit.training.data import TrainingData, data_origin

FREE = {
    "out",
    "checkpoint_every",
    "optimizer",
    "gradient_checkpointing",
    "backbone_dtype",
    "shard",
    "task",
    "watch",
}
"""What a resumed run may change: where and how often it saves, how fast it learns, and how it is
looked at. The task, and what is held back from training, are told by the data's identity, which is
compared by itself."""
HELD_BACK = ", also with the same watch.held_out_share, by which samples are not trained on"
COMPARED = (
    ("data", "samples", "samples"),
    ("data", "identity", "data"),
    ("backbone", "sha256", "model"),
    ("sampler", "time_law", "scheduler"),
    ("start", "sha256", "adapter to start from"),
)
"""What an origin is compared by, and the word for it."""


def origin(model: torch.nn.Module, data: TrainingData) -> dict[str, Any]:
    """Which model and data a run starts from: names, and digests of their content."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    backbone = {
        "name": name,
        "class": type(model).__name__,
        "sha256": module_digest(model),
    }
    return {"backbone": backbone, "data": data_origin(data)}


def check_recipe(
    config: object, saved: dict[str, Any], path: Path, free: Collection[str] = FREE
) -> None:
    """Raise unless a run that was saved with other settings could go on with these.

    Args:
        config: The recipe.
        saved: The one that it was saved with.
        path: Named in errors.
        free: Settings that may differ.

    Raises:
        ValueError: Names what was changed.
    """
    current, then = (
        json.loads(json.dumps(to_dict(config)))
        # Settings that it was saved without count as their defaults.
        for config in (config, from_dict(type(config), saved, str(path)))
    )
    changed = sorted(k for k in current if k not in free and then[k] != current[k])
    for held in ("optimizer",) if "optimizer" in free else ():  # what checkpoints hold, not rates
        ours, theirs = (each.get(held, {}).get("eight_bit") for each in (current, then))
        changed += [f"{held}.eight_bit"] if ours != theirs else []
    if changed:
        raise ValueError(
            f"{path} was made with other values of {', '.join(changed)}: resume with the same "
            "recipe, or train into another folder."
        )


def check_origin(ours: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    """Raise unless model and data are those that a checkpoint was made with.

    Args:
        ours: This run's.
        state: The checkpoint's.
        path: Named in errors.

    Raises:
        ValueError: Says which is another.
    """
    then = state.get("origin")
    if then is None:  # an older version's
        then = {"data": {"samples": state["data"]["samples"]}}
        tqdm.write(
            f"{path} is an older version's: whether backbone and data are the same isn't known.",
            file=sys.stderr,
        )
    for kind, key, what in COMPARED:
        found = ours.get(kind, {}).get(key)
        wanted = then.get(kind, {}).get(key, found)
        if found != wanted:
            raise ValueError(
                f"{path} was made with another {what} than this run's ({wanted} then, {found} "
                f"now): resume with the same{HELD_BACK if kind == 'data' else ''}, or train into "
                "another folder."
            )
