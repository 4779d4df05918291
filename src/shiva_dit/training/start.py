"""Training that starts from an adapter instead of from random routers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict

from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.models.backbone import LORA_PREFIX, PEFT_NAME
from shiva_dit.provenance import tensors_digest

FREE = {"keep_ratio", "multiple", "num_bins", "select_every", "base_model"}
"""What may differ between an adapter and one that starts from it: nothing of these has weights."""


def start_from(folder: Path, adapter: ShivaAdapter, model: Any) -> str:
    """Give an untrained adapter, and the backbone in training, another's weights.

    Args:
        folder: The other adapter's.
        adapter: Of the recipe.
        model: The backbone, with the recipe's LoRA on, if it has one.

    Returns:
        SHA-256 of all that was taken.

    Raises:
        ValueError: If there is no adapter, or it is of another shape.
    """
    given = ShivaAdapter.from_pretrained(folder)
    given.check_fits(model)
    for field in fields(ShivaConfig):
        ours, theirs = (getattr(a.config, field.name) for a in (adapter, given))
        if field.name not in FREE and ours != theirs:
            raise ValueError(
                f"start: {folder} has {field.name} = {theirs!r} and the recipe asks for {ours!r}: "
                "set the recipe's like that."
            )
    adapter.load_state_dict(given.state_dict())
    tuned = given.backbone_weights
    with torch.no_grad():
        if adapter.config.backbone == "full":
            parameters = dict(model.named_parameters())
            for name, value in tuned.items():
                if name not in parameters or parameters[name].shape != value.shape:
                    raise ValueError(f"start: {folder} tunes {name}, which the model hasn't so.")
                parameters[name].copy_(value)
        elif tuned:
            weights = {
                name.removeprefix(LORA_PREFIX): value.float() for name, value in tuned.items()
            }
            set_peft_model_state_dict(model, weights, adapter_name=PEFT_NAME)
    return tensors_digest(sorted({**given.state_dict(), **tuned}.items()))
