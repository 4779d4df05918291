"""How a pipeline takes its steps: its own scheduler, or a solver of the same path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

Sampler = Literal["euler", "unipc", "dpmpp", "euler_diffusers"]
"""How a backbone is sampled. "euler": over t = 1, 1 - 1/n, ..., 1/n. "unipc" and "dpmpp": UniPC and
DPM-Solver++, both of second order, over the same. "euler_diffusers": Euler over diffusers' default
steps, whose last does next to nothing (it starts at t = 0.001: of two steps one is left)."""
FLOW_SOLVERS: Mapping[str, type[Any]] = {
    "unipc": UniPCMultistepScheduler,
    "dpmpp": DPMSolverMultistepScheduler,
}


def solver(scheduler: Any, sampler: Sampler) -> Any:
    """A pipeline's own scheduler, or a solver of the same path.

    Args:
        scheduler: The pipeline's own.
        sampler: What is asked for; "euler_diffusers" is the own one, whatever it is.

    Raises:
        ValueError: If "euler" is asked for and the model learned a diffusion schedule.
    """
    config = scheduler.config
    flows = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if sampler in FLOW_SOLVERS:
        flow: dict[str, Any] = {}
        if flows:
            flow = {
                "use_flow_sigmas": True,
                "prediction_type": "flow_prediction",
                "flow_shift": config.shift,
            }
        return FLOW_SOLVERS[sampler].from_config(config, **flow)
    if sampler == "euler" and not flows:
        raise ValueError(
            f'sampler "euler" is for flow matching, and {type(scheduler).__name__} is '
            'another schedule: take "unipc", "dpmpp", or "euler_diffusers" for its own.'
        )
    return scheduler


def steps_by(sampler: Sampler, steps: int) -> dict[str, Any]:
    """What a pipeline is called with for so many steps."""
    if sampler == "euler":
        return {"sigmas": [1.0 - step / steps for step in range(steps)]}
    return {"num_inference_steps": steps}
