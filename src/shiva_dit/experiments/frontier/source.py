"""Whose pictures a frontier is of: a demo task's backbone, or any pipeline with prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.demo.base import ASSETS, load_backbone, load_judge, usable_device
from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.frontier.config import Frontier, Point
from shiva_dit.experiments.own_pipeline import OwnPipeline, lora_digests, twin, with_lora
from shiva_dit.experiments.scoring import noise_seed, sample_through
from shiva_dit.provenance import data_digest, module_digest


class Source(ABC):
    """Makes pictures of the first prompts, from noise that seed and picture alone decide."""

    task: DemoTask | None = None
    judge: Judge | None = None
    """Of a demo task's pictures; others are held against the unpruned model's alone."""
    identity: str
    """Digest of the model's weights and of the prompts."""
    prompts: Sequence[str] = ()
    """Those of a user's own."""

    @abstractmethod
    def pipe(self, *, own_weights: bool) -> Any:
        """A pipeline with nothing on its transformer.

        Args:
            own_weights: Whether its weights may be changed; else others may share them.
        """

    @abstractmethod
    def run(self, pipe: Any, point: Point, count: int, start: int) -> Float[Tensor, "N C H W"]:
        """Pictures in [-1, 1], on the CPU.

        Args:
            pipe: From `pipe`, with or without something on its transformer.
            point: How they are sampled.
            count: How many.
            start: The first one's prompt.
        """


class TaskSource(Source):
    """A demo task's backbone, in the stock pipeline.

    Args:
        frontier: Names the task.
    """

    def __init__(self, frontier: Frontier) -> None:
        assert frontier.task is not None
        self.task = load_task(frontier.task)
        base = frontier.base or ASSETS
        self.judge = load_judge(self.task, base)
        model: Any = load_backbone(self.task, base)
        prompts = self.task.prompts(0, frontier.count)[0]
        self.identity = data_digest([module_digest(model), prompts, *lora_digests(frontier.lora)])
        self._model = model.to(usable_device(frontier.device))
        self._size, self._lora = frontier.size, frontier.lora

    def pipe(self, *, own_weights: bool) -> Any:
        """The pipeline around a model of its own."""
        assert self.task is not None
        made = self.task.pipeline(twin(self._model, own_weights=own_weights))
        return with_lora(made, self._lora)

    def run(self, pipe: Any, point: Point, count: int, start: int) -> Float[Tensor, "N C H W"]:
        """As `sample_through`."""
        assert self.task is not None
        return sample_through(
            self.task,
            pipe,
            count,
            seed=noise_seed(point.seed) + start,
            start=start,
            num_steps=point.steps,
            sampler=point.arm.sampler,
            guidance=point.guidance,
            size=self._size,
        )


class PipelineSource(Source):
    """A pipeline of a user's, with prompts from a file.

    Args:
        frontier: Names both.

    Raises:
        ValueError: If there are fewer prompts than pictures, or its transformer isn't supported.
    """

    def __init__(self, frontier: Frontier) -> None:
        assert frontier.pipeline is not None
        assert frontier.prompts is not None
        self._own = OwnPipeline(
            frontier.pipeline,
            frontier.prompts,
            frontier.count,
            size=frontier.size,
            lora=frontier.lora,
            device=frontier.device,
        )
        self.identity = self._own.identity
        self.prompts = [prompt.text for prompt in self._own.prompts]

    def pipe(self, *, own_weights: bool) -> Any:
        """The same parts around a transformer of its own."""
        return self._own.around(twin(self._own.transformer, own_weights=own_weights))

    def run(self, pipe: Any, point: Point, count: int, start: int) -> Float[Tensor, "N C H W"]:
        """Decoded pictures."""
        return self._own.pictures(
            pipe,
            range(start, start + count),
            seed=point.seed,
            num_steps=point.steps,
            sampler=point.arm.sampler,
            guidance=point.guidance,
        )


def source_of(frontier: Frontier) -> Source:
    """Where a frontier's pictures come from."""
    return PipelineSource(frontier) if frontier.task is None else TaskSource(frontier)
