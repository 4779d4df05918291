"""What a training step takes: pruned, with and without a teacher, against plain fine-tuning."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from shiva_dit.benchmark.config import DTYPES, BenchmarkConfig
from shiva_dit.benchmark.operators import time_operators
from shiva_dit.benchmark.records import record_what
from shiva_dit.benchmark.timing import interleaved, saved_bytes
from shiva_dit.benchmark.workloads import Grid, Workload, workload
from shiva_dit.core.estimators import EstimatorConfig
from shiva_dit.models.families import model_spec
from shiva_dit.provenance import provenance
from shiva_dit.training.data import Batch
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import LossConfig, OptimizerConfig
from shiva_dit.training.trainer import Trainer

PLAIN, ALONE, TAUGHT = "dense fine-tuning", "without a teacher", "with a teacher"
WARMUP = 4  # in the first ones the process still gets its memory


class RandomData:
    """Samples of a workload: the same random one again and again."""

    def __init__(self, load: Workload, model: Any, grid: Grid, text_tokens: int) -> None:
        spec = model_spec(model)
        self.sample = spec.sample
        made = load.inputs(model, 1, grid, text_tokens, torch.float32)
        stacked = {name: torch.stack(made[name], 1) for name in spec.by_layer if name in made}
        self.made = {**made, **stacked}

    def __len__(self) -> int:
        """Samples."""
        return 64

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """As many as are asked for."""
        del generator
        latents, found = self.made[self.sample], self._conditioning()
        shared = {n: v for n, v in self.made.items() if n not in (*found, self.sample)}
        return Batch(
            latents=latents.expand(len(indices), *latents.shape[1:]),
            conditioning={n: v.expand(len(indices), *v.shape[1:]) for n, v in found.items()},
            shared=shared,
        )

    def unconditional(self) -> dict[str, Tensor]:
        """Without a prompt."""
        return {name: torch.zeros_like(value[0]) for name, value in self._conditioning().items()}

    def _conditioning(self) -> dict[str, Tensor]:
        return {
            name: value
            for name, value in self.made.items()
            if name != self.sample and isinstance(value, Tensor) and value.shape[0] == 1
        }


def run_step_benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Time whole steps of `shiva-dit train`: forward, backward, and the optimizer's.

    The dense arm fine-tunes the unpruned model by flow matching. One pruned arm learns router,
    ratios and backbone by the same loss, another by a teacher too (an unpruned forward more, whose
    features it matches). All as recipes say it, the joint stage, one part per batch.

    Args:
        config: What is timed; `train` says what is tuned. Not compiled.

    Returns:
        A plain record: per arm all times in ms per step, their median as a share of the dense
        one's, and bytes kept for backward (`saved_bytes`, weights not counted), likewise.

    Raises:
        ValueError: If the model is unknown or learned no flow matching (it needs its scheduler).
    """
    load = workload(config.model)
    grid, device = load.grid(config.size), torch.device(config.device)
    arms: dict[str, tuple[float, TrainConfig]] = {PLAIN: (1.0, _recipe(config, 0.5, PLAIN))}
    for keep in config.keep:
        for kind in (ALONE, TAUGHT):
            arms[f"keep {keep:g}, {kind}"] = keep, _recipe(config, keep, kind)
    text_tokens = load.text_tokens if config.text_tokens is None else config.text_tokens
    trainers: dict[str, Trainer] = {}
    try:
        for name, (_, recipe) in arms.items():
            model = load.build(grid, DTYPES[config.dtype], device)
            trainers[name] = Trainer(recipe, model, RandomData(load, model, grid, text_tokens))
            model.train()
        for _ in range(WARMUP):
            for trainer in trainers.values():
                trainer.train_step()
        calls = {name: trainer.train_step for name, trainer in trainers.items()}
        samples = interleaved(calls, repeats=config.repeats, device=device)
        watched = min(3, config.repeats)
        operators = {name: time_operators(call, repeats=watched) for name, call in calls.items()}
        saved = {name: saved_bytes(call, _weights(trainers[name])) for name, call in calls.items()}
    finally:
        for trainer in trainers.values():
            trainer.close()
    dense = samples[PLAIN]
    rows = []
    for name, found in samples.items():
        row: dict[str, Any] = {"arm": name, "keep_ratio": arms[name][0], **asdict(found)}
        row["of_dense"], row["of_dense_cpu"] = found.over(dense), found.cpu_over(dense)
        row["operators_ms"] = operators[name]
        row["saved_bytes"], row["saved_of_dense"] = saved[name], saved[name] / saved[PLAIN]
        rows.append(row)
    return {
        "what": record_what(config),
        "config": asdict(config),
        "image_tokens": load.num_tokens(grid),
        "text_tokens": text_tokens,
        "rows": rows,
        "provenance": provenance(),
    }


def _weights(trainer: Trainer) -> list[Tensor]:
    student = trainer.student
    modules: tuple[nn.Module, ...] = student.model, student.teacher, student.adapter
    return [weight for module in modules for weight in module.parameters()]


def _recipe(config: BenchmarkConfig, keep_ratio: float, kind: str) -> TrainConfig:
    assert config.train is not None
    taught = kind == TAUGHT
    options: Mapping[str, Any] = {} if kind != PLAIN else {"method": "dense"}
    return TrainConfig(
        out=Path(tempfile.gettempdir()) / "shiva-dit-benchmark",  # nothing is written there
        keep_ratio=keep_ratio,
        backbone=config.train,
        lora_rank=16,
        warmup_steps=0,
        policy_steps=0,
        joint_steps=1_000_000,
        batch_size=config.batch,
        micro_batches=1,
        precision="bfloat16" if config.dtype == "bfloat16" else "float32",
        estimator=EstimatorConfig(rejected="teacher" if taught else "ridge"),
        loss=LossConfig() if taught else LossConfig(distillation=0.0, output=0.0),
        optimizer=OptimizerConfig(warmup_steps=0),
        **options,
    )
