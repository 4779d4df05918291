"""The steps that a pipeline's scheduler takes: its list of times, and their density."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import DiffusionPipeline

from shiva_dit.core.time_law import TimeLaw
from shiva_dit.models.asked_steps import (
    SHIFTS,
    STEPS,
    STEPS_BY_TOKENS,
    TOLD_BY_SIGMAS,
    even_sigmas,
    own_steps,
    shift_by_tokens,
)
from shiva_dit.models.spec import ModelSpec

DENSE = (500, 50, 8, 4)
"""Steps from which a density is read; the next fewer ones where a scheduler has no more (LCM).
Some schedulers take every second or twentieth of 1000 steps: divisors of 1000 reach the first."""
TYPICAL = 50
"""Number of steps that a density is for, where that moves the schedule (Flux.2)."""
WITH_REFERENCES = ("Kontext", "Edit", "Layered", "Flux2", "ZImageOmni")
"""In names of pipelines whose pictures may be tokens beside those of the target."""
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
    total = scheduler.config.get("num_train_timesteps", 1000)
    total = 1 if hasattr(scheduler, "precondition_noise") else total  # the model's own times
    shares = [step / total for step in listed]
    inverted = scheduler.config.get("invert_sigmas")
    return [1.0 - share for share in shares] if inverted else shares


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How a pipeline takes the steps of a transformer: its scheduler, and what it asks that for."""

    scheduler: Any
    """A scheduler of diffusers."""
    pipeline: str = ""
    """The pipeline's class, where it is known: some ask for other steps than others of one model
    do."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The pipeline's own."""
    part: Literal["all", "first", "second"] = "all"
    """Of two transformers the second takes over below the config's `boundary_ratio` (Wan 2.2)."""
    asks_evenly: bool = False
    """Whether the pipeline is called with `sigmas` of 1, 1 - 1/n, ..., 1/n."""

    @classmethod
    def of(cls, pipeline: Any, model: Any) -> Sampler:
        """That of a pipeline, for one of its transformers."""
        first, second = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
        part: Literal["first", "second"] = "second" if model is second else "first"
        return cls(
            scheduler=getattr(pipeline, "scheduler", None),
            pipeline=type(pipeline).__name__,
            config=getattr(pipeline, "config", {}),
            part="all" if first is None or second is None else part,
        )

    @classmethod
    def saved(cls, pipeline: str | Path, *, second: bool = False) -> Sampler:
        """That of a saved pipeline for its (first) transformer, without the rest of it.

        Args:
            pipeline: A folder, or a Hub id.
            second: For its second transformer instead.

        Raises:
            ValueError: If it has no scheduler that diffusers knows, or no second transformer.
        """
        index: Any = DiffusionPipeline.load_config(pipeline)
        library, name = index.get("scheduler") or (None, None)
        kind = getattr(diffusers, str(name), None) if library == "diffusers" else None
        if kind is None:
            raise ValueError(f"{pipeline} has no scheduler of diffusers, its index says {name}.")
        has_two = (index.get("transformer_2") or [None])[0] is not None
        if second and not has_two:
            raise ValueError(f"{pipeline} has no transformer_2.")
        part: Literal["first", "second"] = "second" if second else "first"
        return cls(
            scheduler=kind.from_pretrained(pipeline, subfolder="scheduler"),
            pipeline=str(index.get("_class_name", "")),
            config=index,
            part=part if has_two else "all",
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """Times t that the transformer sees: from the first number on, below the second."""
        boundary = self.config.get("boundary_ratio")
        if boundary is None or self.part == "all":
            return 0.0, math.inf
        return (boundary, math.inf) if self.part == "first" else (0.0, boundary)

    def own(self, times: Sequence[float]) -> Sequence[float]:
        """The times of a run that the transformer sees."""
        low, high = self.bounds
        return [t for t in times if low <= t < high]

    @property
    def is_shifted_by_target(self) -> bool:
        """Whether N may hold tokens of given pictures, and N without these shifts the times."""
        dynamic = self.scheduler.config.get("use_dynamic_shifting", False)
        return dynamic and any(word in self.pipeline for word in WITH_REFERENCES)

    def times(
        self, spec: ModelSpec, num_tokens: int, num_steps: int, *, shifted_for: int | None = None
    ) -> Sequence[float]:
        """The times of all calls of the transformer when the pipeline takes so many steps.

        Asked of a copy of the scheduler, with the arguments that the pipeline gives it.

        Args:
            spec: Of the transformer.
            num_tokens: Image tokens N, which shift the times of some schedulers.
            num_steps: What the pipeline is called with.
            shifted_for: The number of steps to shift the times for; `num_steps` by default.

        Returns:
            t of each call in [0, 1], in order.

        Raises:
            ValueError: If the scheduler can't take so many steps, or its times leave [0, 1].
        """
        if num_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_steps}.")
        own = copy.deepcopy(self.scheduler)
        accepted = inspect.signature(own.set_timesteps).parameters
        config = {**self.config, **own.config}
        asked = STEPS.get(self.pipeline) or STEPS.get(spec.model_class, own_steps)
        asked = even_sigmas if self.asks_evenly else asked
        options: dict[str, Any] = asked(own, num_steps)
        if spec.model_class in STEPS_BY_TOKENS:
            options = STEPS_BY_TOKENS[spec.model_class](own, num_steps, num_tokens)
        if self.config.get("sample_sigmas"):  # of a pipeline that was distilled to its own steps
            options = {"sigmas": list(self.config["sample_sigmas"])}
        if config.get("use_flow_sigmas") or not options.keys() <= accepted.keys():
            options = {}
        if config.get("use_dynamic_shifting") and "mu" in accepted:
            shift = SHIFTS.get(spec.model_class, shift_by_tokens)
            options["mu"] = shift(config, num_tokens, shifted_for or num_steps)
        if not options.keys() & {"sigmas", "timesteps"}:
            options["num_inference_steps"] = num_steps
        own.set_timesteps(**options)
        times = listed_times(own, own.timesteps.flatten().double().tolist())
        if self.pipeline in TOLD_BY_SIGMAS:
            times = [sigma / (1.0 + sigma) for sigma in own.sigmas[: len(times)].tolist()]
        if not all(0.0 <= t <= 1.0 + 1e-6 for t in times):
            listed = ", ".join(f"{step:.4g}" for step in own.timesteps.flatten()[:3].tolist())
            raise ValueError(
                f"the timesteps of {type(own).__name__} are no times of the model, got {listed}, "
                "...: pass those of all calls to apply(..., timesteps=)."
            )
        return self.own([min(t, 1.0) for t in times])

    def law(self, spec: ModelSpec, num_tokens: int) -> TimeLaw:
        """The density of the transformer's steps over t.

        Args:
            spec: Of the transformer.
            num_tokens: Image tokens N, which shift the times of some schedulers.

        Raises:
            ValueError: If the scheduler gives no list of steps.
        """
        problem: ValueError | None = None
        for count in DENSE:
            try:
                times = self.times(spec, num_tokens, count, shifted_for=TYPICAL)
                return TimeLaw.of_steps(self._name(num_tokens), times)
            except ValueError as error:  # distilled schedulers have few steps to give
                problem = error
        kind = type(self.scheduler).__name__
        raise ValueError(f"{kind} gives no list of steps: {problem}") from problem

    def law_of(self, spec: ModelSpec, num_tokens: int, num_steps: int) -> TimeLaw:
        """The law of a run of so few steps that all are told.

        Args:
            spec: Of the transformer.
            num_tokens: Image tokens N, which shift the times of some schedulers.
            num_steps: What the pipeline is called with.

        Raises:
            ValueError: If the scheduler can't take so many steps.
        """
        times = self.times(spec, num_tokens, num_steps)
        steps = tuple(sorted({round(t, 6) for t in times}))
        if not steps:
            raise ValueError(
                f"of {num_steps} steps of {type(self.scheduler).__name__} this transformer gets "
                "none: take more."
            )
        return TimeLaw(name=f"{num_steps} {self._name(num_tokens)}", steps=steps)

    def _name(self, num_tokens: int) -> str:
        """Class and what moves its steps."""
        config: Mapping[str, Any] = self.scheduler.config
        told = [key for key in SWITCHES if config.get(key)]
        if config.get("use_dynamic_shifting"):
            told.append(f"{num_tokens} tokens")
        elif config.get("shift") is not None:
            shift = vars(self.scheduler).get("_shift", config["shift"])  # `set_shift` moves it
            told.append(f"shift = {shift:g}")
        elif config.get("use_flow_sigmas"):
            told.append(f"flow_shift = {config['flow_shift']:g}")
        low, high = self.bounds
        told += [f"t >= {low:g}"] if low > 0.0 else [f"t < {high:g}"] if high < 1.0 else []
        name = type(self.scheduler).__name__
        return f"{name} ({', '.join(told)})" if told else name
