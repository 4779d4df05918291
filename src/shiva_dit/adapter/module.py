"""What an adapter is made of."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shiva_dit.adapter.config import ShivaConfig
from shiva_dit.adapter.parts import EXPERTS, Grouping
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.shiva import ShivaSelector
from shiva_dit.models.counted import model_widths
from shiva_dit.models.families import model_spec
from shiva_dit.modules.policy import AdaptiveRatioPolicy
from shiva_dit.modules.router import ShivaRouter
from shiva_dit.modules.updates import RejectedUpdates

logger = logging.getLogger("shiva_dit")

FAR_BELOW, FAR_ABOVE = 0.04, 0.15
"""How far a mean keep ratio may lie outside of what was trained for without a warning. Measured on
the shipped adapters for 0.4: the error is twice as large at 0.35, least at 0.5, and at 0.6 larger
than there again."""


class AdapterModule(nn.Module):
    """Router, policy and schedule for one model; `ShivaAdapter` adds how they are saved.

    Args:
        config: What it is for and how it is built.
        schedule: Keep ratios over time and depth; uniform at the target by default.
    """

    def __init__(self, config: ShivaConfig, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.config = config
        self.router = ShivaRouter(
            config.width,
            config.time_dim,
            config.context_dim,
            config.num_blocks,
            config.num_groups,
            config.hidden,
            config.normalize_inputs,
            config.router_inputs,
            config.num_roles,
        )
        self.policy = AdaptiveRatioPolicy(
            config.num_blocks,
            config.keep_ratio,
            config.full_blocks,
            knows_target=config.target_range is not None,
        )
        self.updates: RejectedUpdates | None = None
        if config.rejected == "low_rank":
            self.updates = RejectedUpdates(
                config.width,
                config.time_dim,
                config.context_dim,
                config.num_blocks,
                config.num_groups,
                config.rejected_rank,
            )
        self.schedule = schedule or Schedule.uniform(
            config.keep_ratio, num_blocks=config.num_blocks, full_blocks=config.full_blocks
        )
        self.backbone_weights: dict[str, Tensor] = {}
        """Tuned weights of the backbone: the whole state ("full") or LoRA's ("lora", "dora")."""
        self.training_record: dict[str, Any] = {}
        """How it was trained: recipe, steps, provenance. Plain data."""
        self.parts: Parts | None = None
        """What belongs to it in one folder, such as the adapter of the other expert of Wan 2.2."""

    def selector(self) -> ShivaSelector:
        """The router as a selection method; shares its weights."""
        return ShivaSelector(self.router)

    @property
    def budgets(self) -> tuple[AdapterModule, ...]:
        """Those for other keep ratios that it is joined with (`ShivaAdapter.of_budgets`)."""
        if self.parts is None or self.parts.grouping.kind != "budgets":
            return ()
        return tuple(self.parts.others.values())

    @property
    def trained_for(self) -> tuple[float, float]:
        """Mean keep ratios, lowest and highest, that it was trained for."""
        own = self.config.keep_ratio
        if self.budgets:
            all_of_them = own, *(each.config.keep_ratio for each in self.budgets)
            return min(all_of_them), max(all_of_them)
        recorded = self._recorded("recipe", "policy", "target_range")  # all that older ones have
        return self.config.target_range or recorded or (own, own)

    @property
    def trained_for_guidance(self) -> tuple[float, float] | None:
        """Guidance scales, lowest and highest, that it was trained for; None: none."""
        return self._recorded("recipe", "guidance")

    @property
    def trained_expert(self) -> tuple[str, float | None] | None:
        """Which of two transformers it was trained for, "high" or "low", and their boundary."""
        record: Any = self.training_record
        found = record.get("expert") if isinstance(record, Mapping) else None
        if not isinstance(found, Mapping) or found.get("name") not in EXPERTS:
            return None
        boundary = found.get("boundary_ratio")
        return str(found["name"]), boundary if isinstance(boundary, float) else None

    def _recorded(self, *keys: str) -> tuple[float, float] | None:
        """Two numbers of the training's record, where it holds them there."""
        found: Any = self.training_record  # of any form: it is said to be plain data, no more
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, (list, tuple)) or list(map(type, found)) != [float, float]:
            return None
        return found[0], found[1]

    def warn_if_far(self, schedule: Schedule) -> None:
        """Log a warning if a schedule's mean lies far from what the adapter was trained for.

        All tokens of a frozen backbone are no reason: that is the model itself.
        """
        mean, (low, high) = schedule.mean_keep_ratio, self.trained_for
        is_bare = self.config.backbone == "frozen" and mean == 1.0
        if low - FAR_BELOW <= mean <= high + FAR_ABOVE or is_bare:
            return
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        logger.warning(
            "shiva_dit: the adapter was trained for a mean keep ratio of %s and is asked for %.3g: "
            "%s Train one for that ratio, and join them (shiva-dit join).",
            trained,
            mean,
            "pictures soon get much worse below what was trained for."
            if mean < low
            else "so much more than what was trained for costs time and gains little or nothing.",
        )

    def check_fits(self, model: nn.Module) -> None:
        """Raise unless this adapter was made for models of this class, depth and width.

        Raises:
            ValueError: Names what is wrong and what would be right.
        """
        spec = model_spec(model)
        widths, config = model_widths(model), self.config
        if spec.model_class != config.base_model_class:
            raise ValueError(
                f"the adapter is for {config.base_model_class}, the model is a {spec.model_class}."
            )
        for name in ("num_blocks", "width", "time_dim", "context_dim"):
            expected, found = getattr(config, name), getattr(widths, name)
            if expected != found:
                raise ValueError(
                    f"the adapter is for {name} = {expected}"
                    + (f" ({config.base_model})" if config.base_model else "")
                    + f", the model has {name} = {found}: it was trained on another backbone."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The parts beside an adapter's own (`AdapterModule.parts`)."""

    grouping: Grouping
    others: Mapping[str, AdapterModule]
    """By name, in order; none of them has parts."""

    def __post_init__(self) -> None:
        self.grouping.check_names(self.others)
        for name, part in self.others.items():
            if part.parts is not None:
                raise ValueError(f"{name} has parts itself: pass each of them alone.")


def named_parts(adapter: AdapterModule) -> Iterator[tuple[str | None, AdapterModule]]:
    """All parts of an adapter and their names in its folder: itself first, without one."""
    yield None, adapter
    if adapter.parts is not None:
        yield from adapter.parts.others.items()
