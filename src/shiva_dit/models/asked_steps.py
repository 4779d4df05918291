"""What pipelines ask their schedulers for: noise levels, times, and shifts by resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler


def own_steps(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """The scheduler's own list."""
    del scheduler, num_steps
    return {}


def even_sigmas(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """Noise levels 1, 1 - 1/n, ..., 1/n, before they are shifted."""
    del scheduler
    return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps).tolist()}


def _sigmas_of_training(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """Bria: even noise levels where they are shifted by resolution; else some of training's."""
    if scheduler.config.get("use_dynamic_shifting"):
        return even_sigmas(scheduler, num_steps)
    if isinstance(scheduler, (DDIMScheduler, EulerAncestralDiscreteScheduler)):
        return {}
    total = scheduler.config.num_train_timesteps
    places = np.linspace(0, total - 1, num_steps).astype(np.int64)
    return {"sigmas": ((total - places) / total).astype(np.float32)}


def _whole_timesteps(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """CogView 4: the model is told other times than the noise is scaled by."""
    del scheduler
    steps = np.linspace(1000, 1.0, num_steps).astype(np.int64).tolist()
    return {"timesteps": steps, "sigmas": [step / 1000 for step in steps]}


def _whole_timesteps_before_last(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """GLM-Image: the same of a line that has one step more."""
    total = scheduler.config.num_train_timesteps
    steps = np.linspace(total, 1.0, num_steps + 1)[:-1].astype(np.int64).astype(np.float32)
    return {"timesteps": steps.tolist(), "sigmas": (steps / total).tolist()}


def _shifted_by_three(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """ACE-Step, whose pipeline moves even noise levels by `shift=3` where it isn't told another."""
    del scheduler
    even = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
    return {"sigmas": (3.0 * even / (1.0 + 2.0 * even)).tolist()}


def _by_signal_to_noise(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """Stable Audio 3: even in the logarithm of signal to noise, between its pipeline's bounds."""
    from diffusers.pipelines.stable_audio_3.pipeline_stable_audio_3 import (  # noqa: PLC0415
        logsnr_sigma_schedule,
    )

    del scheduler
    return {"sigmas": logsnr_sigma_schedule(num_steps, -6.2, 2.0)}


def _rising(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """Cosmos Predict 2: of these its scheduler's own schedule takes the ends alone."""
    del scheduler
    return {"sigmas": np.linspace(0.0, 1.0, num_steps).tolist()}


def _by_pixels(scheduler: Any, num_steps: int, num_tokens: int) -> dict[str, Any]:
    """Ideogram 4: quantiles of a logit-normal law, moved by resolution at 16x16 pixels a token."""
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import (  # noqa: PLC0415
        _logit_normal_sigmas,
        _resolution_aware_mu,
    )

    del scheduler
    mu = _resolution_aware_mu(height=16 * num_tokens, width=16, base_mu=0.0)
    return {"sigmas": _logit_normal_sigmas(num_steps, mu, std=1.5).tolist()}


def _linear_quadratic(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """Mochi: half of the steps in the first fortieth of the way."""
    from diffusers.pipelines.mochi.pipeline_mochi import (  # noqa: PLC0415
        linear_quadratic_schedule,
    )

    del scheduler
    if num_steps < 2:
        raise ValueError("the pipelines of Mochi take at least 2 steps.")
    return {"sigmas": linear_quadratic_schedule(num_steps, 0.025)}


def _linear_quadratic_timesteps(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """LTX with conditions: the same, as the model's times, which no shift moves."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import (  # noqa: PLC0415
        linear_quadratic_schedule,
    )

    del scheduler
    return {"timesteps": (linear_quadratic_schedule(num_steps) * 1000).tolist()}


def shift_by_tokens(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """`mu` of most pipelines: a line over the number of tokens."""
    del num_steps
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (num_tokens - low) * (top - base) / (high - low)


def _shift_by_channels(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """Lumina 2: its pipeline takes the 16 channels of its latents for their tokens."""
    del num_tokens
    return shift_by_tokens(config, 16, num_steps)


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
    return shift_by_tokens(config, num_tokens, num_steps)


def _shift_of_one(config: Mapping[str, Any], num_tokens: int, num_steps: int) -> float:
    """EasyAnimate."""
    del config, num_tokens, num_steps
    return 1.0


STEPS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "BriaTransformer2DModel": _sigmas_of_training,
    "CogView4Transformer2DModel": _whole_timesteps,
    "AceStepTransformer1DModel": _shifted_by_three,
    "Cosmos2TextToImagePipeline": _rising,
    "Cosmos2VideoToWorldPipeline": _rising,
    "GlmImageTransformer2DModel": _whole_timesteps_before_last,
    "StableAudio3DiTModel": _by_signal_to_noise,
    "LTXConditionPipeline": _linear_quadratic_timesteps,
    "MochiTransformer3DModel": _linear_quadratic,
    **dict.fromkeys(
        (
            "BriaFiboTransformer2DModel",
            "ChromaTransformer2DModel",
            "ErnieImageTransformer2DModel",
            "Flux2Transformer2DModel",
            "FluxTransformer2DModel",
            "HunyuanImageTransformer2DModel",
            "HunyuanVideo15Transformer3DModel",
            "HunyuanVideoTransformer3DModel",
            "Krea2Transformer2DModel",
            "LTX2VideoTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "LongCatAudioDiTTransformer",
            "LongCatImageTransformer2DModel",
            "Lumina2Transformer2DModel",
            "MotifVideoTransformer3DModel",
            "OvisImageTransformer2DModel",
            "QwenImage21Transformer2DModel",
            "QwenImageTransformer2DModel",
            "ZImageTransformer2DModel",
        ),
        even_sigmas,
    ),
}
"""Arguments of `set_timesteps` that pipelines pass, of the scheduler and the number of steps: by
the transformer's class, and by the pipeline's own where it differs from its model's others."""

STEPS_BY_TOKENS: dict[str, Callable[[Any, int, int], dict[str, Any]]] = {
    "Ideogram4Transformer2DModel": _by_pixels
}
"""The same of the scheduler, the number of steps and N."""

TOLD_BY_SIGMAS = ("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline")
"""Pipelines that tell the model `sigma / (1 + sigma)` of the scheduler's noise levels."""

SHIFTS: dict[str, Callable[[Mapping[str, Any], int, int], float]] = {
    "CogView4Transformer2DModel": _shift_by_side,
    "GlmImageTransformer2DModel": _shift_by_side,
    "EasyAnimateTransformer3DModel": _shift_of_one,
    "Flux2Transformer2DModel": _shift_by_steps,
    "Krea2Transformer2DModel": _shift_unless_distilled,
    "Lumina2Transformer2DModel": _shift_by_channels,
}
"""`mu` for schedulers that shift by resolution: of their config, N and the number of steps."""
