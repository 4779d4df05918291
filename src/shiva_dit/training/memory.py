"""What a run needs of memory and disk, counted before it starts, without weights.

The very code of a step runs, forward, backward and update, on tensors that have shapes alone, and
the bytes that would be alive are added up. What operators need within themselves, and what a GPU's
driver and allocator take beside, isn't seen.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from shiva_dit.core.selection import keep_count
from shiva_dit.models.backbone import backbone_weights, untuned
from shiva_dit.models.base_dtype import Narrowed
from shiva_dit.models.counted import recipe
from shiva_dit.models.families import model_spec
from shiva_dit.models.sampling import Sampler
from shiva_dit.training.data import Batch, TrainingData
from shiva_dit.training.live import LiveBytes, held_bytes
from shiva_dit.training.making import adapter_config
from shiva_dit.training.optimization import SUMMED, Optimization, parts_of
from shiva_dit.training.paths import path_of
from shiva_dit.training.plan import Part
from shiva_dit.training.processes import ALONE
from shiva_dit.training.recipe import StageName, TrainConfig
from shiva_dit.training.student import Student

DISK_COPIES = 3
"""Checkpoints on the disk at once: the last two, and the next while it is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What a run is counted from: a model by its config, and samples."""

    model_class: type[nn.Module]
    config: Mapping[str, Any]
    """What the class is built with."""
    batch: Callable[[int], Batch]
    """So many samples, of the largest shape."""
    empty: Mapping[str, Tensor]
    """Conditioning of "no caption", without a batch dimension."""
    scheduler: Any = None
    """The pipeline's, or a `Sampler`."""

    @classmethod
    def of(
        cls,
        model_class: type[nn.Module],
        config: Mapping[str, Any],
        data: TrainingData,
        scheduler: Any,
    ) -> Shapes:
        """Of a model that needn't be there, and data that is."""
        known = inspect.signature(model_class.__init__).parameters
        return cls(
            model_class=model_class,
            config={name: value for name, value in config.items() if name in known},
            batch=partial(_batch_of, data, _largest(data)),
            empty=data.unconditional(),
            scheduler=scheduler,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes that each process of a run needs."""

    weights: dict[str, int]
    """The model's by dtype, a LoRA's among them; a share of them where they are sharded."""
    teacher: int
    """The copy that stays as it was; 0 where the model is its own teacher."""
    adapter: int
    """Routers and policy."""
    trained: int
    """How many weights are trained, in all processes."""
    gradients: int
    """Of one part, and their sums over parts in float64."""
    moments: int
    """Adam's."""
    averages: int
    """The moving average of what is trained, and what weight decay pulls to."""
    gathered: int
    """Where weights are sharded: what of them is whole at once."""
    activations: int
    """At most in forward and backward of one part, at the mean keep ratio."""
    activations_dense: int
    """The same for a part that keeps all tokens, as a learned schedule may at some times."""
    total: int
    """At most at once. Less than the sum, for gradients come as activations go."""
    checkpoint: int
    """One of them on the disk."""
    adapter_file: int
    """The adapter on the disk."""
    trajectories: int
    """The unpruned model's trajectories on the disk, where the recipe has some."""

    @property
    def disk(self) -> int:
        """Bytes of a run's folder, at most."""
        return DISK_COPIES * self.checkpoint + self.adapter_file + self.trajectories


def needs(config: TrainConfig, shapes: Shapes, *, processes: int = 1) -> Needs:
    """Count what a run needs.

    Args:
        config: The recipe.
        shapes: Model and samples.
        processes: How many train together.

    Raises:
        ValueError: If the recipe doesn't fit the model.
    """
    mode = _ShapesAlone()
    with mode:
        model = shapes.model_class(**shapes.config).eval()
    adapter_config(config, model)  # widths are read off shapes of their own, and remembered
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Counting(config, model, shapes).needs(processes)


class _ShapesAlone(FakeTensorMode):
    """Tensors of shapes alone, in modules that may be moved and copied."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # It remembers parameters by weak references, which keep modules from being moved.
        self.fake_tensor_converter.set_tensor_memo = lambda t, v: None

    def __deepcopy__(self, memo: Any) -> _ShapesAlone:
        return self


class _Counting:
    """Student and optimizer of a run, of shapes alone."""

    def __init__(self, config: TrainConfig, model: Any, shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes
        scheduler = shapes.scheduler
        scheduler = scheduler.scheduler if isinstance(scheduler, Sampler) else scheduler
        path = path_of(model_spec(model), scheduler)
        Narrowed(model, config.base_dtype)
        self.student = student = Student(config, model, shapes.batch(1), torch.Generator(), path)
        parts = parts_of(student)
        given = untuned(student.model, config.backbone, student.teacher)
        self.optimization = Optimization(parts, config.optimizer, given, by_rows=config.shard)
        self.trained = [p for part in parts.values() for p in part.values()]
        student.model.train()

    def needs(self, processes: int) -> Needs:
        """All of it, of one among so many processes."""
        student, optimization, config = self.student, self.optimization, self.config
        teacher = [] if student.teacher is student.model else _content([student.teacher])
        own = [student.adapter, student.reducer, student.updates]
        adapter = _content([each for each in own if isinstance(each, nn.Module)])
        averages = [mean for means in optimization.average.values() for mean in means]
        model = _content([student.model])
        static = held_bytes([*model, *teacher, *adapter, *averages, *optimization.untuned])
        with LiveBytes() as live:
            self._make_moments()
            moments = live.now
            most = self._most_of_steps(live)
            activations = self._activations(live, config.keep_ratio)
            dense = self._activations(live, 1.0)
        weights: dict[str, int] = {}
        for tensor in model:
            name = _dtype_name(tensor)
            weights[name] = weights.get(name, 0) + held_bytes([tensor])
        summed = [p for part in SUMMED for p in optimization.parts[part].values()]
        saved = sum(t.numel() * t.element_size() for t in optimization.tensors().values())
        width = torch.finfo(getattr(torch, config.backbone_dtype)).bits // 8
        tuned = sum(t.numel() for t in backbone_weights(student.model, config.backbone).values())
        states = config.trajectories.count * (config.trajectories.steps + 1)
        found = Needs(
            weights=weights,
            teacher=held_bytes(teacher),
            adapter=held_bytes(adapter),
            trained=sum(p.numel() for p in self.trained),
            gradients=sum(p.numel() * (p.element_size() + 8) for p in summed),
            moments=moments,
            averages=static - held_bytes([*model, *teacher, *adapter]),
            gathered=0,
            activations=activations,
            activations_dense=dense,
            total=static + most,
            checkpoint=saved,
            adapter_file=held_bytes(adapter) + width * tuned,
            trajectories=2 * states * self.shapes.batch(1).latents.numel(),
        )
        return self._shared(found, processes) if config.shard and processes > 1 else found

    def _shared(self, whole: Needs, processes: int) -> Needs:
        """The same where each process holds a share of the weights and what belongs to them."""
        model, spec = self.student.model, self.student.spec
        blocks = [held_bytes(block.parameters()) for block in spec.blocks(model)]
        # While a block runs, the next is gathered, and what is outside blocks is whole; in the
        # backward its gradient, which is summed over processes in float64.
        gathered = held_bytes(model.parameters()) - sum(blocks) + 5 * max(blocks)
        tuned = sum(p.numel() for p in self.optimization.parts["backbone"].values())
        others = sum(p.numel() for p in self.trained) - tuned
        per_weight = {
            "gradients": 12 * tuned,
            "moments": whole.moments - 8 * others,
            "averages": 4 * tuned,
            "teacher": whole.teacher,
        }
        less = {n: b - b // processes for n, b in per_weight.items()}
        shares = {name: getattr(whole, name) - gone for name, gone in less.items()}
        weights = {name: -(-held // processes) for name, held in whole.weights.items()}
        held = (*shares.values(), *weights.values(), whole.adapter, gathered, whole.activations)
        return replace(whole, weights=weights, gathered=gathered, total=sum(held), **shares)

    def _make_moments(self) -> None:
        self.optimization.start("joint", 0, 1)
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimization.finish(0)

    def _most_of_steps(self, live: LiveBytes) -> int:
        """Of a step of the joint stage, and of the warm-up, which keeps more tokens."""
        config = self.config
        live.most = live.now
        stages: list[tuple[StageName, float]] = [("joint", config.keep_ratio)]
        if config.stage_at(0)[0] == "warmup":
            stages.append(("warmup", config.warmup_ratios[1]))
        for stage, ratio in stages:
            self.optimization.start(stage, 0, 1)
            if config.micro_batches > 1:
                self._gather_one()
            self._loss(ratio).backward()
            self.optimization.gather()
            self.optimization.reduce(ALONE)
            self.optimization.finish(0)
        return live.most

    def _gather_one(self) -> None:
        """The sums that an earlier part would have left."""
        for part in SUMMED:
            for parameter in self.optimization.parts[part].values():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
                    self.optimization.gather()

    def _activations(self, live: LiveBytes, ratio: float) -> int:
        """Of one part of the joint stage, without the gradients that it leaves."""
        self.optimization.start("joint", 0, 1)
        before = live.most = live.now
        hooks = [
            parameter.register_post_accumulate_grad_hook(_forget)
            for parameter in self.trained
            if parameter.requires_grad
        ]
        self._loss(ratio).backward()
        for hook in hooks:
            hook.remove()
        return live.most - before

    def _loss(self, ratio: float) -> Tensor:
        config, student = self.config, self.student
        size = config.batch_size // config.micro_batches
        full = set(student.adapter.schedule.full_blocks)
        tokens = student.planned_tokens
        counts = tuple(
            tokens if block in full else keep_count(tokens, ratio)
            for block in range(student.adapter.config.num_blocks)
        )
        part = Part(t=torch.full((size,), 0.5), counts=counts, soft_k=tuple(map(float, counts)))
        batch = self.shapes.batch(size // config.times_per_sample)
        return student.loss(part, batch, 0.5, self.shapes.empty)[0]


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _content(modules: Sequence[nn.Module]) -> list[Tensor]:
    """All tensors that modules hold, each once."""
    held = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return list(held.values())


def _dtype_name(tensor: Tensor) -> str:
    """As people call it; a quantised weight's is that of its values."""
    while hasattr(tensor, "__tensor_flatten__"):
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])  # type: ignore[attr-defined]
    return str(tensor.dtype).removeprefix("torch.")


def shapes_of(model: Any, data: TrainingData, scheduler: Any) -> Shapes:
    """What a run is counted from, where model and data are at hand."""
    spec = model_spec(model)
    cls, config = recipe(model, spec, spec.text_tokens)
    return Shapes.of(cls, json.loads(config), data, scheduler)


def _largest(data: TrainingData) -> int:
    """A sample of the shape that has most values."""
    groups = getattr(data, "groups", lambda: None)() or [0]
    firsts = {group: row for row, group in reversed([*enumerate(groups)])}
    if len(firsts) == 1:
        return 0

    def size(row: int) -> int:
        return data.batch(torch.tensor([row]), torch.Generator()).latents.numel()

    return max(sorted(firsts.values()), key=size)


def _batch_of(data: TrainingData, row: int, count: int) -> Batch:
    """A sample so often, read as it is, since data looks at values; of it the shapes alone."""
    with _disable_current_modes():
        read = data.batch(torch.full((count,), row), torch.Generator())
    made = {n: getattr(read, n) for n in ("latents", "conditioning", "shared")}
    return replace(read, **tree_map_only(Tensor, torch.empty_like, made))
