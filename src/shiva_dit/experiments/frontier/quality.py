"""What pictures are worth, with intervals over the pictures, and which points are on the front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.metrics import decibels, frechet_distance, kernel_distance, squared_errors

RESAMPLED = 200
"""Sets of pictures drawn for an interval."""
WITHIN = 0.95


def interval(
    measure: Callable[[Int[Tensor, " N"]], float], count: int, *, seed: int = 0
) -> tuple[float, float]:
    """95% of what a measure is over sets of pictures drawn with replacement (bootstrap).

    Args:
        measure: Of the pictures with these indices.
        count: N.
        seed: Of the draws, the same for all arms: differences between them can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.tensor(
        [measure(torch.randint(count, (count,), generator=generator)) for _ in range(RESAMPLED)],
        dtype=torch.float64,
    )
    outside = (1.0 - WITHIN) / 2
    low, high = found.quantile(torch.tensor([outside, 1.0 - outside], dtype=torch.float64)).tolist()
    return low, high


def to_truth(images: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, Any]:
    """PSNR to the unpruned model's pictures, over all seeds, and by seed.

    Args:
        images: Of each seed.
        truth: From the same noise.
    """
    by_seed = [squared_errors(ours, theirs) for ours, theirs in zip(images, truth, strict=True)]
    errors = torch.cat(by_seed)
    return {
        "psnr": decibels(errors),
        "psnr_within": interval(lambda chosen: decibels(errors[chosen]), len(errors)),
        "psnr_by_seed": [decibels(found) for found in by_seed],
    }


@torch.no_grad()
def judged(
    images: Sequence[Tensor], truth: Sequence[Tensor], task: DemoTask, judge: Judge
) -> dict[str, Any]:
    """Distances and what is right, mean over the seeds, each with its interval.

    Frechet's are biased by the number of pictures: they are taken of each seed's set alone.

    Args:
        images: Of each seed, of the task's first prompts.
        truth: The unpruned model's from the same noise.
        task: Gives prompts and real pictures.
        judge: Gives features and verdicts.
    """
    real = judge.features(task.held_out_images)
    images, truth = ([_sized(some, task) for some in sets] for sets in (images, truth))
    labels = task.prompts(0, len(images[0]))[1]
    found: list[dict[str, Any]] = []
    for ours, theirs in zip(images, truth, strict=True):
        features, wanted = judge.features(ours), judge.features(theirs)
        found.append(
            {
                "frechet": frechet_distance(features, real),
                "frechet_to_truth": frechet_distance(features, wanted),
                "kernel": kernel_distance(features, real),
                "right": task.right(judge.head(features), labels),
            }
        )
    logits = [judge.head(judge.features(ours)) for ours in images]
    made: dict[str, Any] = {
        f"{name}_by_seed": [values[name] for values in found]
        for name in ("frechet", "frechet_to_truth", "kernel")
    }
    made |= {n.removesuffix("_by_seed"): sum(v) / len(v) for n, v in list(made.items())}
    for name in found[0]["right"]:
        values = [one["right"][name] for one in found]
        made[f"right_{name}_by_seed"] = values
        made[f"right_{name}"] = sum(values) / len(values)

    def right(chosen: Int[Tensor, " N"]) -> float:
        shares = [task.right(some[chosen], labels[chosen])["all"] for some in logits]
        return sum(shares) / len(shares)

    made["right_all_within"] = interval(right, len(labels))
    return made


def _sized(images: Float[Tensor, "N C H W"], task: DemoTask) -> Float[Tensor, "N C S S"]:
    """In the size that the judge knows."""
    size = task.image_size, task.image_size
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def on_front(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Which points no other beats: none costs at most as much and is better.

    >>> on_front([1.0, 2.0, 2.0, 3.0], [10.0, 20.0, 15.0, 18.0])
    [True, True, False, False]
    """
    pairs = list(zip(costs, values, strict=True))
    return [
        not any(
            other <= cost and better >= value and (other < cost or better > value)
            for other, better in pairs
        )
        for cost, value in pairs
    ]
