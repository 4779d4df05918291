"""What a training gives."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.adapter.config import lora_metadata
from shiva_dit.adapter.module import AdapterModule
from shiva_dit.config import to_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.base import Reducer
from shiva_dit.methods.registry import METHODS
from shiva_dit.models.backbone import backbone_weights, first_not_finite
from shiva_dit.modules.updates import RejectedUpdates
from shiva_dit.provenance import provenance
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.student import Student


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run gives: put it on a model with `attach`, `attach_reducer` and `TunedBackbone`."""

    reducer: Reducer | None
    """None for the dense control."""
    schedule: Schedule
    backbone_weights: dict[str, Tensor]
    lora: dict[str, Any] | None
    """PEFT's settings, where these are a LoRA's."""
    adapter: ShivaAdapter | None
    """Ours only."""
    updates: RejectedUpdates | None
    """What rejected tokens get; None: nothing."""

    def at(self, keep_ratio: float) -> Schedule:
        """The learned schedule with its anchor moved to another mean ratio in (0, 1].

        Raises:
            ValueError: For controls, which have none.
        """
        if self.adapter is None:
            raise ValueError("a control has no schedule that could be moved to another ratio.")
        law = self.adapter.schedule.law
        return self.adapter.policy.schedule(keep_ratio, self.adapter.config.num_bins, law)


def learned_schedule(config: TrainConfig, adapter: AdapterModule) -> Schedule:
    """The ratios that an adapter's policy gives by now, or its fixed ones."""
    if not config.learns_policy:
        return adapter.schedule
    law = adapter.schedule.law
    return adapter.policy.schedule(config.keep_ratio, config.policy.num_bins, law)


def trained_from(student: Student, about: dict[str, Any]) -> Trained:
    """What a student's weights, as they are now, give.

    Args:
        student: In training.
        about: Goes into the adapter's record.

    Raises:
        FloatingPointError: If a weight is not finite, in the dtype that it is saved in.
    """
    config = student.config
    weights = backbone_weights(student.model, config.backbone)
    adapter = copy.deepcopy(student.adapter).cpu().eval()
    learns = METHODS[config.method].learns
    reducer = copy.deepcopy(student.reducer) if learns else student.reducer
    if student.selector is not None:
        learned = student.selector.learned_schedule(adapter.schedule.law)
        adapter.schedule = learned or adapter.schedule
    adapter.schedule = learned_schedule(config, adapter)
    dtype = getattr(torch, config.backbone_dtype)
    adapter.backbone_weights = {k: v.to("cpu", dtype) for k, v in weights.items()}
    broken = first_not_finite({**adapter.state_dict(), **adapter.backbone_weights})
    if broken is not None:
        raise FloatingPointError(
            f"{broken} is not finite as {config.backbone_dtype}: lower the learning rates, or set "
            "backbone_dtype = float32."
        )
    adapter.training_record = {"recipe": to_dict(config), **about, "provenance": provenance()}
    ours = config.method == "shiva"
    return Trained(
        reducer=adapter.selector() if ours else reducer,
        schedule=adapter.schedule,
        backbone_weights=adapter.backbone_weights,
        lora=lora_metadata(adapter.config) if config.backbone in ("lora", "dora") else None,
        adapter=adapter if ours else None,
        updates=adapter.updates if student.updates else None,
    )
