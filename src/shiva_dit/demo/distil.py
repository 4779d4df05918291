"""Distilling a demo backbone, guidance included, into one that is sampled in a few steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from shiva_dit.config import whole_number
from shiva_dit.demo.base import load_backbone, load_judge
from shiva_dit.demo.learner import Learner, Learning
from shiva_dit.demo.made import Made
from shiva_dit.demo.task import DemoTask
from shiva_dit.provenance import data_digest, load_tensors, write_atomically
from shiva_dit.training.data import Batch, ShuffledIndices
from shiva_dit.training.guided import both_ways, guided
from shiva_dit.training.objective import squared_error
from shiva_dit.training.origin import origin

AT_ONCE = 32
"""Trajectories that are drawn together, and kept in a file."""
LONGEST = 64
"""Steps of a student, and of its teacher in each of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation(Learning):
    """How a few-step backbone is made of another one (`recipes/*steps-base.toml`).

    The student's velocity at t = 1, 1 - 1/n, ..., 1/n is fitted to what leads to the teacher's
    sample at the next of these times, first from the teacher's own sample, then from the student's:
    what an earlier step left is then made good by the next.
    """

    num_steps: int = 4
    """n, Euler steps that the student is sampled in, without guidance."""
    guidance: float = 4.0
    """Guidance scale of the teacher, at least 1: it becomes part of the student."""
    trajectories: int = 384
    """Samplings of the teacher to learn from, of captions of the training set."""
    substeps: int = 3
    """Steps of UniPC that the teacher takes in each of the student's."""
    own_share: float = 0.5
    """Share of the steps, at the end, that follow the student's own trajectory, in [0, 1]."""

    def __post_init__(self) -> None:
        Learning.__post_init__(self)
        for name in ("num_steps", "substeps"):
            whole_number(name, getattr(self, name), least=1, most=LONGEST)
        whole_number("trajectories", self.trajectories, least=1)
        if not 1.0 <= self.guidance <= 100.0:
            raise ValueError(f"guidance must lie in [1, 100], got {self.guidance}.")
        if not 0.0 <= self.own_share <= 1.0:
            raise ValueError(f"own_share must lie in [0, 1], got {self.own_share}.")
        if self.batch_size % self.num_steps:
            raise ValueError(
                f"batch_size must be a multiple of num_steps, got {self.batch_size} and "
                f"{self.num_steps}."
            )

    @property
    def times(self) -> list[float]:
        """When the student is asked, and 0."""
        return [1.0 - step / self.num_steps for step in range(self.num_steps + 1)]


def distilled(
    task: DemoTask, config: Distillation, base: Path, device: str, checkpoints: Path
) -> Made:
    """The student, from the beginning or the last checkpoint, and the judge of its base.

    Args:
        task: Gives captions and architecture.
        config: The recipe.
        base: Folder of the teacher and the judge.
        device: Where it is trained.
        checkpoints: Folder of the checkpoints and the teacher's trajectories.

    Raises:
        ValueError: If base or checkpoint are missing or damaged.
        TrainingInterrupted: After Ctrl-C or SIGTERM, when all was saved.
        FloatingPointError: If the loss is not finite.
    """
    place = torch.device(device)
    teacher: Any = load_backbone(task, base)
    student: Any = load_backbone(task, base)
    teacher.requires_grad_(False).to(place)
    student.to(place)
    began = origin(teacher, task)
    learner = Learner(student, config, config.trajectories, checkpoints=checkpoints, origin=began)
    learner.resume()
    paths = Paths(task, config, data_digest(began), checkpoints)
    paths.draw(teacher)
    learner.run(partial(_loss, config, learner, paths, place), f"{task.name} in few steps")
    record = {
        "what": f"{task.name}-{config.num_steps}-steps-base",
        "config": config,
        "device": device,
        "base": began["backbone"],
        "paths_cpu_s": paths.cpu_s,
        "backbone_cpu_s": learner.cpu_s,
        "final_loss": learner.loss,
        "num_parameters": sum(p.numel() for p in student.parameters()),
    }
    return Made(record, learner.trained, load_judge(task, base))


class Paths:
    """The teacher's samplings from noise to pictures, at the times of the student's steps.

    Args:
        task: Gives captions.
        config: The recipe.
        origin: Digest of teacher and captions.
        folder: Where they are kept, so that a resumed run needn't draw them again.
    """

    def __init__(self, task: DemoTask, config: Distillation, origin: str, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        drawn_by = (config.seed, config.num_steps, config.substeps, config.guidance)
        self.digest = data_digest([origin, *drawn_by])[:16]
        self.indices = ShuffledIndices(len(task), config.seed).take(config.trajectories)
        self.cpu_s = 0.0
        """Seconds that drawing them took."""
        self._states: list[Float[Tensor, "P n C H W"]] = []

    def draw(self, teacher: Any) -> None:
        """Draw all of them, or read those that are there."""
        parts = self.indices.split(AT_ONCE)
        for number, part in enumerate(tqdm(parts, desc="trajectories", unit=f"{AT_ONCE}")):
            file = self.folder / f"paths-{self.digest}-{number:04d}.safetensors"
            if not file.is_file():
                generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + number)
                began = time.process_time()
                states = self._sampled(teacher, part, generator)
                took = torch.tensor(time.process_time() - began)
                write_atomically(file, partial(save_file, {"states": states, "cpu_s": took}))
            found = load_tensors(file)
            self._states.append(found["states"])
            self.cpu_s += float(found["cpu_s"])

    def take(self, chosen: Tensor) -> tuple[Float[Tensor, "B n C H W"], dict[str, Tensor]]:
        """Some of them, and their conditioning."""
        picked = [self._states[i // AT_ONCE][i % AT_ONCE] for i in chosen.tolist()]
        return torch.stack(picked), self._captioned(self.indices[chosen]).conditioning

    def _captioned(self, indices: Tensor) -> Batch:
        return self.task.batch(indices, torch.Generator())

    @torch.no_grad()
    def _sampled(
        self, teacher: Any, indices: Tensor, generator: torch.Generator
    ) -> Float[Tensor, "P n C H W"]:
        """Guided by UniPC, as `experiments.scoring` samples."""
        config, batch = self.config, self._captioned(indices)
        device = next(teacher.parameters()).device
        both = both_ways(batch, self.task.unconditional()).to(device).conditioning
        scales = torch.full((len(indices),), config.guidance)
        solver = UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
        )
        solver.set_timesteps(config.num_steps * config.substeps)
        x = torch.randn(batch.latents.shape, generator=generator).to(device)
        states = [x]
        for step, timestep in enumerate(solver.timesteps, start=1):
            times = timestep.to(device, x.dtype).expand(2 * len(x))
            out = teacher(torch.cat([x, x]), timestep=times, return_dict=False, **both)[0]
            x = solver.step(guided(out, scales), timestep, x, return_dict=False)[0]
            if step % config.substeps == 0:
                states.append(x)
        return torch.stack(states, 1).cpu()


def _loss(
    config: Distillation, learner: Learner, paths: Paths, place: torch.device, step: int
) -> Tensor:
    """Squared error of the student's velocities on a batch of `batch_size` of its calls."""
    n, width = config.num_steps, 1.0 / config.num_steps
    student, times = learner.model, config.times
    own = step >= (1.0 - config.own_share) * config.steps
    count = config.batch_size // n if own else config.batch_size
    states, conditioning = paths.take(learner.indices.take(count))
    states = states.to(place)
    conditioning = {name: value.to(place) for name, value in conditioning.items()}

    def velocity(x: Tensor, t: Sequence[float]) -> Tensor:
        timestep = 1000.0 * torch.tensor(t, device=place)
        return student(x, timestep=timestep, return_dict=False, **conditioning)[0]

    if not own:  # all times alike, each with other trajectories
        at = torch.randperm(count, generator=learner.generator) % n
        rows = torch.arange(count)
        x, following = states[rows, at], states[rows, at + 1]
        found = velocity(x, [times[i] for i in at.tolist()])
        return squared_error(found, (x - following) / width)
    x, losses = states[:, 0], []
    for i, t in enumerate(times[:-1]):
        found = velocity(x, [t] * count)
        losses.append(squared_error(found, (x - states[:, i + 1]) / width))
        x = (x - width * found).detach()
    return torch.stack(losses).mean()
