"""From outcomes to rows of a record: means over seeds, and every seed's value."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from shiva_dit.demo.judge import Judge
from shiva_dit.experiments.contestants import Outcome
from shiva_dit.experiments.scoring import distance_between
from shiva_dit.metrics import psnr


def measure(outcome: Outcome, reference: Outcome | None, judge: Judge | None) -> dict[str, float]:
    """All numbers of one outcome.

    Args:
        outcome: What is measured.
        reference: The unpruned model's, from the same noise (`contest.reference`); None if this is
            it.
        judge: Gives the features of distances; None leaves them out.
    """
    score = outcome.score
    values = (
        {}
        if score is None
        else {
            "correct": score.right["all"],
            **{f"right_{name}": share for name, share in score.right.items() if name != "all"},
            "frechet": score.frechet,
            "kernel": score.kernel,
        }
    )
    values |= {
        "flops": outcome.flops,
        "keep_ratio": outcome.keep_ratio,
        "train_cpu_s": outcome.train_s,
        "sample_cpu_s": outcome.sample_s,
    }
    if outcome.held_out.error is not None:
        values["held_out_error"] = outcome.held_out.error
    if outcome.held_out.cosine is not None:
        values["held_out_cosine"] = outcome.held_out.cosine
    if outcome.held_out.ink_kept is not None:
        values["ink_kept"] = outcome.held_out.ink_kept
    if reference is not None:
        if not torch.equal(outcome.images, reference.images):  # of equal images it is infinite
            values["psnr"] = psnr(outcome.images, reference.images)
        if judge is not None:
            values["frechet_to_dense"] = distance_between(judge, outcome.images, reference.images)
    return values


def row(
    key: str,
    name: str,
    outcomes: Sequence[Outcome],
    references: Sequence[Outcome] | None,
    judge: Judge | None,
) -> dict[str, Any]:
    """One contestant's row: `x` is the mean over seeds of what `x_by_seed` lists.

    What isn't there for every seed is left out; without outcomes (it diverged) that is everything.
    """
    twins = references if references is not None else [None] * len(outcomes)
    by_seed = [measure(o, twin, judge) for o, twin in zip(outcomes, twins, strict=True)]
    made: dict[str, Any] = {"method": key, "name": name}
    names = by_seed[0] if by_seed else {}
    shared = [name for name in names if all(name in found for found in by_seed)]
    for measured in shared:
        values = [found[measured] for found in by_seed]
        made[measured] = statistics.fmean(values)
        made[f"{measured}_by_seed"] = values
    return made
