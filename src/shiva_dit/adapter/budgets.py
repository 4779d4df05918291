"""One adapter for a range of keep ratios: weights between those that were trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from shiva_dit.adapter.config import ShivaConfig
from shiva_dit.adapter.module import AdapterModule, Parts
from shiva_dit.adapter.parts import Grouping, budget_name

A = TypeVar("A", bound=AdapterModule)


def check_budgets(adapters: Sequence[AdapterModule]) -> None:
    """Raise unless adapters differ in their keep ratio alone, and in what was learned.

    Raises:
        ValueError: Names what differs, and what to do.
    """
    first, *others = adapters
    if not others:
        raise ValueError("one adapter is no range: pass two or more, each for a keep ratio.")
    ratios = [adapter.config.keep_ratio for adapter in adapters]
    twice = {ratio for ratio in ratios if ratios.count(ratio) > 1}
    if twice:
        raise ValueError(f"two adapters are for keep_ratio {min(twice):g}: pass one for each.")
    for adapter in adapters:
        if adapter.parts is not None:
            raise ValueError(
                f"the adapter for {adapter.config.keep_ratio:g} holds several already: pass its "
                "parts, each alone."
            )
        if adapter.config.target_range is not None:
            raise ValueError(
                f"the adapter for {adapter.config.keep_ratio:g} was trained for a range "
                "(policy.target_range): pass adapters that were trained for one keep ratio each."
            )
    for other in others:
        for name, (ours, theirs) in _differences(first, other).items():
            raise ValueError(
                f"{name} is {ours} in the adapter for {first.config.keep_ratio:g} and {theirs} in "
                f"the one for {other.config.keep_ratio:g}: train both from one adapter (start=)."
            )


def _differences(ours: AdapterModule, theirs: AdapterModule) -> dict[str, tuple[Any, Any]]:
    """What two adapters of a range may not differ in, and do."""
    both: dict[str, tuple[Any, Any]] = {}
    for field in fields(ShivaConfig):
        if field.name != "keep_ratio":
            both[field.name] = getattr(ours.config, field.name), getattr(theirs.config, field.name)
    both["the steps' law"] = ours.schedule.law.name, theirs.schedule.law.name
    both["the backbone"] = _base(ours), _base(theirs)
    shapes = [
        {name: tuple(value.shape) for name, value in a.backbone_weights.items()}
        for a in (ours, theirs)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        both[f"the shape of {name}"] = shapes[0].get(name), shapes[1].get(name)
    both["the trained guidance"] = ours.trained_for_guidance, theirs.trained_for_guidance
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def _base(adapter: AdapterModule) -> Any:
    """SHA-256 of the model that an adapter was trained on, as far as its record says."""
    found: Any = adapter.training_record.get("backbone")
    return found.get("sha256") if isinstance(found, dict) else None


def budgets_of(first: AdapterModule, others: Sequence[AdapterModule]) -> Parts:
    """What makes one adapter of several for keep ratios of their own.

    Args:
        first: What is taken where no keep ratio is asked for.
        others: For other keep ratios.

    Raises:
        ValueError: As `check_budgets`.
    """
    check_budgets((first, *others))
    ordered = sorted(others, key=lambda each: each.config.keep_ratio)
    return Parts(
        grouping=Grouping(kind="budgets", first=budget_name(first.config.keep_ratio)),
        others={budget_name(each.config.keep_ratio): each for each in ordered},
    )


def at(adapters: Sequence[A], keep_ratio: float) -> A:
    r"""The adapter for one mean keep ratio, of several for ratios of their own (ours).

    Between two that were trained, for R_a < R < R_b, every weight lies on the line between theirs:

    .. math:: w(R) = (1 - s)\, w_a + s\, w_b, \qquad s = (R - R_a) / (R_b - R_a)

    Of two LoRAs the updates do, B A, which takes twice their rank.

    Args:
        adapters: As `check_budgets` wants them.
        keep_ratio: R in (0, 1]. Outside of all that were trained, the nearest is taken.

    Raises:
        ValueError: Between two DoRAs, whose updates no DoRA can be between.
    """
    trained = sorted(adapters, key=lambda each: each.config.keep_ratio)
    for low, high in pairwise(trained):
        first, last = low.config.keep_ratio, high.config.keep_ratio
        if keep_ratio <= first:
            return low
        if keep_ratio < last:
            return _between(low, high, (keep_ratio - first) / (last - first), keep_ratio)
    return trained[-1]


def _between(low: A, high: A, share: float, keep_ratio: float) -> A:
    """The adapter between two."""
    if low.config.backbone == "dora":
        said = ", ".join(f"{each.config.keep_ratio:g}" for each in (low, high))
        raise ValueError(
            f"nothing lies between two DoRAs: take a keep_ratio that was trained, such as {said}, "
            'or train with backbone = "lora" or "full".'
        )
    config = replace(low.config, keep_ratio=keep_ratio)
    made = type(low)(config)
    mine, theirs = low.state_dict(), high.state_dict()
    made.load_state_dict({name: torch.lerp(mine[name], theirs[name], share) for name in mine})
    a, b = low.backbone_weights, high.backbone_weights
    if config.backbone == "lora":
        made.config = replace(config, lora_rank=2 * config.lora_rank)
        made.backbone_weights = {name: _stacked(name, a[name], b[name], share) for name in a}
    else:
        made.backbone_weights = {
            name: torch.lerp(a[name].float(), b[name].float(), share).to(a[name].dtype)
            for name in a
        }
    bins, law = config.num_bins, low.schedule.law
    made.schedule = made.policy.schedule(keep_ratio, bins, law)
    made.training_record = low.training_record
    return made.eval()


def _stacked(name: str, low: Tensor, high: Tensor, share: float) -> Tensor:
    """A factor of the LoRA whose update lies between two: [A_a; A_b], [(1 - s) B_a, s B_b]."""
    if ".lora_A." in name:
        return torch.cat([low, high], dim=0)  # (2 r, ...)
    return torch.cat([(1.0 - share) * low, share * high], dim=1)  # (d, 2 r, ...)
