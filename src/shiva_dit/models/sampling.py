"""The steps that a pipeline's scheduler takes: its list of times, and their density."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from diffusers import DiffusionPipeline

from shiva_dit.core.time_law import TimeLaw
from shiva_dit.models.spec import ModelSpec

DENSE = (500, 50, 8, 4)
"""Steps from which a density is read; the next fewer ones where a scheduler has no more (LCM).
Some schedulers take every second or twentieth of 1000 steps: divisors of 1000 reach the first."""
TYPICAL = 50
"""Number of steps that a density is for, where that moves the schedule (Flux.2)."""
SWITCHES = (
    "use_dynamic_shifting",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)
"""Settings of a scheduler that a law's name tells where they are on."""


def listed_times(scheduler: Any, listed: Sequence[float | int]) -> list[float]:
    """A scheduler's timesteps as t, 1 for pure noise; in [0, 1] if they are a model's times.

    Args:
        scheduler: Whose they are.
        listed: Their values.
    """
    shares = [step / scheduler.config.get("num_train_timesteps", 1000) for step in listed]
    inverted = scheduler.config.get("invert_sigmas")
    return [1.0 - share for share in shares] if inverted else shares


def own_times(pipeline: Any, times: Sequence[float]) -> Sequence[float]:
    """The part of a run that the pipeline's first transformer sees.

    Wan 2.2's second one takes over where there is little noise left.
    """
    boundary = getattr(pipeline, "config", {}).get("boundary_ratio")
    if boundary is None or getattr(pipeline, "transformer_2", None) is None:
        return times
    return [t for t in times if t >= boundary]


def scheduler_times(
    scheduler: Any,
    spec: ModelSpec,
    num_tokens: int,
    num_steps: int,
    *,
    shifted_for: int | None = None,
    pipeline_config: Mapping[str, Any] | None = None,
) -> list[float]:
    """The times of all calls of a model when its pipeline takes so many steps.

    Asked of a copy of the scheduler, with the arguments that the model's pipelines give it.

    Args:
        scheduler: A scheduler of diffusers.
        spec: Of the model.
        num_tokens: Image tokens N, which shift the times of some schedulers.
        num_steps: What the pipeline is called with.
        shifted_for: The number of steps to shift the times for; `num_steps` by default.
        pipeline_config: The pipeline's own, where there is one.

    Returns:
        t of each call in [0, 1], in order.

    Raises:
        ValueError: If the scheduler can't take so many steps, or its times leave [0, 1].
    """
    if num_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_steps}.")
    own = copy.deepcopy(scheduler)
    accepted = inspect.signature(own.set_timesteps).parameters
    config = {**(pipeline_config or {}), **own.config}
    options = STEPS.get(spec.model_class, _own_steps)(num_steps)
    if config.get("use_flow_sigmas") or not options.keys() <= accepted.keys():
        options = {}
    if config.get("use_dynamic_shifting") and "mu" in accepted:
        shift = SHIFTS.get(spec.model_class, _shift_by_tokens)
        options["mu"] = shift(config, num_tokens, shifted_for or num_steps)
    if "sigmas" not in options:
        options["num_inference_steps"] = num_steps
    own.set_timesteps(**options)
    listed = own.timesteps.flatten().double().tolist()
    times = listed_times(own, listed)
    if not all(0.0 <= t <= 1.0 + 1e-6 for t in times):
        raise ValueError(
            f"the timesteps of {type(own).__name__} are no times of the model, got {listed[:3]}...:"
            " pass those of all calls to apply(..., timesteps=)."
        )
    return [min(t, 1.0) for t in times]


def pipeline_scheduler(pipeline: str | Path) -> Any:
    """The scheduler of a saved pipeline alone.

    Args:
        pipeline: A folder, or a Hub id.

    Raises:
        ValueError: If it has none that diffusers knows.
    """
    index: Any = DiffusionPipeline.load_config(pipeline)
    library, name = index.get("scheduler") or (None, None)
    kind = getattr(diffusers, str(name), None) if library == "diffusers" else None
    if kind is None:
        raise ValueError(f"{pipeline} has no scheduler of diffusers, its index says {name}.")
    return kind.from_pretrained(pipeline, subfolder="scheduler")


def scheduler_law(scheduler: Any, spec: ModelSpec, num_tokens: int) -> TimeLaw:
    """The density of a scheduler's steps over t.

    Args:
        scheduler: A scheduler of diffusers.
        spec: Of the model.
        num_tokens: Image tokens N, which shift the times of some schedulers.

    Raises:
        ValueError: If the scheduler gives no list of steps.
    """
    problem: ValueError | None = None
    for count in DENSE:
        try:
            times = scheduler_times(scheduler, spec, num_tokens, count, shifted_for=TYPICAL)
        except ValueError as error:  # distilled schedulers have few steps to give
            problem = error
        else:
            return TimeLaw.of_steps(_name(scheduler, num_tokens), times)
    raise ValueError(f"{type(scheduler).__name__} gives no list of steps: {problem}") from problem


def _name(scheduler: Any, num_tokens: int) -> str:
    """Class and what moves its steps."""
    config: Mapping[str, Any] = scheduler.config
    told = [key for key in SWITCHES if config.get(key)]
    if config.get("use_dynamic_shifting"):
        told.append(f"{num_tokens} tokens")
    elif config.get("shift") is not None:
        shift = vars(scheduler).get("_shift", config["shift"])  # `set_shift` leaves the config
        told.append(f"shift = {shift:g}")
    elif config.get("use_flow_sigmas"):
        told.append(f"flow_shift = {config['flow_shift']:g}")
    name = type(scheduler).__name__
    return f"{name} ({', '.join(told)})" if told else name


def _own_steps(num_steps: int) -> dict[str, Any]:
    """The scheduler's own list."""
    del num_steps
    return {}


def _even_sigmas(num_steps: int) -> dict[str, Any]:
    """Noise levels 1, 1 - 1/n, ..., 1/n, before they are shifted."""
    return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps).tolist()}


def _whole_timesteps(num_steps: int) -> dict[str, Any]:
    """CogView 4: the model is told other times than the noise is scaled by."""
    steps = np.linspace(1000, 1.0, num_steps).astype(np.int64).tolist()
    return {"timesteps": steps, "sigmas": [step / 1000 for step in steps]}


def _linear_quadratic(num_steps: int) -> dict[str, Any]:
    """Mochi: half of the steps in the first fortieth of the way."""
    from diffusers.pipelines.mochi.pipeline_mochi import (  # noqa: PLC0415
        linear_quadratic_schedule,
    )

    return {"sigmas": linear_quadratic_schedule(num_steps, 0.025)}


def _shift_by_tokens(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """`mu` of most pipelines: a line over the number of tokens."""
    del num_steps
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (num_tokens - low) * (top - base) / (high - low)


def _shift_by_channels(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """Lumina 2: its pipeline takes the 16 channels of its latents for their tokens."""
    del num_tokens
    return _shift_by_tokens(config, 16, num_steps)


def _shift_by_side(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """CogView 4: a line over the root of the number of tokens."""
    del num_steps
    sides = (num_tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return sides * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)


def _shift_by_steps(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """Flux.2: fitted, by the number of steps as well."""
    del config
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # noqa: PLC0415

    return compute_empirical_mu(num_tokens, num_steps)


def _shift_unless_distilled(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """Krea 2: one shift for its few-step model."""
    if config.get("is_distilled"):
        return 1.15
    return _shift_by_tokens(config, num_tokens, num_steps)


def _shift_of_one(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """EasyAnimate."""
    del config, num_tokens, num_steps
    return 1.0


STEPS: dict[str, Callable[[int], dict[str, Any]]] = {
    "CogView4Transformer2DModel": _whole_timesteps,
    "MochiTransformer3DModel": _linear_quadratic,
    **dict.fromkeys(
        (
            "BriaTransformer2DModel",
            "ChromaTransformer2DModel",
            "Flux2Transformer2DModel",
            "FluxTransformer2DModel",
            "HunyuanImageTransformer2DModel",
            "HunyuanVideoTransformer3DModel",
            "Krea2Transformer2DModel",
            "LTXVideoTransformer3DModel",
            "LongCatImageTransformer2DModel",
            "Lumina2Transformer2DModel",
            "OvisImageTransformer2DModel",
            "QwenImageTransformer2DModel",
            "ZImageTransformer2DModel",
        ),
        _even_sigmas,
    ),
}
"""Arguments of `set_timesteps` that a model's pipelines pass, by the number of steps."""

SHIFTS: dict[str, Callable[[Mapping[str, Any], int, int], float]] = {
    "CogView4Transformer2DModel": _shift_by_side,
    "EasyAnimateTransformer3DModel": _shift_of_one,
    "Flux2Transformer2DModel": _shift_by_steps,
    "Krea2Transformer2DModel": _shift_unless_distilled,
    "Lumina2Transformer2DModel": _shift_by_channels,
}
"""`mu` for schedulers that shift by resolution: of their config, N and the number of steps."""
