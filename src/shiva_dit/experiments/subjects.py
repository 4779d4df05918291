"""What a comparison is of: a demo task's backbone, or a pipeline and pictures of a user's own."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.demo.base import ASSETS, load_backbone, load_judge, usable_device
from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.contestants import MIN_COUNT, Settings
from shiva_dit.experiments.frontier.executed import counted
from shiva_dit.experiments.held_out import HeldOut, held_out
from shiva_dit.experiments.maps import kept_shares
from shiva_dit.experiments.own_pipeline import OwnPipeline, twin
from shiva_dit.experiments.scoring import (
    Sampler,
    Score,
    floors,
    noise_seed,
    sample,
    sampler_times,
    score,
)
from shiva_dit.methods.blocks import BlockReducer
from shiva_dit.models import sampling
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_flops
from shiva_dit.models.families import model_spec
from shiva_dit.models.guidance import Pass
from shiva_dit.models.reducing import Reduction
from shiva_dit.models.sampling import listed_times
from shiva_dit.models.spec import grid_of
from shiva_dit.pictures.prompts import Prompt
from shiva_dit.provenance import data_digest
from shiva_dit.training.calls import Calls
from shiva_dit.training.data import TrainingData
from shiva_dit.training.folder import FolderData
from shiva_dit.training.looks.material import keys_of, material, place_of
from shiva_dit.training.paths import path_of
from shiva_dit.training.settings import WatchConfig

HELD_OUT, HELD_OUT_SHARE, HELD_OUT_TIMES = 16, 0.05, 8
"""Pictures of one's own that are held out: how many at most, the share, and times of each."""
On = Attachment | Reduction | None
"""What is on a backbone."""


class Subject(ABC):
    """A backbone, what trains it, and pictures of it, judged where there is a judge."""

    task: DemoTask | None = None
    data: TrainingData
    """What is trained on."""

    @property
    def identity(self) -> str | None:
        """Digest of weights, prompts and training data; a demo task's are its recipe's."""
        return None

    @property
    def judge(self) -> Judge | None:
        """Of a demo task's pictures; others are held against the unpruned model's alone."""
        return None

    @abstractmethod
    def backbone(self) -> Any:
        """The unpruned model on its device, with weights that may be changed."""

    @abstractmethod
    def sampler(self, num_steps: int | None) -> sampling.Sampler:
        """How the steps are taken that training is for."""

    @abstractmethod
    def sample(
        self,
        backbone: nn.Module,
        count: int,
        *,
        seed: int,
        start: int,
        num_steps: int,
        sampler: Sampler,
        guidance: float,
    ) -> tuple[Float[Tensor, "N C H W"], float]:
        """Pictures in [-1, 1] of prompts from the first one on, and the CPU seconds they took."""

    @abstractmethod
    def held_out(self, pruned: Any, on: On) -> HeldOut:
        """What a model does to samples that nothing is trained on."""

    @abstractmethod
    def cost(
        self, backbone: nn.Module, on: On, num_steps: int, sampler: Sampler, guidance: float
    ) -> tuple[float, float]:
        """FLOPs of a picture, and the share of tokens that is kept."""

    def score(self, images: Float[Tensor, "N C H W"]) -> Score | None:
        """A judge's verdict, where there is one."""
        if self.task is None or self.judge is None:
            return None
        return score(self.task, self.judge, images)

    def floors(self, count: int) -> Score | None:
        """What so many real pictures would score."""
        if self.task is None or self.judge is None:
            return None
        return floors(self.task, self.judge, count)


class DemoSubject(Subject):
    """A demo task.

    Args:
        settings: Name it.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.task is not None
        self._demo = self.task = self.data = load_task(settings.task)
        self._settings = settings
        self._base = settings.base or ASSETS

    @cached_property
    def judge(self) -> Judge:  # type: ignore[override]
        """Loaded when it is asked for.

        Raises:
            ValueError: If its weights are missing.
        """
        return load_judge(self._demo, self._base)

    def backbone(self) -> Any:
        """The unpruned model.

        Raises:
            ValueError: If its weights are missing, or there is no such device here.
        """
        model: Any = load_backbone(self._demo, self._base)
        return model.to(usable_device(self._settings.device))

    def sampler(self, num_steps: int | None) -> sampling.Sampler:
        """The task's."""
        return self._demo.sampler(num_steps)

    def sample(
        self, backbone: nn.Module, count: int, *, seed: int, start: int, **how: Any
    ) -> tuple[Float[Tensor, "N C H W"], float]:
        """As `scoring.sample`; each batch has noise of its own."""
        part = start // self._settings.batch
        return sample(self._demo, backbone, count, seed=noise_seed(seed) + part, start=start, **how)

    def held_out(self, pruned: Any, on: On) -> HeldOut:
        """On the task's held-out pictures."""
        selects = on if isinstance(on, Attachment) else None
        return held_out(self._demo, self.backbone(), pruned, selects)

    def cost(
        self, backbone: nn.Module, on: On, num_steps: int, sampler: Sampler, guidance: float
    ) -> tuple[float, float]:
        """Counted without guidance, whatever the pictures are sampled with."""
        del guidance
        keep_ratio = kept_share(on, self._demo.num_tokens, sampler_times(num_steps, sampler))
        return flops_per_image(self._demo, backbone, on, num_steps, sampler), keep_ratio


class OwnSubject(Subject):
    """A pipeline, with prompts from a file and pictures that `shiva-dit encode` made.

    Args:
        settings: Name all three.

    Raises:
        ValueError: If one can't be used.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.pipeline is not None
        assert settings.prompts is not None
        assert settings.data is not None
        self._settings = settings
        self.source = OwnPipeline(
            settings.pipeline,
            settings.prompts,
            settings.count,
            size=settings.size,
            device=settings.device,
        )
        data = FolderData(settings.data, pinned=settings.device.startswith("cuda"))
        data.check_pipeline(settings.pipeline)
        first = min(place_of(key) for key in keys_of(data))  # one is held back at least
        share = max(HELD_OUT_SHARE, first + 1e-9)
        watch = WatchConfig(every=1, prompts=0, held_out=HELD_OUT, held_out_share=share)
        found = material(watch, data)
        self.data, self._held_out = found.training, found.held_out
        self._trained_on = [data.identity(), share]

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        """Asked for where runs are told apart, not where they are made."""
        return data_digest([self.source.identity, *self._trained_on])

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Those that are sampled."""
        return self.source.prompts

    def backbone(self) -> Any:
        """A copy of the pipeline's transformer."""
        return twin(self.source.transformer, own_weights=True)

    def sampler(self, num_steps: int | None) -> sampling.Sampler:
        """The pipeline's."""
        del num_steps
        assert self._settings.pipeline is not None
        return sampling.Sampler.saved(self._settings.pipeline)

    def sample(
        self, backbone: nn.Module, count: int, *, seed: int, start: int, **how: Any
    ) -> tuple[Float[Tensor, "N C H W"], float]:
        """By the whole pipeline, decoded; each picture's noise by seed and prompt alone."""
        began = time.process_time()
        images, _ = self._run(backbone, range(start, start + count), seed=seed, **how)
        return images, time.process_time() - began

    @torch.no_grad()
    def _run(
        self, backbone: nn.Module, places: range, **how: Any
    ) -> tuple[Float[Tensor, "N C H W"], list[float]]:
        """Pictures, and the times t of their steps."""
        pipe = self.source.around(backbone)
        images = self.source.pictures(pipe, places, **how)
        return images, listed_times(pipe.scheduler, pipe.scheduler.timesteps.tolist())

    @torch.no_grad()
    def held_out(self, pruned: Any, on: On) -> HeldOut:
        """On pictures that nothing is trained on, each at times spread evenly."""
        del on
        spec, dense = model_spec(pruned), self.source.transformer
        device, dtype = next(dense.parameters()).device, next(dense.parameters()).dtype
        path = path_of(spec, self.sampler(None).scheduler)
        calls = Calls(spec=spec, path=path, dtype=dtype, passes=Pass.ALONE)
        errors, cosines, draw = [], [], torch.Generator().manual_seed(0)
        pictures = [one for batch in self._held_out for one in batch.split(1)]
        for one, index in itertools.product(pictures, range(HELD_OUT_TIMES)):
            batch = one.to(device)
            noise = torch.randn(one.latents.shape, generator=draw).to(device)
            t = torch.full((1,), (index + 0.5) / HELD_OUT_TIMES, device=device)
            arguments = calls.plain(path.noisy(batch.latents, noise, t), t, batch)
            ours, theirs = (model(**arguments)[0].float() for model in (pruned, dense))
            errors.append(float((ours - theirs).square().mean()))
            cosines.append(float(F.cosine_similarity(ours.flatten(1), theirs.flatten(1))))
        return HeldOut(error=sum(errors) / len(errors), cosine=sum(cosines) / len(cosines))

    def cost(
        self, backbone: nn.Module, on: On, num_steps: int, sampler: Sampler, guidance: float
    ) -> tuple[float, float]:
        """As the first picture executes them: with guidance both halves."""
        how: dict[str, Any] = {"num_steps": num_steps, "sampler": sampler, "guidance": guidance}
        with counted(backbone) as executed, kept_shares(backbone, 1) as kept:
            _, times = self._run(backbone, range(1), seed=0, **how)
        return float(sum(executed)), kept_share(on, kept.num_tokens, times)


def subject_of(settings: Settings) -> Subject:
    """What settings name."""
    return OwnSubject(settings) if settings.task is None else DemoSubject(settings)


def kept_share(on: On, num_tokens: int, times: list[float]) -> float:
    """Mean share of the tokens that is kept, over a run's steps and the pruned blocks."""
    if on is None:
        return 1.0
    if isinstance(on, Reduction):
        return on.reducer.count(num_tokens) / num_tokens
    return on.counts.table(num_tokens, tuple(times)).mean_keep_ratio


def flops_per_image(
    task: DemoTask, backbone: Any, on: On, num_steps: int, sampler: Sampler = "euler"
) -> float:
    """True FLOPs of one image without guidance: every sampler step with its own tokens.

    Where they differ from picture to picture, it is the mean of the first few.
    """
    size = task.num_tokens, task.captions.max_words
    if on is None:
        return float(num_steps * model_flops(backbone, *size).dense())
    if isinstance(on, Reduction) and isinstance(on.reducer, BlockReducer):
        with counted(backbone) as executed:
            sample(task, backbone, MIN_COUNT, seed=0, num_steps=num_steps, sampler=sampler)
        return sum(executed) / MIN_COUNT
    if isinstance(on, Reduction):
        grid = grid_of(backbone, task.held_out_images)
        return float(on.run_flops(*grid, task.captions.max_words, num_steps))
    run = tuple(sampler_times(num_steps, sampler))
    table = on.counts.table(task.num_tokens, run)
    return float(sum(pruned_flops(on, *size, table.row(t)) for t in run))
