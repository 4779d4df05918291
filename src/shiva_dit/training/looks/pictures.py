"""A look's pictures: made by all processes, drawn by the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiva_dit.core.schedule import Schedule
from shiva_dit.models.sampling import Sampler
from shiva_dit.training.looks.drawn import Row, draw_look, latent_pictures, strip
from shiva_dit.training.looks.material import Material
from shiva_dit.training.looks.measure import EVEN_STEPS, Measure, Pictures
from shiva_dit.training.recipe import TrainConfig

FOLDER = "watch"
"""Within a run's folder."""


class Drawing:
    """What the unpruned model and the student make of prompts.

    Args:
        config: The recipe.
        material: What is looked at.
        measure: Samples.
        sampler: How the pipeline takes its steps.
        say: Tells people what there is no picture of.

    Raises:
        ValueError: If the sampler can't take so many steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        material: Material,
        measure: Measure,
        sampler: Sampler,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.watch = config, config.watch
        self.material, self.measure, self._say = material, measure, say
        between = config.guidance or (1.0, 1.0)
        self.guidance = self.watch.guidance or sum(between) / 2
        self.num_steps = self.watch.steps or config.num_steps or EVEN_STEPS
        self._dense: list[Pictures] = []
        self._dense_pixels: list[Tensor] = []
        self.shows = bool(self.watch.every) and self._showable(sampler)
        """Whether there are pictures to draw."""

    def _showable(self, sampler: Sampler) -> bool:
        shown = self.material.shown
        if not shown:
            return False
        if shown[0].batch.pictured(shown[0].batch.latents).ndim not in (4, 5):
            self._say("pictures are drawn of images, (B, C, H, W), and videos: looks have none.")
            return False
        if sampler.bounds != (0.0, math.inf):
            self._say("the transformer makes a part of the steps alone: looks have no pictures.")
            return False
        for one in shown:
            list(self.measure.steps(one.batch, self.num_steps))
        if self.material.decode is None:
            self._say("there is no VAE: looks show the first three channels of latents.")
        return True

    def sample(self, schedule: Schedule) -> list[Pictures]:
        """What the student makes of the prompts, and at the first look the unpruned model."""
        sampled = partial(self.measure.pictures, steps=self.num_steps, guidance=self.guidance)
        found: list[Pictures] = []
        start = 0
        for place, one in enumerate(self.material.shown if self.shows else ()):
            if place == len(self._dense):
                self._dense.append(sampled(None, one, start=start))
            found.append(sampled(schedule, one, start=start))
            start += len(one.titles)
        return found

    def draw(self, sampled: Sequence[Pictures], told: Mapping[str, Any]) -> None:
        """Write a look's picture.

        Args:
            sampled: What `sample` gave.
            told: The log's line.
        """
        rows: list[Row] = []
        for place, ours in enumerate(sampled):
            dense = self._dense[place]
            if place == len(self._dense_pixels):
                self._dense_pixels.append(self._pixels(dense, dense))
            before, after = self._dense_pixels[place], self._pixels(ours, dense)
            for row, title in enumerate(self.material.shown[place].titles):
                kept = None if ours.kept is None else ours.kept[row]
                rows.append(Row(title=title, dense=before[row], pruned=after[row], kept=kept))
        if not rows:
            return
        error = told.get("held_out_guided", told.get("held_out"))
        title = f"step {told['step']} ({told['stage']}), target {self.config.keep_ratio:.0%} kept"
        title += "" if error is None else f", held-out error {error:.4g}"
        title += "" if self.config.guidance is None else f", guidance {self.guidance:g}"
        draw_look(self.file(told["step"]), rows, title)

    def file(self, step: int) -> Path:
        """Where the picture of a look lies."""
        return self.config.out / FOLDER / f"step-{step:06d}.png"

    def _pixels(self, pictures: Pictures, dense: Pictures) -> Tensor:
        """Pictures as pixels; latents in the range of the unpruned model's."""
        decode = self.material.decode
        if decode is None:
            axis = self.measure.student.spec.frame_axis
            both = [strip(one.latents, axis) for one in (dense, pictures)]
            return latent_pictures(both)[1]
        return torch.cat([strip(decode(one), 2) for one in pictures.latents.split(1)]).cpu()
