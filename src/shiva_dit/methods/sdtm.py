"""Structure-then-detail token merging (Fang et al. 2025, arXiv 2505.11707), from its formulas.

Early steps merge whole cells whose tokens are alike, around attention and feed-forward; late ones
merge single tokens, around the feed-forward. What merged tokens get is mixed with what the module
gave them at the last step that ran on all tokens. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.selection import keep_count
from shiva_dit.methods.base import Need, Reducer, Site, Where
from shiva_dit.methods.matching import cells, draws, merged, merged_cells
from shiva_dit.methods.plans import CachedPlan, FillPlan, Plan

CELL = (2, 2)


class SDTM(Reducer):
    r"""Merges cells in early steps and single tokens in late ones, fewer from step to step.

    The share that step s of S merges falls from rho + d to rho - d, rho = 1 - keep_ratio,

    .. math:: \rho(s) = (\rho - d) + 2 d \cos(\pi s / 2 (S - 1)),

    rounded to one of a few levels, that the run has few sizes.

    Args:
        keep_ratio: 1 - rho, at least 1/4.
        sites: Around which modules; attention is merged in early steps alone.
        deviation: d; less where shares would leave [0, 3/4].
        switch: The share of the steps that are early.
        refresh: Every which step runs on all tokens and is remembered; None for no such steps, and
            no mixing either.
        weight: Of a group's output in the mixture; the rest is what is remembered.
        age_weight: Of how long tokens have been merged, to the mean of all, beside similarity.
        levels: How many shares there are, at least 2.
        seed: Of the draws between destinations of one age.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs: tuple[Need, ...] = ("steps",)

    def __init__(
        self,
        keep_ratio: float = 0.7,
        *,
        sites: Sequence[Site] = ("attention", "feed_forward"),
        deviation: float = 0.2,
        switch: float = 0.4,
        refresh: int | None = 3,
        weight: float = 0.1,
        age_weight: float = 0.05,
        levels: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0.25 <= keep_ratio <= 1.0:
            raise ValueError(
                "keep_ratio must lie in [1/4, 1] (one token of each cell of 2 x 2 stays), got "
                f"{keep_ratio}: it is the share KEPT."
            )
        if levels < 2 or (refresh is not None and refresh < 2):
            raise ValueError(f"levels and refresh must be 2 at least, got {levels}, {refresh}.")
        self.keep_ratio, self.sites, self.seed = keep_ratio, tuple(sites), seed
        self.switch, self.refresh, self.weight = switch, refresh, weight
        self.age_weight, self.levels = age_weight, levels
        self.deviation = max(0.0, min(deviation, 1 - keep_ratio, keep_ratio - 0.25))

    def count(self, num_tokens: int) -> int:
        """Tokens left by the share in the middle; `merged_share` says that of a step."""
        return keep_count(num_tokens, self.keep_ratio)

    def seeded(self, seed: int) -> SDTM:
        """Another one with these settings."""
        other = copy(self)
        other.seed = seed
        return other

    def merged_share(self, step: int, num_steps: int) -> float:
        """The share of the tokens that a step merges."""
        fallen = 1 - math.cos(math.pi * step / (2 * max(1, num_steps - 1)))
        level = round(fallen * (self.levels - 1)) / (self.levels - 1)
        return 1 - self.keep_ratio + self.deviation * (1 - 2 * level)

    def plan(self, x: Float[Tensor, "B N D"], where: Where) -> Plan | None:
        """One matching per block, by what the first of its modules is called with.

        Raises:
            ValueError: If nothing says what the step or the image's grid is.
        """
        memory, step, num_steps = where.memory, where.step, where.num_steps
        if self.count(x.shape[1]) == x.shape[1]:
            return None
        if memory is None or step is None or num_steps is None or where.grid is None:
            raise ValueError("SDTM goes by the steps of a run on a grid, and they aren't known.")
        is_early, key = step <= self.switch * num_steps, (where.block, where.place)
        if not is_early and where.site != "feed_forward":
            memory.pop(key, None)
        acts = is_early or where.site == "feed_forward"
        if self.refresh is not None and step % self.refresh == 0:
            return FillPlan(memory, key) if acts else None
        at, plan = memory.get(where.block, (None, None))
        if at != step:
            plan = self._match(x, where, self.merged_share(step, num_steps), is_early)
            memory[where.block] = step, plan
        if plan is None or not acts or self.refresh is None:
            return plan if acts else None
        cache = memory.get(key)
        return FillPlan(memory, key) if cache is None else replace(plan, cache=cache)

    @torch.no_grad()
    def _match(
        self, x: Float[Tensor, "B N D"], where: Where, share: float, is_early: bool
    ) -> CachedPlan | None:
        assert where.memory is not None
        assert where.grid is not None
        num_tokens = x.shape[1]
        num_merged = num_tokens - keep_count(num_tokens, 1 - share)
        members = cells(where.grid, CELL, x.device)
        if not num_merged // (3 if is_early else 1):
            return None
        ages = where.memory.get((where.block, "ages"))
        if ages is None:
            ages = x.new_zeros(x.shape[:2], dtype=torch.float32)
        bonus = self.age_weight * ages / ages.mean(dim=1, keepdim=True).clamp_min(1e-6)
        if is_early:
            num_groups = num_merged // 3
            plan = merged_cells(x, members, num_groups, bonus)
        else:
            num_groups = len(members)
            chance = draws(num_tokens, self.seed, where, x.device) / 2**44  # in [-1/2, 1/2)
            oldest = (ages + chance)[:, members].argmax(dim=-1, keepdim=True)  # (B, M, 1)
            places = members.expand(len(x), -1, -1).gather(2, oldest).squeeze(-1)
            plan = merged(x, places, num_merged, bonus)
        together = plan.group >= plan.k - num_groups
        where.memory[where.block, "ages"] = torch.where(together, ages + 1, 0.0)
        return CachedPlan(plan.group, plan.k, together, self.weight)
