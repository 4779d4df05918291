"""What a recipe makes for a model: an adapter, or what a method runs on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.core.hand_made import hand_made
from shiva_dit.core.keep_table import nearest_bin
from shiva_dit.core.schedule import Schedule
from shiva_dit.core.time_law import UNIFORM, TimeLaw
from shiva_dit.methods.base import Reducer
from shiva_dit.methods.registry import METHODS, Making, Shape
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.families import model_spec
from shiva_dit.models.sampling import Sampler
from shiva_dit.models.spec import ModelSpec
from shiva_dit.modules.router import ShivaRouter
from shiva_dit.training.data import Batch
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import ShapeConfig

logger = logging.getLogger("shiva_dit")
Made = TypeVar("Made", bound=nn.Module)


def placed(module: Made, device: torch.device) -> Made:
    """A module on a device; one that is there isn't touched."""
    held = (*module.parameters(), *module.buffers())
    return module if all(one.device == device for one in held) else module.to(device)


def check_given(config: TrainConfig, model: Any, sample: Batch) -> None:
    """Raise a ValueError for a model or data that the recipe can't be run on.

    Args:
        config: The recipe.
        model: The backbone.
        sample: What it is given.
    """
    if attachment_of(model) is not None:
        raise ValueError(
            "the model has an adapter on: call shiva_dit.remove(model) before training."
        )
    narrow = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    if config.backbone == "full" and narrow:
        raise ValueError(
            f'backbone = "full" trains the model\'s own weights, and some of these are '
            f"{narrow.pop()}, which rounds small steps away: load the model in float32 and "
            'train with precision = "bfloat16", or train a LoRA or DoRA, whose weights are '
            "float32 always."
        )
    has_references = sample.num_references or config.clean_frames
    if config.reference_keep_ratio is not None and not has_references:
        logger.warning(
            "shiva_dit: reference_keep_ratio is set, and the first sample of the data has no "
            'references ("references" of its conditioning): nothing of them is learned from such.'
        )


def recompute(model: Any, sample: Batch) -> None:
    """Switch a model's gradient checkpointing on.

    Args:
        model: The transformer.
        sample: What it is given.

    Raises:
        ValueError: If that would lose an argument.
    """
    lost = model_spec(model).not_recomputed
    if lost in {**sample.conditioning, **sample.shared}:
        raise ValueError(
            f"diffusers loses the {lost} of {type(model).__name__} where it recomputes blocks: set "
            "gradient_checkpointing=false."
        )
    model.enable_gradient_checkpointing()


def made_reducer(
    config: TrainConfig,
    model: Any,
    grid: Callable[[], tuple[int, int]],
    *,
    router: ShivaRouter | None,
    generator: torch.Generator,
) -> Reducer | None:
    """What the recipe's method runs on; None for the dense control.

    Args:
        config: The recipe.
        model: The backbone.
        grid: Height and width of its images in tokens.
        router: Of ours.
        generator: Source of choices of chance, and of first weights.
    """

    def shape() -> Shape:
        made = adapter_config(config, model)
        return Shape(
            width=made.width,
            time_dim=made.time_dim,
            num_heads=model.config.num_attention_heads,
            full_blocks=made.full_blocks,
        )

    making = Making(
        num_blocks=len(model_spec(model).blocks(model)),
        grid=grid,
        keep_ratio=config.keep_ratio,
        router=router,
        generator=generator,
        shape=shape,
        settings=getattr(config, config.method, None),
    )
    return METHODS[config.method].make(making)


def made_adapter(config: TrainConfig, model: Any, law: TimeLaw) -> ShivaAdapter:
    """An untrained adapter for a model, with the schedule that the recipe starts from."""
    made = adapter_config(config, model)
    shape = config.policy.shape
    if shape == ShapeConfig():
        schedule = Schedule.uniform(
            config.keep_ratio,
            num_blocks=made.num_blocks,
            full_blocks=made.full_blocks,
            law=law,
        )
        return ShivaAdapter(made, schedule)
    schedule = hand_made(
        config.keep_ratio,
        depth=shape.depth,
        time=shape.time,
        form=shape.form,
        num_blocks=made.num_blocks,
        num_bins=made.num_bins,
        full_blocks=made.full_blocks,
        law=law,
    )
    return ShivaAdapter(made, schedule)


def adapter_config(config: TrainConfig, model: Any) -> ShivaConfig:
    """What an adapter for a model is, by a recipe."""
    options: dict[str, Any] = {
        "keep_ratio": config.keep_ratio,
        "reference_keep_ratio": config.reference_keep_ratio,
        "hidden": config.router.hidden,
        "normalize_inputs": config.router.normalize_inputs,
        "router_inputs": config.router.inputs,
        "select_every": config.router.select_every,
        "num_bins": config.policy.num_bins,
        "target_range": config.policy.target_range,
        "rejected": config.rejected,
        "rejected_rank": config.rejected_rank,
        "backbone": config.backbone,
        "lora_rank": config.lora_rank,
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    }
    if config.router.num_groups is not None:
        options["num_groups"] = config.router.num_groups
    return ShivaConfig.for_model(model, **options)


def made_law(config: TrainConfig, sampler: Sampler, spec: ModelSpec, num_tokens: int) -> TimeLaw:
    """Whose steps the mean keep ratio is over.

    Raises:
        ValueError: If a recipe for a sampler's few steps comes without one, or two of these steps
            share a time bin.
    """
    if config.num_steps is None:
        return UNIFORM if sampler.scheduler is None else sampler.law(spec, num_tokens)
    if sampler.scheduler is None:
        raise ValueError('time_sampling = "sampler" needs one: pass scheduler=pipe.scheduler.')
    law, bins = sampler.law_of(spec, num_tokens, config.num_steps), config.policy.num_bins
    if len({nearest_bin(t, bins) for t in law.steps}) < len(law.steps):
        raise ValueError(
            f"policy.num_bins = {bins} puts two of the sampler's steps at t = "
            f"{', '.join(f'{t:g}' for t in law.steps)} into one time bin: take more bins."
        )
    return law
