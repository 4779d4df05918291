"""Training that starts from an adapter instead of from random routers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn

from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.models.backbone import LORA_PREFIX, PEFT_NAME
from shiva_dit.provenance import load_tensors, module_digest, tensors_digest
from shiva_dit.training.recipe import TrainConfig

FREE = {"keep_ratio", "target_range", "multiple", "num_bins", "select_every", "base_model"}
"""What may differ between an adapter and one that starts from it: nothing of these has weights that
can't start at zero."""


def read_start(config: TrainConfig, adapter: ShivaAdapter, model: nn.Module) -> ShivaAdapter:
    """The adapter to start from, its weights as they are for this model.

    Args:
        config: The recipe, which names it.
        adapter: The untrained one of the recipe.
        model: The backbone, without a LoRA of ours.

    Raises:
        ValueError: If there is no adapter, it is of another shape, or its tuned weights are another
            model's and that isn't given.
    """
    folder = config.start
    assert folder is not None
    if not folder.is_dir():  # names of two parts would be looked for on the Hub
        raise ValueError(f"start: there is no folder {folder}: train that adapter first.")
    given = ShivaAdapter.from_pretrained(folder).at(config.keep_ratio)
    if given.parts is not None:
        if config.expert is None:
            raise ValueError(f"start: {folder} holds two experts: start from the folder of one.")
        given = given.part(config.expert)
    given.check_fits(model)
    for field in fields(ShivaConfig):
        ours, theirs = (getattr(a.config, field.name) for a in (adapter, given))
        if field.name not in FREE and ours != theirs:
            raise ValueError(
                f"start: {folder} has {field.name} = {theirs!r} and the recipe asks for {ours!r}: "
                "set the recipe's like that."
            )
    if given.config.backbone == "full":
        shapes = {name: value.shape for name, value in model.named_parameters()}
        for name, value in given.backbone_weights.items():
            if shapes.get(name) != value.shape:
                raise ValueError(f"start: {folder} tunes {name}, which the model hasn't so.")
        _move(given, config, model)
    return given


def _move(given: ShivaAdapter, config: TrainConfig, model: nn.Module) -> None:
    """Let tuned weights differ from this model's as they differed from their own."""
    if config.start_base is None:
        found: Any = given.training_record  # of any form
        found = found.get("backbone") if isinstance(found, dict) else None
        trained_for = found.get("sha256") if isinstance(found, dict) else None
        if trained_for not in (None, module_digest(model)):
            raise ValueError(
                f"start: {config.start} tunes the weights of another model than this one: give "
                "that one's as start_base, a safetensors file or a transformer's folder."
            )
        return
    base, own = _weights(config.start_base), dict(model.named_parameters())
    moved: dict[str, Tensor] = {}
    for name, tuned in given.backbone_weights.items():
        if name not in base or base[name].shape != tuned.shape:
            raise ValueError(f"start_base: {config.start_base} has no {name} of this shape.")
        moved[name] = own[name].detach().cpu() + (tuned.float() - base[name].float())
    given.backbone_weights = moved


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of all files of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"start_base: there is no safetensors file at {path}.")
    return {name: value for file in files for name, value in load_tensors(file).items()}


@torch.no_grad()
def start_from(given: ShivaAdapter, adapter: ShivaAdapter, model: Any) -> str:
    """Give an untrained adapter, and the backbone in training, another's weights.

    Args:
        given: The other adapter.
        adapter: Of the recipe.
        model: The backbone, with the recipe's LoRA on, if it has one.

    Returns:
        SHA-256 of all that was taken.
    """
    taken = given.state_dict()
    for name, value in adapter.state_dict().items():
        if name.startswith("policy.") and name.endswith("_by_target"):
            taken.setdefault(name, torch.zeros_like(value))
    if adapter.config.target_range is None:
        taken = {name: value for name, value in taken.items() if "_by_target" not in name}
    adapter.load_state_dict(taken)
    tuned = given.backbone_weights
    if given.config.backbone == "full":
        parameters = dict(model.named_parameters())
        for name, value in tuned.items():
            parameters[name].copy_(value)
    elif tuned:
        weights = {name.removeprefix(LORA_PREFIX): value.float() for name, value in tuned.items()}
        set_peft_model_state_dict(model, weights, adapter_name=PEFT_NAME)
    return tensors_digest(sorted({**given.state_dict(), **tuned}.items()))
