"""What the parts of a training step are trained on."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from shiva_dit.methods.blocks import BlockReducer
from shiva_dit.methods.fixed_map import FixedMapSelector
from shiva_dit.models.sharded import is_sharded
from shiva_dit.provenance import data_digest
from shiva_dit.training.data import Batch, Feed, TrainingData, drop_captions
from shiva_dit.training.guided import guided
from shiva_dit.training.processes import ALONE, Processes
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.student import Student
from shiva_dit.training.trajectories import Trajectories

TRAJECTORIES = "trajectories"
"""Folder in that of a run."""


class Samples:
    """Samples of the data, and of the unpruned model's own trajectories where the recipe says so.

    Args:
        config: The recipe.
        data: Training samples.
        student: Whose teacher draws the trajectories.
        generator: Source of augmentation, dropped captions and the choice of trajectories.
        origin: Digests of model and data.
        processes: Who draws trajectories, each a share of them.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        student: Student,
        generator: torch.Generator,
        origin: dict[str, object],
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.data, self.student = config, data, student
        self.generator, self.processes = generator, processes
        mine = set(processes.mine(config.micro_batches))
        self.indices = Feed(data, config.seed, lambda take: take % config.micro_batches in mine)
        several = getattr(data, "groups", lambda: None)() is not None
        if several and isinstance(student.reducer, (FixedMapSelector, BlockReducer)):
            raise ValueError(
                f'method = "{config.method}" is for one grid of tokens, and the data has several '
                "shapes: encode without --buckets."
            )
        self.trajectories: Trajectories | None = None
        if config.trajectories.count:
            if several:
                raise ValueError(
                    "trajectories are drawn at one size, and the data has several shapes: set "
                    "trajectories.count = 0, or encode without --buckets."
                )
            self.trajectories = Trajectories(
                config.trajectories,
                data,
                student.path,
                config.guidance,
                at_once=config.batch_size // config.micro_batches,
                seed=config.seed,
                folder=config.out / TRAJECTORIES,
                origin=data_digest({name: origin[name] for name in ("backbone", "data")}),
            )

    def next(self, count: int) -> Int[Tensor, " B"]:
        """Which samples of the data are next."""
        return self.indices.take(count)

    def take(self, indices: Int[Tensor, " B"]) -> Batch:
        """A part's samples, on the student's device: these, or as many trajectories."""
        share = self.config.trajectories.share
        if self.trajectories is not None and torch.rand((), generator=self.generator) < share:
            self.draw()
            return self.trajectories.batch(len(indices), self.generator).to(self.student.device)
        batch = self.data.batch(indices, self.generator)
        batch = batch.to(self.student.device)  # what follows would keep a processor busy
        if self.student.calls.both_ways:
            return batch
        empty = self.data.unconditional()
        return drop_captions(batch, empty, self.config.caption_dropout, self.generator)

    def draw(self) -> None:
        """Draw the trajectories now, which can be stopped at any time: what is drawn is kept."""
        if self.trajectories is not None:
            alike = is_sharded(self.student.teacher)
            self.trajectories.draw(self._unpruned, self.student.device, self.processes, alike=alike)

    def _unpruned(self, batch: Batch, x: Tensor, t: Tensor, scales: Tensor | None) -> Tensor:
        """The unpruned model's prediction, guided as in sampling (`Predict`)."""
        student, empty = self.student, self.data.unconditional()
        with torch.no_grad(), student.as_teacher(), student.autocast():
            arguments = student.calls.guided(x, t, batch, scales, empty)
            out = student.teacher(**arguments)
        found = student.path.prediction(out, student.spec.tokens(student.model, x))
        return guided(found, scales) if scales is not None and student.calls.both_ways else found
