"""Whose pictures a frontier is of: a demo task's backbone, or any pipeline with prompts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from shiva_dit.demo.base import ASSETS, load_backbone, load_judge, usable_device
from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.contest import noise_seed
from shiva_dit.experiments.frontier.config import Frontier, Point
from shiva_dit.experiments.scoring import sample_through
from shiva_dit.pictures.samplers import solver, steps_by
from shiva_dit.provenance import data_digest, file_digest, module_digest, read_text


class Source(ABC):
    """Makes pictures of the first prompts, from noise that seed and picture alone decide."""

    task: DemoTask | None = None
    judge: Judge | None = None
    """Of a demo task's pictures; others are held against the unpruned model's alone."""
    identity: str
    """Digest of the model's weights and of the prompts."""

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
        self.identity = data_digest([module_digest(model), prompts, *_digests(frontier.lora)])
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
        self.prompts = read_prompts(frontier.prompts, frontier.count)
        self._pipe: Any = DiffusionPipeline.from_pretrained(frontier.pipeline)
        self._pipe.to(usable_device(frontier.device))
        self._pipe.set_progress_bar_config(disable=True)
        digests = _digests(frontier.lora)
        self.identity = data_digest([module_digest(self._pipe.transformer), self.prompts, *digests])
        self._lora = frontier.lora
        self._scheduler = self._pipe.scheduler
        self._size = {}
        if frontier.size is not None:
            self._size = dict(zip(("height", "width"), frontier.size, strict=True))

    def pipe(self, *, own_weights: bool) -> Any:
        """The same parts around a transformer of its own."""
        parts = dict(self._pipe.components)
        parts["transformer"] = twin(self._pipe.transformer, own_weights=own_weights)
        made = type(self._pipe)(**parts)
        made.set_progress_bar_config(disable=True)
        return with_lora(made, self._lora)

    def run(self, pipe: Any, point: Point, count: int, start: int) -> Float[Tensor, "N C H W"]:
        """Decoded pictures."""
        places = range(start, start + count)
        seeds = [1000 * noise_seed(point.seed) + place for place in places]
        pipe.scheduler = solver(self._scheduler, point.arm.sampler)
        images: Tensor = pipe(
            prompt=[self.prompts[place] for place in places],
            guidance_scale=point.guidance,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
            output_type="pt",
            **self._size,
            **steps_by(point.arm.sampler, point.steps),
        ).images
        return 2.0 * images.float().cpu() - 1.0


def source_of(frontier: Frontier) -> Source:
    """Where a frontier's pictures come from."""
    return PipelineSource(frontier) if frontier.task is None else TaskSource(frontier)


def with_lora(pipe: Any, lora: Path | None) -> Any:
    """The pipeline, with a LoRA of the user's loaded.

    Raises:
        ValueError: If there is none, or diffusers can't load it.
    """
    if lora is None:
        return pipe
    if not lora.exists():
        raise ValueError(f"lora: there is no file or folder {lora}.")
    try:
        pipe.load_lora_weights(lora.parent if lora.is_file() else lora, **_named(lora))
    except Exception as error:  # whatever diffusers and PEFT raise on what is no LoRA of it
        raise ValueError(
            f"lora: diffusers can't load {lora} into this pipeline: {error}"
        ) from error
    return pipe


def _named(lora: Path) -> dict[str, str]:
    return {"weight_name": lora.name} if lora.is_file() else {}


def _digests(lora: Path | None) -> list[str]:
    """Of the files of a LoRA; none without one."""
    if lora is None:
        return []
    files = [lora] if lora.is_file() else sorted(lora.glob("*.safetensors"))
    return [file_digest(file) for file in files]


def read_prompts(path: Path, count: int) -> list[str]:
    """The first prompts of a file, one in a line; empty lines don't count.

    Raises:
        ValueError: If there are fewer.
    """
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if len(prompts) < count:
        raise ValueError(f"{path} has {len(prompts)} prompts, and count asks for {count} pictures.")
    return prompts[:count]


def twin(model: Any, *, own_weights: bool) -> Any:
    """A copy of a model; its tensors are copied, or shared with the model."""
    tensors = () if own_weights else (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
