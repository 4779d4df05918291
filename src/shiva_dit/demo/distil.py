"""Distilling a demo backbone, guidance included, into one that is sampled in a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiva_dit.config import whole_number
from shiva_dit.demo.base import load_backbone, load_judge
from shiva_dit.demo.learner import Learner, Learning
from shiva_dit.demo.made import Made
from shiva_dit.demo.task import DemoTask
from shiva_dit.models.families import model_spec
from shiva_dit.models.guidance import Pass
from shiva_dit.provenance import data_digest
from shiva_dit.training.calls import Calls
from shiva_dit.training.data import Batch
from shiva_dit.training.guided import guided
from shiva_dit.training.objective import squared_error
from shiva_dit.training.origin import origin
from shiva_dit.training.paths import FlowMatching
from shiva_dit.training.settings import TrajectoryConfig
from shiva_dit.training.trajectories import Trajectories

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
    paths = trajectories_of(teacher, task, config, began, checkpoints)
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


def trajectories_of(
    teacher: Any, task: DemoTask, config: Distillation, origin: dict[str, Any], folder: Path
) -> Trajectories:
    """The teacher's guided samplings, with `substeps` steps in each of the student's."""
    path = FlowMatching(model_spec(teacher))
    calls = Calls(spec=path.spec, path=path, dtype=teacher.dtype, passes=Pass.BOTH)

    def predict(batch: Batch, x: Tensor, t: Tensor, scales: Tensor | None) -> Tensor:
        assert scales is not None
        out = teacher(**calls.guided(x, t, batch, scales, task.unconditional()))
        return guided(path.prediction(out, path.spec.tokens(teacher, x)), scales)

    found = Trajectories(
        TrajectoryConfig(count=config.trajectories, steps=config.num_steps * config.substeps),
        task,
        path,
        (config.guidance, config.guidance),
        at_once=AT_ONCE,
        seed=config.seed,
        folder=folder,
        origin=data_digest(origin),
    )
    found.draw(predict, next(teacher.parameters()).device)
    return found


def _loss(
    config: Distillation, learner: Learner, paths: Trajectories, place: torch.device, step: int
) -> Tensor:
    """Squared error of the student's velocities on a batch of `batch_size` of its calls."""
    n, width = config.num_steps, 1.0 / config.num_steps
    student, times = learner.model, config.times
    own = step >= (1.0 - config.own_share) * config.steps
    count = config.batch_size // n if own else config.batch_size
    batch = paths.take(learner.indices.take(count)).to(place)
    assert batch.route is not None
    states = batch.route.states[:, :: config.substeps]

    def velocity(x: Tensor, t: Sequence[float]) -> Tensor:
        timestep = 1000.0 * torch.tensor(t, device=place)
        return student(x, timestep=timestep, return_dict=False, **batch.conditioning)[0]

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
