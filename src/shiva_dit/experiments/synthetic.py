"""The paper's synthetic checks as experiments: figure 6a, and what of 6b is defined."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from shiva_dit.core.estimators import gate
from shiva_dit.core.selection import select_top_k
from shiva_dit.core.soft_rank import inclusion_scores, soft_rank
from shiva_dit.experiments.plots import draw_synthetic
from shiva_dit.provenance import provenance, write_json

NUM_TOKENS, WIDTH, NUM_SIGNALS = 100, 16, 20
WARM_UP, STEPS = 100, 800
PENALTY = 0.1
EVERY = 5
"""Steps between the record's values."""
NUM_HISTOGRAM_BINS, HISTOGRAM_RANGE = 60, (0.4, 1.0)
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]


def rejected_path_loss(
    x: Float[Tensor, "S N D"], inclusion: Float[Tensor, "S N"], chosen: Bool[Tensor, "S N"]
) -> Float[Tensor, " S"]:
    """Information lost: the mean square of what was rejected, by the paper's estimator (Eq. 7)."""
    gated = gate(x, x, torch.where(chosen, inclusion, -inclusion))
    rejected = torch.where(chosen[..., None], 0.0, gated)
    return rejected.square().mean((1, 2))


def selected_path_loss(
    x: Float[Tensor, "S N D"], inclusion: Float[Tensor, "S N"], chosen: Bool[Tensor, "S N"]
) -> Float[Tensor, " S"]:
    """The same loss, judged along the path of the chosen tokens alone."""
    gated = gate(x, x, torch.where(chosen, inclusion, 0.0))
    selected = torch.where(chosen[..., None], gated, 0.0)
    return (x - selected).square().mean((1, 2))


def find_signals(
    num_seeds: int, loss_of: LossOf = rejected_path_loss, num_steps: int = STEPS
) -> tuple[Float[Tensor, "T S"], Float[Tensor, "T S"]]:
    """Figure 6a: 20 signal tokens (mean 10) among 80 of noise; k from 50, each token costs 0.1.

    Executed are ceil(k) tokens, tau_select falls from 0.1 to 0.05. One router and one k per
    seed, all in one batch: Adam and SGD work entry by entry.

    Returns:
        k and the share of signal tokens kept, of each (step, seed).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_seeds, NUM_TOKENS, WIDTH, generator=generator)
    draws = torch.rand(num_seeds, NUM_TOKENS, generator=generator)
    is_signal = draws.argsort(-1) < NUM_SIGNALS
    x[is_signal] += 10.0
    bound = WIDTH**-0.5  # as torch.nn.Linear starts
    draws = torch.rand(num_seeds, WIDTH, generator=generator)
    weight = ((2 * draws - 1) * bound).requires_grad_()
    k = torch.full((num_seeds, 1), 50.0, requires_grad=True)
    router_optimizer = torch.optim.Adam([weight], lr=0.1)
    k_optimizer = torch.optim.SGD([k], lr=2.0)
    counts, recalls = [], []
    for step in range(num_steps + 1):
        tau = 0.1 - 0.05 * step / STEPS
        scores = (x * weight[:, None]).sum(-1)
        chosen = torch.zeros(num_seeds, NUM_TOKENS, dtype=torch.bool)
        for seed, row in enumerate(scores.detach().split(1)):
            chosen[seed, select_top_k(row, math.ceil(float(k[seed].detach())))] = True
        counts.append(k.detach().flatten().clone())
        recalls.append((chosen & is_signal).sum(-1) / NUM_SIGNALS)
        # k - r = 0 - (r - k): the package takes one k for a batch, here there are several.
        inclusion = inclusion_scores(soft_rank(scores, 0.2) - k, 0.0, tau)
        router_optimizer.zero_grad()
        k_optimizer.zero_grad()
        (loss_of(x, inclusion, chosen).sum() + PENALTY * k.sum()).backward()
        router_optimizer.step()
        if step >= WARM_UP:
            k_optimizer.step()
            k.data.clamp_(1.0, float(NUM_TOKENS))
    return torch.stack(counts), torch.stack(recalls)


def path_cosines(trials: int = 1000) -> Float[Tensor, " trials"]:
    """Cosine of the one-path dL/dpi (Eq. 7) with the two-path one, all parts Gaussian.

    Where both paths' gradients are equally large it is sqrt(1/2) on average, at any k.
    """
    generator = torch.Generator().manual_seed(0)
    x, chosen_grad, rejected_grad = torch.randn(3, trials, NUM_TOKENS, WIDTH, generator=generator)
    on, off = (x * chosen_grad).sum(-1), (x * rejected_grad).sum(-1)
    chosen = torch.arange(NUM_TOKENS) < NUM_TOKENS // 2
    return F.cosine_similarity(torch.where(chosen, on, -off), on - off)


def chain_cosines(trials: int = 1000) -> Float[Tensor, " trials"]:
    """Cosine of dL/ds with the dL/dpi that it comes from: N = 64, k = 32, scores 0.3 randn.

    The map between them is positive semidefinite, so a positive cosine is no merit of an
    estimator.
    """
    generator = torch.Generator().manual_seed(0)
    scores = (0.3 * torch.randn(trials, 64, generator=generator)).requires_grad_()
    x, grad = torch.randn(2, trials, 64, WIDTH, generator=generator)
    upstream = (x * grad).sum(-1)
    inclusion_scores(soft_rank(scores, 0.2), 32.0, 0.1).backward(upstream)
    assert scores.grad is not None
    return F.cosine_similarity(scores.grad, upstream)


def run_synthetic(out: Path, num_seeds: int = 6) -> str:
    """Run all of it and write `synthetic.json` and `synthetic.png`; returns what to print."""
    out.mkdir(parents=True, exist_ok=True)
    k, recall = find_signals(num_seeds)
    lone_k, lone_recall = find_signals(num_seeds, selected_path_loss)
    cosines = {"one_path_with_two_path": path_cosines(), "scores_with_inclusion": chain_cosines()}
    record: dict[str, Any] = {
        "what": "synthetic",
        "every": EVERY,
        "k_by_step_and_seed": k[::EVERY].tolist(),
        "recall_by_step_and_seed": recall[::EVERY].tolist(),
        "control_k_by_step_and_seed": lone_k[::EVERY].tolist(),
        "control_recall_by_step_and_seed": lone_recall[::EVERY].tolist(),
        "late_recall_by_seed": recall[-200:].mean(0).tolist(),
        "cosines": {
            name: {
                "mean": float(c.mean()),
                "std": float(c.std()),
                "min": float(c.min()),
                "histogram": torch.histc(c, NUM_HISTOGRAM_BINS, *HISTOGRAM_RANGE).tolist(),
            }
            for name, c in cosines.items()
        },
        "provenance": provenance(),
    }
    record["histogram_range"] = HISTOGRAM_RANGE
    write_json(out / "synthetic.json", record)
    draw_synthetic(record, out / "synthetic.png")
    late = ", ".join(f"{value:.3f}" for value in record["late_recall_by_seed"])
    lines = [
        f"k at the end, by seed:      {', '.join(f'{v:.2f}' for v in k[-1].tolist())}",
        f"recall, last 200 steps:     {late}",
        f"control's k at the end:     {', '.join(f'{v:.2f}' for v in lone_k[-1].tolist())}",
    ]
    for name, found in record["cosines"].items():
        words = name.replace("_", " ")
        lines.append(f"cosine, {words}: {found['mean']:.3f} ± {found['std']:.3f}")
    return "\n".join([*lines, f"Plot: {out / 'synthetic.png'}"])
