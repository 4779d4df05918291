"""Which times and how many tokens each part of a batch gets (Eq. 15, 25-29)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shiva_dit.core.anchor import shifted_logits
from shiva_dit.core.budget import BudgetController, stratified, stratified_ratios
from shiva_dit.core.keep_table import nearest_bin
from shiva_dit.core.schedule import Schedule
from shiva_dit.core.selection import keep_count
from shiva_dit.methods.base import Reducer, Selector
from shiva_dit.methods.blocks import BlockReducer
from shiva_dit.modules.policy import AdaptiveRatioPolicy
from shiva_dit.training.experts import WHOLE, TimeShare
from shiva_dit.training.processes import Processes
from shiva_dit.training.recipe import StageName, TrainConfig


@dataclass(slots=True, kw_only=True)
class Part:
    """One micro-batch: its times, its counts, and k before rounding."""

    t: Float[Tensor, " b"]
    """Times in [0, 1]; where each sample has several, the first of all, then the next of all."""
    counts: tuple[int, ...]
    """k of every block."""
    soft_k: Sequence[Tensor | float]
    """k before rounding, with the policy's gradient where it learns."""

    def for_tokens(self, num_tokens: int, planned: int) -> Part:
        """The same shares of another number of tokens than it was planned for."""
        if num_tokens == planned:
            return self
        counts = tuple(keep_count(num_tokens, k / planned) for k in self.counts)
        soft_k = [k * (num_tokens / planned) for k in self.soft_k]
        return replace(self, counts=counts, soft_k=soft_k)


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """One optimizer step."""

    parts: list[Part]
    mean_keep_ratio: float
    """Executed mean over the table (policy on) or over the parts."""
    _ratios: Tensor | None = None
    _leaf: Tensor | None = None
    _budget: Tensor | None = None

    def sum(self, processes: Processes) -> None:
        """Add what the parts of all processes left at their ratios."""
        if self._leaf is not None:
            if self._leaf.grad is None:
                self._leaf.grad = torch.zeros_like(self._leaf)
            processes.sum([self._leaf.grad])

    def backward_policy(self) -> float:
        """Send what the parts left at their ratios, and the budget loss, into the policy.

        The parts' backward passes end at a leaf, so that each can free its own graph.

        Returns:
            The budget loss.
        """
        if self._ratios is None or self._leaf is None or self._budget is None:
            return 0.0
        upstream = self._leaf.grad if self._leaf.grad is not None else torch.zeros_like(self._leaf)
        torch.autograd.backward([self._ratios, self._budget], [upstream, None])
        return float(self._budget.detach())


class Planner:
    """Draws the plan of each step.

    Args:
        config: The recipe.
        num_tokens: N.
        policy: The ratio policy; unused where the recipe keeps the ratios fixed.
        fixed: The schedule executed where no policy is on. Its law says how much each time
            counts for the mean ratio.
        budget: Controller of the mean ratio.
        reducer: What runs on fewer tokens, where it says by itself how many.
        share: The times that are trained.
    """

    def __init__(
        self,
        config: TrainConfig,
        num_tokens: int,
        policy: AdaptiveRatioPolicy,
        fixed: Schedule,
        budget: BudgetController,
        reducer: Reducer | None = None,
        share: TimeShare = WHOLE,
    ) -> None:
        self.reducer, self.share = reducer, share
        self.config, self.num_tokens = config, num_tokens
        self.policy, self.budget = policy, budget
        self.full_blocks, self.law = fixed.full_blocks, fixed.law
        self.weights = fixed.law.weights(config.policy.num_bins)
        self.fixed = fixed.for_tokens(num_tokens)

    def step(self, stage: StageName, generator: torch.Generator) -> StepPlan:
        """The plan of one optimizer step in a stage."""
        keeps_all = self.config.method == "dense" or isinstance(self.reducer, BlockReducer)
        if keeps_all and (self.reducer is None or self.reducer.num_bins is None):
            counts = (self.num_tokens,) * self.policy.num_blocks
            return self._mixed_times([counts] * self.config.micro_batches, generator, 1.0)
        if self.reducer is not None and self.reducer.num_bins is not None:
            return self._in_bins(self.reducer, self.reducer.num_bins, generator)
        if stage == "warmup":
            return self._warmup(generator)
        if not self.config.learns_policy and self.config.policy.shape.time:
            return self._fixed_in_time(generator)
        if not self.config.learns_policy:
            # Rows of a fixed schedule differ by rounding at most: the law doesn't matter.
            rows = torch.randint(
                self.fixed.num_bins, (self.config.micro_batches,), generator=generator
            )
            counts = [self.fixed.counts[row] for row in rows.tolist()]
            return self._mixed_times(counts, generator, self.fixed.mean_keep_ratio)
        return self._by_policy(stage, generator)

    def _warmup(self, generator: torch.Generator) -> StepPlan:
        """Stratified ratios: one per part, the same in all blocks (section 8 of the method)."""
        low, high = self.config.warmup_ratios
        ratios = stratified_ratios(self.config.micro_batches, low, high, generator).tolist()
        counts = [
            tuple(
                self.num_tokens if b in self.full_blocks else keep_count(self.num_tokens, ratio)
                for b in range(self.policy.num_blocks)
            )
            for ratio in ratios
        ]
        prunable = self.policy.prunable_blocks
        kept = [row[b] / self.num_tokens for row in counts for b in prunable]
        return self._mixed_times(counts, generator, sum(kept) / len(kept))

    def _mixed_times(
        self, counts: Sequence[tuple[int, ...]], generator: torch.Generator, mean: float
    ) -> StepPlan:
        """Counts that don't depend on time: each part covers all strata alike."""
        size = self.config.batch_size
        t = self._times(size, generator)
        times = self.config.times_per_sample  # those of a sample lie in strata of their own
        order = [torch.randperm(size // times, generator=generator) for _ in range(times)]
        mixed = torch.stack([p[o] for p, o in zip(t.view(times, -1), order, strict=True)])
        parts = [
            Part(t=own.flatten(), counts=row, soft_k=[float(k) for k in row])
            for own, row in zip(mixed.chunk(len(counts), dim=1), counts, strict=True)
        ]
        return StepPlan(parts=parts, mean_keep_ratio=mean)

    def _by_policy(self, stage: StageName, generator: torch.Generator) -> StepPlan:
        """Counts by the policy: one time bin per part, neighbouring times in one part.

        The strata of the whole batch are cut into parts in order of time, and a part keeps what
        the policy says at the time of one of its samples, drawn by chance: every bin is then
        visited alike. (A part's middle would not do: the policy would keep more where it is looked
        at, and less between.) With `shared_bin` all samples of a part move into that bin.

        The budget regulates the mean over the whole table of what would be executed, without
        exploration noise or a moved anchor: a fixed grid of t, not the batch. Each bin counts by
        the density of the sampler's steps there (the law), since that is what tokens cost. The
        losses don't: what errors do to a sample is their integral over t, whose steps are the
        longer the rarer they are.
        """
        num_bins, num_parts = self.config.policy.num_bins, self.config.micro_batches
        device = self.policy.anchor.device
        grid = (torch.arange(num_bins, device=device) + 0.5) / num_bins
        ratios = self.policy(grid)  # (S, L)
        if not bool(((ratios > 0) & (ratios <= 1)).all()):
            raise FloatingPointError("the policy's keep ratios have left (0, 1]")
        prunable = list(self.policy.prunable_blocks)
        schedule = Schedule.from_ratios(ratios.tolist(), self.full_blocks, self.law)
        table = schedule.for_tokens(self.num_tokens)
        soft_mean = (ratios.new_tensor(self.weights) * ratios[:, prunable].mean(1)).mean()
        executed = table.mean_keep_ratio + (soft_mean - soft_mean.detach())
        times, leaders = self._led_times(generator)
        bins = torch.tensor([nearest_bin(t, num_bins) for t in leaders.flatten().tolist()])
        if self.config.shared_bin:
            jitter = torch.rand(times.shape, generator=generator)
            times = self.share.within((bins[:, None] + jitter) / num_bins)
        moved = self._moved(stage, grid, bins.to(device), generator)  # (M, L)
        if moved is not None:
            picked = moved
            counts = [tuple(keep_count(self.num_tokens, r) for r in row) for row in picked.tolist()]
        else:
            picked = ratios[bins.to(device)]
            counts = [table.row(t) for t in leaders.flatten().tolist()]
        leaf = picked.detach().requires_grad_()
        parts = [
            Part(
                t=times[m],
                counts=counts[m],
                soft_k=list((leaf[m] * self.num_tokens).unbind()),
            )
            for m in range(num_parts)
        ]
        return StepPlan(
            parts=parts,
            mean_keep_ratio=table.mean_keep_ratio,
            _ratios=picked,
            _leaf=leaf,
            _budget=self.budget.loss(executed),
        )

    def _moved(
        self,
        stage: StageName,
        grid: Float[Tensor, " S"],
        bins: Int[Tensor, " M"],
        generator: torch.Generator,
    ) -> Float[Tensor, "M L"] | None:
        """Ratios of each part where they aren't the table's: explored (Eq. 29), or at a target."""
        policy, num_parts = self.config.policy, len(bins)
        if stage == "policy" and policy.logit_noise:
            noise = torch.randn((num_parts, self.policy.num_blocks), generator=generator)
            return self.policy(grid[bins], policy.logit_noise * noise.to(grid))
        if stage != "joint" or policy.target_range is None:
            return None
        rows = []
        low, high = policy.target_range
        costs = stratified_ratios(num_parts, low / high, 1.0, generator)  # evenly in 1 / ratio
        targets = (low / costs).tolist()
        for target, row in zip(targets, bins.tolist(), strict=True):
            logits = self.policy.logits(grid, target)
            rows.append(shifted_logits(logits, target, self.full_blocks, self.weights)[row])
        return self.policy.ratios(torch.stack(rows))

    def _fixed_in_time(self, generator: torch.Generator) -> StepPlan:
        """Counts of a fixed schedule that varies with time, drawn as the policy's are."""
        times, leaders = self._led_times(generator)
        rows = [self.fixed.row(t) for t in leaders.flatten().tolist()]
        parts = [
            Part(t=t, counts=row, soft_k=[float(k) for k in row])
            for t, row in zip(times, rows, strict=True)
        ]
        return StepPlan(parts=parts, mean_keep_ratio=self.fixed.mean_keep_ratio)

    def _in_bins(self, reducer: Reducer, num_bins: int, generator: torch.Generator) -> StepPlan:
        """One time bin of the method's own for each part: others move into that of one of them."""
        times, leaders = self._led_times(generator)
        of_each = (times * num_bins).long().clamp(max=num_bins - 1)
        bins = (leaders * num_bins).long().clamp(max=num_bins - 1)
        jitter = torch.rand(times.shape, generator=generator)
        moved = self.share.within((bins + jitter) / num_bins)
        times = torch.where(of_each == bins, times, moved)
        learned = reducer.learned_schedule(self.law) if isinstance(reducer, Selector) else None
        counts = (self.num_tokens,) * self.policy.num_blocks
        parts = [Part(t=t, counts=counts, soft_k=[float(k) for k in counts]) for t in times]
        mean = 1.0 if learned is None else learned.mean_keep_ratio
        return StepPlan(parts=parts, mean_keep_ratio=mean)

    def _led_times(
        self, generator: torch.Generator
    ) -> tuple[Float[Tensor, "M b"], Float[Tensor, "M 1"]]:
        """Times of each part in order, and the one of its samples whose bin gives its counts."""
        num_parts = self.config.micro_batches
        if self.config.time_sampling == "sampler":
            leaders = self._times(num_parts, generator)[:, None]
            return leaders.expand(-1, self.config.batch_size // num_parts), leaders
        times = self._times(self.config.batch_size, generator).view(num_parts, -1)
        picked = torch.randint(times.shape[1], (num_parts, 1), generator=generator)
        return times, times.gather(1, picked)

    def _times(self, count: int, generator: torch.Generator) -> Float[Tensor, " S"]:
        strata = stratified(count, generator)
        if self.config.time_sampling == "sampler":
            return self.law.at(strata)
        if self.config.time_sampling == "uniform":
            return self.share.at(strata)
        return self.share.logit_normal(strata)
