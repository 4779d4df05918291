"""What a comparison trained, kept: an adapter as any other, a control beside what rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import shiva_dit
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.config import from_dict, to_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.base import Reducer, Selector
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.reducing import Reduction, attach_reducer
from shiva_dit.models.tuned import TunedBackbone
from shiva_dit.modules.updates import RejectedUpdates
from shiva_dit.provenance import file_digest, write_atomically, write_json
from shiva_dit.saved_folder import CONFIG_FILE
from shiva_dit.training.making import adapter_config, made_reducer
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trained import Trained

CONTROL_FILE = "control.json"
CONTROL_WEIGHTS = "control.safetensors"


def keep(trained: Trained, recipe: TrainConfig, folder: Path) -> dict[str, str]:
    """Write what was trained into a folder.

    Args:
        trained: An adapter, for `shiva_dit.apply`, or a control, for `put_on`.
        recipe: How it was trained.
        folder: Made where it isn't there.

    Returns:
        The SHA-256 of each file, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if trained.adapter is not None:
        trained.adapter.save_pretrained(folder)
    else:
        tensors = {f"backbone.{name}": value for name, value in trained.backbone_weights.items()}
        for part, module in (("selector", trained.reducer), ("updates", trained.updates)):
            state = {} if module is None else module.state_dict()
            tensors |= {f"{part}.{name}": value for name, value in state.items()}
        held = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        write_atomically(folder / CONTROL_WEIGHTS, lambda path: save_file(held, path))
        plain = {
            "recipe": to_dict(recipe),
            "schedule": json.loads(trained.schedule.to_json()),
            "lora": trained.lora,
        }
        write_json(folder / CONTROL_FILE, plain)
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def put_on(folder: Path, model: Any, *, seed: int = 0) -> Attachment | Reduction | None:
    """Put what a comparison kept on a model of the kind that it was trained on.

    Args:
        folder: As `keep` wrote it: `<out>/trained/<arm>-<seed>` of a comparison.
        model: The backbone.
        seed: Of random selections.

    Returns:
        What is attached; None for the unpruned control, whose weights alone are put on.

    Raises:
        ValueError: If the folder holds neither an adapter nor a control, or another model's.
    """
    if (folder / CONFIG_FILE).is_file():
        shiva_dit.apply(model, folder)
        return attachment_of(model)
    if not (folder / CONTROL_FILE).is_file():
        raise ValueError(f"{folder} holds neither {CONFIG_FILE} nor {CONTROL_FILE}.")
    plain = json.loads((folder / CONTROL_FILE).read_text(encoding="utf-8"))
    recipe = from_dict(TrainConfig, plain["recipe"], str(folder / CONTROL_FILE))
    tensors = load_file(folder / CONTROL_WEIGHTS)
    trained = Trained(
        reducer=_reducer(recipe, model, _part(tensors, "selector")),
        schedule=Schedule.from_json(json.dumps(plain["schedule"])),
        backbone_weights=_part(tensors, "backbone"),
        lora=plain["lora"],
        adapter=None,
        updates=_updates(recipe, model, _part(tensors, "updates")),
    )
    return put_trained_on(trained, trained.schedule, model, seed=seed)


def put_trained_on(
    trained: Trained, schedule: Schedule, model: Any, *, seed: int
) -> Attachment | Reduction | None:
    """Weights and hooks of what was trained on a model; choices of chance start from a seed."""
    if trained.backbone_weights:
        TunedBackbone(model, trained.backbone_weights, trained.lora).put_on()
    if trained.reducer is None:
        return None
    reducer = trained.reducer.seeded(seed)
    if not isinstance(reducer, Selector):
        return attach_reducer(model, reducer)
    every = 1 if trained.adapter is None else trained.adapter.config.select_every
    return attach(model, reducer, schedule, updates=trained.updates, select_every=every)


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


def _reducer(recipe: TrainConfig, model: Any, state: dict[str, Tensor]) -> Reducer | None:
    reducer = made_reducer(
        recipe,
        model,
        lambda: _own_grid(model),
        router=None,  # ours is an adapter
        generator=torch.Generator(),
    )
    if reducer is not None:
        reducer.load_state_dict(state)
    return reducer


def _own_grid(model: Any) -> tuple[int, int]:
    """That of the square images that the model's config states."""
    side = model.config.sample_size // model.config.patch_size
    return side, side


def _updates(recipe: TrainConfig, model: Any, state: dict[str, Tensor]) -> RejectedUpdates | None:
    if not state:
        return None
    updates = ShivaAdapter(adapter_config(recipe, model)).updates
    assert updates is not None
    updates.load_state_dict(state)
    return updates.to(next(model.parameters()).device)
