"""Noisy samples and what is to be predicted: flow matching, or a diffusion schedule (DDPM)."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import UniPCMultistepScheduler
from jaxtyping import Float
from torch import Tensor

from shiva_dit.models.spec import ModelSpec
from shiva_dit.training.objective import interpolate


@runtime_checkable
class NoisePath(Protocol):
    """From clean samples to noise, as a model learned it."""

    def timestep(self, t: Float[Tensor, " B"]) -> Tensor:
        """What the model calls times t in [0, 1], 1 for pure noise."""
        ...

    def noisy(
        self, clean: Float[Tensor, "B ..."], noise: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """The samples at their times."""
        ...

    def target(
        self, clean: Float[Tensor, "B ..."], noise: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """What the model should predict there."""
        ...

    def prediction(self, output: tuple[Any, ...], num_tokens: int) -> Float[Tensor, "B ..."]:
        """What it did predict of N tokens, in the target's sign, of what its forward returned."""
        ...

    def solver(self, steps: int) -> tuple[Any, Float[Tensor, " n"]]:
        """UniPC, set to so many steps, and their times, with 0 at the end."""
        ...


class FlowMatching:
    """The straight path; models predict its velocity.

    Args:
        spec: Of the model, whose own time may run back.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def timestep(self, t: Float[Tensor, " B"]) -> Tensor:
        """The model's own units."""
        return self.spec.timestep_at(t)

    def noisy(
        self, clean: Float[Tensor, "B ..."], noise: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """`(1 - t) x0 + t e`."""
        return interpolate(clean, noise, t)

    def target(
        self, clean: Float[Tensor, "B ..."], noise: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """The velocity `e - x0`."""
        del t
        return noise - clean

    def prediction(self, output: tuple[Any, ...], num_tokens: int) -> Float[Tensor, "B ..."]:
        """Turned round where the model's own time runs from noise to data: so does its velocity."""
        found = output[0]
        if isinstance(found, list):  # one sample each
            found = torch.stack(found)
        if self.spec.returns_text:
            found = found[:, -num_tokens:]
        if self.spec.references is not None:  # they come behind, and nobody asks what becomes
            found = found[:, :num_tokens]
        return found if self.spec.noise_timestep > self.spec.clean_timestep else -found

    def solver(self, steps: int) -> tuple[Any, Float[Tensor, " n"]]:
        """Evenly spread over time."""
        solver: Any = UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
        )
        solver.set_timesteps(steps)
        return solver, solver.sigmas.float()


class Diffusion:
    """The path of a diffusion schedule, `sqrt(a_t) x0 + sqrt(1 - a_t) e`.

    Args:
        scheduler: A scheduler of diffusers with `alphas_cumprod`; its `prediction_type` says what
            the model predicts.

    Raises:
        ValueError: If that is none of "epsilon", "v_prediction" and "sample".
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.alphas: Float[Tensor, " T"] = scheduler.alphas_cumprod
        self.predicts: str = scheduler.config.prediction_type
        if self.predicts not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                "the scheduler's prediction_type must be epsilon, v_prediction or sample, got "
                f"{self.predicts!r}."
            )

    def timestep(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The step of the schedule, a whole number from 0 to T - 1."""
        return (t * len(self.alphas)).floor().clamp(max=len(self.alphas) - 1)

    def noisy(
        self, clean: Float[Tensor, "B ..."], noise: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """At the schedule's step."""
        signal, spread = self._shares(clean, t)
        return signal * clean + spread * noise

    def target(
        self, clean: Float[Tensor, "B ..."], noise: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """The noise, `sqrt(a_t) e - sqrt(1 - a_t) x0`, or the clean samples."""
        if self.predicts == "epsilon":
            return noise
        if self.predicts == "sample":
            return clean
        signal, spread = self._shares(clean, t)
        return signal * noise - spread * clean

    def prediction(self, output: tuple[Any, ...], num_tokens: int) -> Float[Tensor, "B ..."]:
        """With the variance's channels, where the model learned those as well."""
        del num_tokens
        return output[0]

    def solver(self, steps: int) -> tuple[Any, Float[Tensor, " n"]]:
        """By the scheduler's own schedule."""
        solver: Any = UniPCMultistepScheduler.from_config(self.scheduler.config)
        solver.set_timesteps(steps)
        times = (solver.timesteps.float() + 0.5) / len(self.alphas)
        return solver, torch.cat([times, times.new_zeros(1)])

    def _shares(
        self, clean: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
    ) -> tuple[Tensor, Tensor]:
        alphas = self.alphas.to(clean)[self.timestep(t).long()]
        alphas = alphas.view(-1, *[1] * (clean.ndim - 1))
        return alphas.sqrt(), (1.0 - alphas).sqrt()


class Cosine(Diffusion):
    """The path of Stable Audio, `cos(pi t / 2) x0 + sin(pi t / 2) e`, at any time.

    It predicts `cos(pi t / 2) e - sin(pi t / 2) x0`, as `CosineDPMSolverMultistepScheduler` has it.
    """

    STEPS = 1000

    def __init__(self) -> None:
        edges = torch.linspace(0.0, 1.0, self.STEPS + 1, dtype=torch.float64)
        alphas = (0.5 * math.pi * edges).cos().square()
        betas = (1.0 - alphas[1:] / alphas[:-1]).clamp(max=0.999)
        super().__init__(
            UniPCMultistepScheduler(
                num_train_timesteps=self.STEPS,
                trained_betas=betas.tolist(),
                prediction_type="v_prediction",
            )
        )

    def timestep(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The times themselves."""
        return t

    def _shares(
        self, clean: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
    ) -> tuple[Tensor, Tensor]:
        angle = (0.5 * math.pi * t.to(clean)).view(-1, *[1] * (clean.ndim - 1))
        return angle.cos(), angle.sin()


def path_of(spec: ModelSpec, scheduler: Any = None) -> NoisePath:
    """The path of a model: its scheduler's, or flow matching.

    Args:
        spec: Of the model.
        scheduler: Its pipeline's; not needed for flow matching.

    Raises:
        ValueError: If the model learned a diffusion schedule and none is given.
    """
    if spec.learned_by == "cosine schedule":
        return Cosine()
    # Solvers of both kinds (UniPC, DPM++) hold a diffusion schedule that flow matching ignores.
    flows = scheduler is not None and scheduler.config.get("use_flow_sigmas")
    if hasattr(scheduler, "alphas_cumprod") and not flows:
        return Diffusion(scheduler)
    if scheduler is None and spec.learned_by == "diffusion schedule":
        raise ValueError(
            f"{spec.model_class} learned to remove noise on a diffusion schedule, which is its "
            "scheduler's: pass scheduler=pipe.scheduler."
        )
    return FlowMatching(spec)
