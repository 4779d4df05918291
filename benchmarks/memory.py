"""What training real models takes of a GPU's memory, counted on tensors of shapes alone.

python benchmarks/memory.py --out results/memory--counted.json

Nothing is downloaded, no weights are made. A row's settings are the first that fit its card, with
2 GiB left for what isn't counted (driver, kernels, allocator); that is checked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from shiva_dit.benchmark.workloads import workload
from shiva_dit.config import from_dict
from shiva_dit.models.families import model_spec
from shiva_dit.provenance import provenance, write_json
from shiva_dit.training.data import Batch
from shiva_dit.training.memory import Shapes, needs
from shiva_dit.training.recipe import TrainConfig

SPARE = 2.0
GUIDED: dict[str, Any] = {"guidance": (1.0, 7.0)}
LORA: dict[str, Any] = {"backbone": "lora", "lora_rank": 32}
ROWS: tuple[tuple[str, int, str, dict[str, Any]], ...] = (
    ("sd35-medium", 24, "LoRA, base in bfloat16, 2 a part", {**LORA, **GUIDED, "batch_size": 8}),
    ("sd35-medium", 80, "all weights, 1 a part", {"backbone": "full", **GUIDED}),
    ("flux-dev", 24, "LoRA, base in nf4, 1 a part", {**LORA, **GUIDED, "base_dtype": "nf4"}),
    ("flux-dev", 80, "LoRA, base in bfloat16, 2 a part", {**LORA, **GUIDED, "batch_size": 8}),
    ("wan-1.3b", 24, "LoRA, base in bfloat16, 1 a part, without guidance", LORA),
    ("wan-1.3b", 80, "LoRA, base in bfloat16, 2 a part", {**LORA, **GUIDED, "batch_size": 8}),
)
COMMON: dict[str, Any] = {
    "task": None,
    "keep_ratio": 0.6,
    "batch_size": 4,
    "micro_batches": 4,
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "base_dtype": "bfloat16",
}


def shapes(name: str) -> Shapes:
    """A model of real size, and samples."""
    work = workload(name)
    grid = work.grid()
    cls = getattr(diffusers, work.model_class)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = cls(**work.config)
        spec = model_spec(model)

        def made(count: int) -> dict[str, Any]:
            inputs = work.inputs(model, count, grid, work.text_tokens, torch.float32)
            return {n: real(v) for n, v in inputs.items()}

        one, two = made(1), made(2)

    def batch(count: int) -> Batch:
        def often(value: torch.Tensor) -> torch.Tensor:
            return value.repeat(count, *[1] * (value.ndim - 1))

        each = {
            name: often(value)
            for name, value in one.items()
            if isinstance(value, torch.Tensor) and value.shape != two[name].shape
        }
        latents = each.pop(spec.sample)
        known = {spec.sample, spec.timestep, *each}
        shared = {name: value for name, value in one.items() if name not in known}
        return Batch(latents=latents, conditioning=each, shared=shared)

    empty = {name: value[0] for name, value in batch(1).conditioning.items()}
    scheduler = FlowMatchEulerDiscreteScheduler()
    return Shapes(
        model_class=cls, config=dict(work.config), batch=batch, empty=empty, scheduler=scheduler
    )


def real(value: Any) -> Any:
    """Zeros of a tensor's shape."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros(tuple(value.shape), dtype=value.dtype)


def main() -> None:
    """Count all rows and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="one model")
    options = parser.parse_args()
    rows = []
    for name, card, said, changes in tqdm(ROWS):
        if options.only not in (None, name):
            continue
        settings = {**COMMON, **changes}
        if settings["backbone"] == "full":
            settings["base_dtype"] = "float32"
        found = needs(from_dict(TrainConfig, settings), shapes(name))
        work = workload(name)
        row = {
            "model": work.about,
            "gib": card,
            "settings": said,
            "recipe": settings,
            "total": found.total,
            "weights": sum(found.weights.values()) + found.teacher,
            "activations": found.activations,
            "trained": found.trained,
        }
        rows.append(row)
        fits = found.total / 2**30 + SPARE <= card
        tqdm.write(
            f"{name}, {card} GB: {found.total / 2**30:.1f} GiB, {said}{'' if fits else ' !'}"
        )
    write_json(options.out, {"what": "memory", "rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
