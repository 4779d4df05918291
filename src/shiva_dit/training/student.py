"""The pruned model in training beside its unpruned teacher."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shiva_dit.adapter.config import lora_metadata
from shiva_dit.core.annealing import anneal
from shiva_dit.core.keep_table import nearest_bin
from shiva_dit.core.time_law import UNIFORM, TimeLaw
from shiva_dit.methods.base import Lesson, Mixture, Reducer, Selector
from shiva_dit.methods.blocks import BlockReducer
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.models.attach import attach, paused
from shiva_dit.models.backbone import add_lora, enable_lora, remove_lora
from shiva_dit.models.families import model_spec
from shiva_dit.models.features import BlockFeatures, record_blocks
from shiva_dit.models.gating import GatedForward
from shiva_dit.models.joint_block import refuse_other_blocks
from shiva_dit.models.reducing import Reduction, attach_reducer
from shiva_dit.models.sharded import shard, sum_by_block
from shiva_dit.models.spec import grid_of
from shiva_dit.training.by_role import ByRole
from shiva_dit.training.calls import Calls
from shiva_dit.training.data import Batch, repeated
from shiva_dit.training.guided import guided, passes_in_training
from shiva_dit.training.making import check_given, made_adapter, made_reducer, placed, recompute
from shiva_dit.training.objective import (
    denoising_loss,
    distillation_loss,
    error_and_drift,
    logit_normal_density,
    squared_error,
)
from shiva_dit.training.paths import NoisePath
from shiva_dit.training.plan import Part
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.route import Route
from shiva_dit.training.settings import LossConfig
from shiva_dit.training.start import read_start, start_from


class Student:
    """A model with a selector attached, its teacher, and the loss between them (Eq. 14, 31).

    Args:
        config: The recipe.
        model: The backbone, on its device. The teacher is a frozen copy of it where the whole
            backbone is tuned, or else the model itself without its LoRA and hooks.
        sample: One training sample, for shapes.
        generator: Source of selection noise, and of the random control's choices.
        path: How clean samples become noise.
        law: Whose steps the mean keep ratio is over.
        shard_on: Where all processes share the weights of model and teacher; None: each has all.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        sample: Batch,
        generator: torch.Generator,
        path: NoisePath,
        law: TimeLaw = UNIFORM,
        shard_on: torch.device | None = None,
    ) -> None:
        check_given(config, model, sample)
        self.config, self.model, self.generator, self.path = config, model, generator, path
        self._was = model.training, [(p, p.requires_grad) for p in model.parameters()]
        self._was_checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
        self.device = shard_on or next(model.parameters()).device
        self.teacher = model
        if config.backbone == "full":
            self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.adapter = placed(made_adapter(config, model, law), self.device)
        self.reducer, self.weights = self._method(sample)
        start = None if config.start is None else read_start(config, self.adapter, model)
        if config.backbone in ("lora", "dora"):
            add_lora(model, lora_metadata(self.adapter.config), float32=True)
        self.started = None if start is None else start_from(start, self.adapter, model)
        """SHA-256 of the adapter that training starts from."""
        self.unshard: Callable[[], object] = dict  # does nothing
        if shard_on is not None:
            self.unshard = shard(model, shard_on)
            shard(self.teacher, shard_on)
            flags = [flag for _, flag in self._was[1]]
            self._was = self._was[0], list(zip(model.parameters(), flags, strict=True))
        if config.gradient_checkpointing:
            recompute(model, sample)
        self.selector = self.reducer if isinstance(self.reducer, Selector) else None
        self.updates = None if self.selector is None else self.adapter.updates
        self.learns_scores = self.selector is not None and self.selector.learns_from_gates
        self.spec = model_spec(model)
        self._put_on()
        passes = passes_in_training(model, self.spec, config.guidance, sample)
        self.roles = ByRole(config, model, self.spec)
        clean = self.roles.clean
        self.calls = Calls(spec=self.spec, path=path, dtype=model.dtype, passes=passes, clean=clean)
        self.num_tokens, self.num_references = self.roles.of(sample)
        """Tokens of the target and, beside these, of references, in the last batch."""
        self.planned_tokens = self.num_tokens
        last, each = self.adapter.config.num_blocks - 1, config.loss.distill_every
        self.distilled = (*range(each - 1, last, each), last)
        whole = config.backbone == "full" and shard_on is None
        self._undo = sum_by_block(self.spec.blocks(model) if whole else [])

    def _method(self, sample: Batch) -> tuple[Reducer | None, LossConfig]:
        """What the recipe's method runs on (None for the dense control), and the losses' weights.

        Raises:
            ValueError: If the model or these losses can't go along with it.
        """
        config, model = self.config, self.model
        reducer = made_reducer(
            config,
            model,
            lambda: grid_of(model, sample.latents),
            router=self.adapter.router,
            generator=self.generator,
        )
        if reducer is None:
            return None, config.loss
        own = reducer.objective if config.objective == "method" else {}
        weights = dataclasses.replace(config.loss, **own)
        if isinstance(reducer, BlockReducer):
            refuse_other_blocks(model, reducer)
            if reducer.resizes and weights.distillation:
                raise ValueError(
                    f'method = "{config.method}" has other numbers of tokens within the model than '
                    "the teacher: set loss.distillation = 0."
                )
        return placed(reducer, self.device), weights

    def _put_on(self) -> None:
        """Hooks on the model: of a method that changes blocks by itself, or of a selector."""
        config, made = self.config, self.adapter.config
        self.reduction: Reduction | None = None
        if isinstance(self.reducer, BlockReducer):
            self.reduction = attach_reducer(self.model, self.reducer)
            return
        self.attachment = attach(
            self.model,
            self.selector or self.adapter.selector(),
            self.adapter.schedule,
            updates=self.updates,
            select_every=made.select_every,
            reference_keep_ratio=made.reference_keep_ratio,
            gate_values=config.estimator.needs_value_gate and self.learns_scores,
        )

    def loss(
        self, part: Part, batch: Batch, progress: float, empty: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of one micro-batch, and the squared errors of its predictions to the teacher's.

        The teacher runs, and errors are known, where a loss or the estimator asks for it.

        Args:
            part: Times and counts.
            batch: Clean samples, on the model's device: b, or fewer that have several times each.
            progress: Share of the training done, for the temperatures.
            empty: Conditioning of "no caption": guided samples may run with it, too.

        Returns:
            The loss, and by name "distill" and, where samples are guided, "guided".
        """
        weights, scales, samples = self.weights, None, len(batch.latents)
        self.num_tokens, self.num_references = self.roles.of(batch)
        part = part.for_tokens(self.num_tokens, self.planned_tokens)
        lesson = Lesson(progress=progress, generator=self.generator)
        noise = torch.randn(batch.latents.shape, generator=self.generator).to(self.device)
        t, route = part.t.to(self.device), batch.route
        batch, noise = repeated(batch, self.config.times_per_sample, noise)
        if self.config.guidance is not None:
            scales = self._scales(self.config.guidance, len(t), route)
        noisy = self.path.noisy(batch.latents, noise, t) if route is None else route.at(t)
        batch = self.calls.noised(batch, t, self.generator)
        arguments = self.calls.guided(noisy, t, batch, scales, empty)
        copies = 2 if self.calls.both_ways else 1
        teacher, taught = self.teach(arguments) if self.needs_teacher else (BlockFeatures(), None)
        with (
            self._in_training(part, lesson, teacher),
            record_blocks(
                self.model, inputs=(), outputs=self.distilled, num_tokens=self.all_tokens
            ) as student,
            self.autocast(),
        ):
            prediction = self.path.prediction(self.model(**arguments), self.num_tokens)
        prediction = self.roles.learned(prediction, batch)
        off = partial(
            error_and_drift,
            samples=samples,
            times=self.config.times_per_sample,
            weight=weights.drift,
        )
        by_time = None
        if weights.time_weighting != "uniform":
            by_time = logit_normal_density(t.repeat(copies))
        loss = prediction.new_zeros(())
        errors: dict[str, float] = {}
        if taught is not None:
            taught = self.roles.learned(taught, batch)
            loss = weights.distillation * distillation_loss(
                [student.outputs[i] for i in self.distilled],
                [teacher.outputs[i] for i in self.distilled],
                by_time,
            )
            errors["distill"] = squared_error(prediction.detach(), taught).item()
            loss = loss + weights.output * off(prediction, taught, weights=by_time)
            if scales is not None and self.calls.both_ways:
                ours, theirs = guided(prediction, scales), guided(taught, scales)
                errors["guided"] = squared_error(ours.detach(), theirs).item()
                by_scale = 1.0 / scales if by_time is None else by_time[: len(scales)] / scales
                loss = loss + weights.guided * off(ours, theirs, weights=by_scale)
        if weights.diffusion and route is None:
            target = self.roles.learned(self.path.target(batch.latents, noise, t), batch)
            target = target.repeat(copies, *[1] * (target.ndim - 1))
            loss = loss + weights.diffusion * denoising_loss(prediction, target, by_time)
        own = None if self.reducer is None else self.reducer.loss(lesson)
        return loss if own is None else loss + own, errors

    def _in_training(
        self, part: Part, lesson: Lesson, teacher: BlockFeatures
    ) -> AbstractContextManager[None]:
        """Within: what is on the model runs as its training wants it."""
        if self.reduction is not None:
            return self.reduction.taught(lesson)
        mixtures: Mapping[int, Mixture] = {}
        if self.selector is not None and self.selector.num_bins is not None:
            time_bin = nearest_bin(float(part.t[0]), self.selector.num_bins)
            mixtures = self.selector.mixtures(time_bin, self.num_tokens)
        forward = GatedForward(
            counts=part.counts,
            gates=self._gates(part, lesson.progress, teacher),
            which=self.calls.passes,
            mixtures=mixtures,
        )
        return self.attachment.forwards.gated(forward)

    def _scales(self, between: tuple[float, float], count: int, route: Route | None) -> Tensor:
        """A guidance scale for each sample, the same at all of its times."""
        low, high = between
        times = self.config.times_per_sample
        drawn = torch.rand(count // times, generator=self.generator).to(self.device)
        own = low + (high - low) * drawn if route is None else route.guidance
        return own.repeat(times)

    @property
    def all_tokens(self) -> int:
        """Image tokens of the last batch: the target's and the references'."""
        return self.num_tokens + self.num_references

    @property
    def error_names(self) -> tuple[str, ...]:
        """What `loss` tells errors of."""
        if not self.needs_teacher:
            return ()
        return ("distill", "guided") if self.calls.both_ways else ("distill",)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss or the estimator asks for the unpruned model."""
        weights = self.weights
        estimates = self.learns_scores and self.config.estimator.needs_teacher
        guides = self.calls.both_ways and weights.guided
        return bool(weights.output or weights.distillation or guides or estimates)

    def teach(self, arguments: dict[str, Any]) -> tuple[BlockFeatures, Tensor]:
        """The unpruned model's features and prediction, with its own weights."""
        needs_updates = self.learns_scores and self.config.estimator.needs_teacher
        updates = self.adapter.schedule.prunable_blocks if needs_updates else ()
        wanted = {*updates, *self.distilled}
        recorded = record_blocks(
            self.teacher, inputs=updates, outputs=wanted, num_tokens=self.all_tokens
        )
        with torch.no_grad(), self.as_teacher(), recorded as features, self.autocast():
            output = self.teacher(**arguments)
        prediction = self.path.prediction(output, self.num_tokens)
        return features, prediction

    def close(self) -> None:
        """Give the model back: its own weights, no hooks, no LoRA; whole by `unshard` after it."""
        self._undo()
        (self.reduction or self.attachment).detach()
        if self.config.backbone in ("lora", "dora"):
            remove_lora(self.model)
        elif self.teacher is not self.model:
            self.model.load_state_dict(self.teacher.state_dict())
        if self.config.gradient_checkpointing and not self._was_checkpointing:
            self.model.disable_gradient_checkpointing()
        training, flags = self._was
        self.model.train(training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None

    def _gates(
        self, part: Part, progress: float, teacher: BlockFeatures
    ) -> Callable[[int], SelectionGates | None]:
        config = self.config

        def make(block: int) -> SelectionGates | None:
            if not self.learns_scores:
                return None
            return SelectionGates(
                config=config.estimator,
                tau_rank=anneal(*config.router.tau_rank, progress),
                tau_select=anneal(*config.router.tau_select, progress),
                soft_k=part.soft_k[block],
                noise_std=config.router.noise_std,
                generator=self.generator,
                is_pair=self.calls.both_ways,
                teacher_update=teacher.update(block) if config.estimator.needs_teacher else None,
            )

        return make

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Within: a model that is its own teacher runs dense and without its LoRA."""
        if self.teacher is not self.model:
            yield
            return
        lora = self.config.backbone in ("lora", "dora")
        if self.reduction is None:
            self.attachment.enabled = False
        if lora:
            enable_lora(self.model, False)
        try:
            with nullcontext() if self.reduction is None else paused(self.model):
                yield
        finally:
            if self.reduction is None:
                self.attachment.enabled = True
            if lora:
                enable_lora(self.model, True)

    def autocast(self) -> torch.autocast:
        """Within: forwards in the recipe's precision."""
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)
