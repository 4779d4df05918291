"""Training that starts from an adapter instead of from random routers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import nn

from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.models.backbone import LORA_PREFIX, PEFT_NAME
from shiva_dit.provenance import tensors_digest

FREE = {"keep_ratio", "multiple", "num_bins", "select_every", "base_model"}
"""What may differ between an adapter and one that starts from it: nothing of these has weights."""


def read_start(folder: Path, adapter: ShivaAdapter, model: nn.Module) -> ShivaAdapter:
    """An adapter to start from.

    Args:
        folder: Where it is.
        adapter: The untrained one of the recipe.
        model: The backbone, without a LoRA of ours.

    Raises:
        ValueError: If there is no adapter, or it is of another shape.
    """
    if not folder.is_dir():  # names of two parts would be looked for on the Hub
        raise ValueError(f"start: there is no folder {folder}: train that adapter first.")
    given = ShivaAdapter.from_pretrained(folder)
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
    return given


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
    adapter.load_state_dict(given.state_dict())
    tuned = given.backbone_weights
    if given.config.backbone == "full":
        parameters = dict(model.named_parameters())
        for name, value in tuned.items():
            parameters[name].copy_(value)
    elif tuned:
        weights = {name.removeprefix(LORA_PREFIX): value.float() for name, value in tuned.items()}
        set_peft_model_state_dict(model, weights, adapter_name=PEFT_NAME)
    return tensors_digest(sorted({**given.state_dict(), **tuned}.items()))
