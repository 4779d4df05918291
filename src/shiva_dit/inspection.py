"""The flip test: what each estimator says of a token, against what flipping it really does.

A token's *true effect* at a block is the loss with it chosen minus the loss with it rejected, all
other choices, in this block and the others, held as they are: two forwards and no gradient.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from shiva_dit.api.state import disabled
from shiva_dit.config import LARGEST_SEED, check_types, whole_number
from shiva_dit.core.agreement import sign_agreement, spearman
from shiva_dit.core.estimators import EstimatorConfig
from shiva_dit.core.selection import select_top_k
from shiva_dit.core.soft_rank import inclusion_scores, soft_rank, standardize
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.features import record_blocks
from shiva_dit.models.gating import GatedForward
from shiva_dit.training.by_role import without_references
from shiva_dit.training.data import TrainingData, repeated
from shiva_dit.training.paths import path_of

ESTIMATORS: dict[str, EstimatorConfig] = {
    "paper": EstimatorConfig(kind="paper"),
    **{
        f"{rejected}{', KV' if kv else ''}": EstimatorConfig(rejected=rejected, kv_gate=kv)
        for rejected in ("none", "mean", "ridge", "teacher")
        for kv in (False, True)
    },
}
"""All estimators by name: "paper", and "residual" with each treatment of rejected tokens."""
SCORES = "the scores themselves"
"""Beside the estimators: the order in which the attached selector itself puts the tokens."""
GROUPS = ("all", "selected", "rejected")
PLAIN = EstimatorConfig(rejected="none", kv_gate=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipConfig:
    """How much is flipped."""

    images: int = 24
    """Samples, each at its own time: the middles of as many equal strata of [0, 1]."""
    tokens: int = 0
    """Tokens flipped per sample and block, drawn by chance; 0 flips all."""
    loss: Literal["output", "diffusion"] = "output"
    """"output": squared error to the unpruned model's prediction. "diffusion": to the data's
    velocity, as noisy as that is."""
    tau_rank: float = 0.2
    """Temperature of the soft ranks, for dL/dk alone; in standard deviations of the scores."""
    tau_select: float = 0.1
    """Temperature of the inclusion scores, for dL/dk alone; as a share of N."""
    batch_size: int = 64
    """Flips per forward."""
    seed: int = 0
    """Of samples, noise and flipped tokens."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("seed", self.seed, least=0, most=LARGEST_SEED)
        for name in ("images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.tokens and self.tokens < 8:
            raise ValueError(f"tokens must be 0 (all) or at least 8, got {self.tokens}.")
        if min(self.tau_rank, self.tau_select) <= 0:
            raise ValueError("tau_rank and tau_select must be positive.")


@dataclass(slots=True, kw_only=True)
class _Held(SelectionGates):
    """Gates whose choice is given, and whose inclusion scores are the leaves to be judged."""

    held: Int[Tensor, "B k"] | None = None
    scores: Float[Tensor, "B N"] | None = field(default=None, init=False)

    def choose(self, scores: Float[Tensor, "B N"], k: int) -> Int[Tensor, "B k"]:
        self.scores = scores.detach()
        self.chosen = select_top_k(self.scores, k) if self.held is None else self.held
        self.inclusion = torch.zeros_like(self.scores, requires_grad=True)
        self.values_gated = 0
        return self.chosen

    def learn(self, scores: Float[Tensor, "B N"]) -> None:
        """Nothing learns."""

    def value(self, value: Float[Tensor, "B k D"]) -> Float[Tensor, "B k D"]:
        # The hooks are on for all estimators, also for those without a KV gate.
        return SelectionGates.value(self, value) if self.config.needs_value_gate else value


def flips(
    attachment: Attachment,
    data: TrainingData,
    config: FlipConfig | None = None,
    *,
    scheduler: Any = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Run the flip test on a model with an adapter (or any selector) attached.

    Args:
        attachment: From `shiva_dit.models.attach.attachment_of(transformer)`.
        data: Samples with their conditioning.
        config: How much is flipped.
        scheduler: That of the model's pipeline; for a diffusion schedule (PixArt, DiT) alone.
        show_progress: Whether a bar counts samples and blocks.

    Returns:
        A plain record. Per estimator and group of tokens (all, selected, rejected): Spearman
        correlation of its dL/dpi with the true effects, mean over samples and blocks and by block,
        and the share of right signs. Then dL/dk against finite differences. None: nothing is said.
    """
    config = config or FlipConfig()
    run = _FlipTest(attachment, data, config, scheduler)
    blocks = attachment.schedule.prunable_blocks
    total = config.images * len(blocks)
    bar = tqdm(total=total, desc="flips", unit="block", disable=not show_progress)
    with bar, attachment.values_gated():
        for index in range(config.images):
            for _ in run.sample(index):
                bar.update()
    return run.record()


class _FlipTest:
    def __init__(
        self,
        attachment: Attachment,
        data: TrainingData,
        config: FlipConfig,
        scheduler: Any = None,
    ) -> None:
        self.path = path_of(attachment.spec, scheduler)
        self.attachment, self.data, self.config = attachment, data, config
        weight = next(attachment.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.generator = torch.Generator().manual_seed(config.seed)
        self.order = torch.randperm(len(data), generator=self.generator)
        self.found: dict[tuple[str, str, int], list[tuple[float | None, float | None]]] = {}
        self.slopes: dict[str, list[tuple[float, float]]] = {}

    def sample(self, index: int) -> Iterator[None]:
        """All flips of one sample; yields after each block."""
        self._prepare(index)
        with torch.no_grad():
            as_is, watched = self._run({})
        self.as_is = float(as_is)
        self.chosen = {b: g.chosen for b, g in watched.items() if g.chosen is not None}
        scores = {b: g.scores for b, g in watched.items() if g.scores is not None}
        said = {name: self._slopes_of(estimator) for name, estimator in ESTIMATORS.items()}
        for block in self.attachment.schedule.prunable_blocks:
            num_tokens = scores[block].shape[1]
            selected = torch.zeros(num_tokens, dtype=torch.bool, device=self.device)
            selected[self.chosen[block][0]] = True
            tokens, effects = self._true_effects(block, selected)
            for name, slopes in said.items():
                self._compare(name, block, slopes[block], tokens, effects, selected)
            self._compare(SCORES, block, -scores[block][0], tokens, effects, selected)
            self._compare_k(block, scores[block], {n: s[block] for n, s in said.items()})
            yield

    def _prepare(self, index: int) -> None:
        """Arguments of a sample at its time, the target of the loss, the teacher's updates."""
        t = (index + 0.5) / self.config.images
        picked = self.order[index % len(self.order)].view(1)
        batch = without_references(self.data.batch(picked, self.generator)).to(self.device)
        self.batch = batch
        noise = torch.randn(batch.latents.shape, generator=self.generator).to(self.device)
        times = torch.full((1,), t, device=self.device)
        spec = self.attachment.spec
        noisy = self.path.noisy(batch.latents, noise, times)
        self.noisy, self.times = noisy, self.path.timestep(times)
        num_tokens = self.num_tokens = spec.tokens(self.attachment.model, batch.latents)
        self.counts = self.attachment.counts.table(num_tokens).row(t)
        blocks = self.attachment.schedule.prunable_blocks
        with (
            torch.no_grad(),
            disabled(self.attachment.model),
            record_blocks(
                self.attachment.model, inputs=blocks, outputs=blocks, num_tokens=num_tokens
            ) as self.teacher,
        ):
            self.target = self._prediction()
        if self.config.loss == "diffusion":
            self.target = self.path.target(batch.latents, noise, times)

    def _prediction(self, copies: int = 1) -> Tensor:
        """What the model predicts of so many copies of the sample."""
        spec = self.attachment.spec
        batch, noisy = repeated(self.batch, copies, self.noisy)
        given = spec.arguments_of(noisy, batch.given(self.dtype))
        times = spec.times(self.times.expand(copies))
        output = self.attachment.model(**given, **times, return_dict=False)
        return self.path.prediction(output, self.num_tokens)

    def _run(
        self,
        held: Mapping[int, Tensor],
        estimator: EstimatorConfig = PLAIN,
        counts: Sequence[int] | None = None,
        copies: int = 1,
    ) -> tuple[Float[Tensor, " B"], dict[int, _Held]]:
        """Loss of each copy of the sample with given choices, and the gates of each block."""
        gates: dict[int, _Held] = {}

        def make(block: int) -> _Held:
            update = self.teacher.update(block) if estimator.needs_teacher else None
            gates[block] = _Held(
                config=estimator,
                tau_rank=1.0,
                tau_select=1.0,
                soft_k=0.0,
                teacher_update=update,
                held=held.get(block),
            )
            return gates[block]

        with self.attachment.forwards.gated(GatedForward(counts=counts or self.counts, gates=make)):
            prediction = self._prediction(copies)[:, : self.target.shape[1]]
        error = (prediction.float() - self.target.float()).square().flatten(1).mean(1)
        return error, gates

    def _slopes_of(self, estimator: EstimatorConfig) -> dict[int, Float[Tensor, " N"]]:
        """dL/dpi of every token in every block, as an estimator has it."""
        loss, gates = self._run(self.chosen, estimator)
        leaves = [gate.inclusion for gate in gates.values()]
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)  # type: ignore[arg-type]
        return {
            block: torch.zeros_like(leaf[0]) if grad is None else grad[0]
            for (block, leaf), grad in zip(zip(gates, leaves, strict=True), grads, strict=True)
            if leaf is not None
        }

    @torch.no_grad()
    def _true_effects(
        self, block: int, selected: Bool[Tensor, " N"]
    ) -> tuple[Int[Tensor, " M"], Float[Tensor, " M"]]:
        """Flipped tokens, and the loss with each chosen minus the loss with it rejected."""
        tokens = torch.randperm(len(selected), generator=self.generator).to(self.device)
        if self.config.tokens:
            tokens = tokens[: self.config.tokens]
        if int(selected.sum()) == 1:  # the last one can't be taken away
            tokens = tokens[~selected[tokens]]
        effects = torch.zeros(len(tokens), device=self.device)
        for on in (True, False):
            places = (selected[tokens] == on).nonzero().flatten()
            for start in range(0, len(places), self.config.batch_size):
                part = places[start : start + self.config.batch_size]
                rows = selected.repeat(len(part), 1)
                rows[torch.arange(len(part)), tokens[part]] = not on
                sets = rows.nonzero()[:, 1].view(len(part), -1)  # (b, k -+ 1), ascending
                losses = self._with_choice(block, sets)
                effects[part] = self.as_is - losses if on else losses - self.as_is
        return tokens, effects

    def _with_choice(self, block: int, sets: Int[Tensor, "b k"]) -> Float[Tensor, " b"]:
        """Losses with other choices in one block."""
        copies = len(sets)
        held = {b: c.expand(copies, -1) for b, c in self.chosen.items()}
        held[block] = sets
        counts = [sets.shape[1] if b == block else k for b, k in enumerate(self.counts)]
        return self._run(held, counts=counts, copies=copies)[0]

    def _compare(
        self,
        name: str,
        block: int,
        slopes: Float[Tensor, " N"],
        tokens: Int[Tensor, " M"],
        effects: Float[Tensor, " M"],
        selected: Bool[Tensor, " N"],
    ) -> None:
        ours, on = slopes[tokens], selected[tokens]
        for group, members in zip(GROUPS, (torch.ones_like(on), on, ~on), strict=True):
            pair = ours[members].double(), effects[members].double()
            values = spearman(*pair), None if name == SCORES else sign_agreement(*pair)
            self.found.setdefault((name, group, block), []).append(values)

    def _compare_k(
        self, block: int, scores: Float[Tensor, "1 N"], slopes: Mapping[str, Tensor]
    ) -> None:
        """Central difference of the loss in k against sum_i dL/dpi_i dpi_i/dk (Eq. 24)."""
        k, num_tokens = self.counts[block], scores.shape[1]
        step = min(max(1, num_tokens // 16), k - 1, num_tokens - k)
        if step < 1:
            return
        with torch.no_grad():
            high, low = (
                float(self._with_choice(block, select_top_k(scores, k + change)))
                for change in (step, -step)
            )
        soft_k = torch.tensor(float(k), device=scores.device, requires_grad=True)
        ranks = soft_rank(standardize(scores), self.config.tau_rank)
        inclusion = inclusion_scores(ranks, soft_k, self.config.tau_select)
        for name, slope in slopes.items():
            (said,) = torch.autograd.grad(
                inclusion, soft_k, slope.view(1, -1).to(inclusion), retain_graph=True
            )
            true = (high - low) / (2 * step)
            self.slopes.setdefault(name, []).append((float(said), true))

    def record(self) -> dict[str, Any]:
        """All means as plain data."""
        blocks = self.attachment.schedule.prunable_blocks
        names = [*ESTIMATORS, SCORES]
        return {
            "estimators": {
                name: {group: self._group(name, group, blocks) for group in GROUPS}
                for name in names
            },
            "budget": {name: _budget(pairs) for name, pairs in self.slopes.items()},
            "blocks": list(blocks),
            "keep_ratio": self.attachment.schedule.mean_keep_ratio,
        }

    def _group(self, name: str, group: str, blocks: Sequence[int]) -> dict[str, Any]:
        by_block = [self.found.get((name, group, block), []) for block in blocks]
        cells = [cell for found in by_block for cell in found]
        return {
            "spearman": _mean([s for s, _ in cells]),
            "spearman_by_block": [_mean([s for s, _ in found]) for found in by_block],
            "sign": _mean([a for _, a in cells]),
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _budget(pairs: Sequence[tuple[float, float]]) -> dict[str, float | int | None]:
    """How dL/dk agrees with finite differences: sign, and size where the truth isn't 0."""
    ratios = [said / true for said, true in pairs if true]
    return {
        "cells": len(pairs),
        "sign": statistics.fmean(float(said * true > 0) for said, true in pairs),
        "median_of_estimate_over_truth": statistics.median(ratios) if ratios else None,
        "share_of_truths_below_0": statistics.fmean(float(true < 0) for _, true in pairs),
    }
