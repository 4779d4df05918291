"""What a training gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.base import Reducer
from shiva_dit.modules.updates import RejectedUpdates


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
