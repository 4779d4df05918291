"""How many tokens each block keeps in a forward: by the schedule, the time and N."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiva_dit.core.keep_table import KeepTable
from shiva_dit.core.roles import REFERENCE, TARGET, Span, grouped, num_of, roles_in
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.clock import Clock, Run
from shiva_dit.models.families import model_spec
from shiva_dit.models.plan import ForwardPlan, Grouping, make_plan
from shiva_dit.models.references import References

logger = logging.getLogger("shiva_dit")

TABLES = 64
"""Tables kept for runs to come; all are forgotten when there are more."""
PLANS = 256
"""Plans kept, likewise."""
MISSED = 5e-3
"""A mean that is off by more than this share of what was asked is told."""


class Counts:
    """k of every block of one model, as integers that are known before the forward.

    Args:
        model: A supported transformer.
        schedule: Keep ratios for its blocks.
        multiple: k is a multiple of this; see `Schedule.for_tokens`.
        segments: At most so many different rows over time.
        select_every: So many prunable blocks in a row share their first one's scores.
        reference_keep_ratio: Share kept of the tokens of references in every prunable block, in
            [0, 1]; the schedule is then the target's alone. None: all tokens share one budget.
        clock: Knows times without reading them, and the steps of a run.

    Raises:
        ValueError: If the schedule is another model's, or a number lies outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        multiple: int | None = None,
        segments: int | None = None,
        select_every: int = 1,
        reference_keep_ratio: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        if multiple is not None and multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}.")
        if select_every < 1:
            raise ValueError(f"select_every must be at least 1, got {select_every}.")
        if segments is not None and segments < 1:
            raise ValueError(f"segments must be at least 1, got {segments}.")
        self.model, self.spec = model, model_spec(model)
        self.multiple, self.segments, self.select_every = multiple, segments, select_every
        self.references = (
            None
            if reference_keep_ratio is None
            else References(model, self.spec, reference_keep_ratio)
        )
        """Which tokens are those of references, and how many of them are kept."""
        self.clock = clock
        self.use(schedule)

    def use(self, schedule: Schedule) -> None:
        """Keep other ratios from the next forward on."""
        name, num_blocks = type(self.model).__name__, len(self.spec.blocks(self.model))
        if schedule.num_blocks != num_blocks:
            raise ValueError(
                f"the schedule is for {schedule.num_blocks} blocks, {name} has {num_blocks}: it "
                "was made for another model."
            )
        asked = set(self.spec.full_blocks(self.model)).difference(schedule.full_blocks)
        if asked:
            raise ValueError(
                f"blocks {sorted(asked)} of {name} change tokens that they aren't given, so they "
                "can't be pruned: name them in the schedule's full_blocks."
            )
        self.schedule = schedule
        self._tables: dict[tuple[int, Run | None], KeepTable] = {}
        self._plans: dict[tuple[Any, ...], ForwardPlan] = {}
        self._reference_rows: dict[int, tuple[int, ...]] = {}
        self._told = False
        prunable = schedule.prunable_blocks
        self.prunable = [block in prunable for block in range(num_blocks)]
        """Of each block, whether it may be pruned."""
        every = self.select_every
        self._first = {b: prunable[place - place % every] for place, b in enumerate(prunable)}

    def table(self, num_tokens: int, run: Run | None = None) -> KeepTable:
        """The integers executed for N image tokens.

        Args:
            num_tokens: N.
            run: The times of a run's steps; without them, by the density of the schedule's law.
        """
        key = num_tokens, run
        if key not in self._tables:
            if len(self._tables) >= TABLES:
                self._tables.clear()
            table = self._tables[key] = self._made(num_tokens, run)
            if run is not None or self.clock is None or table.is_constant:  # it will be executed
                self._tell_missed(table)
        return self._tables[key]

    def _made(self, num_tokens: int, run: Run | None) -> KeepTable:
        rounding = {"multiple": self.multiple, "segments": self.segments}
        if run is None:
            return self.schedule.for_tokens(num_tokens, **rounding)
        same = self.table(num_tokens)
        if same.is_constant:  # whatever the steps are, and no forward asks for them then
            return same
        return self.schedule.for_steps(run, num_tokens, **rounding)

    def row(self, num_tokens: int, timestep: Tensor | float) -> tuple[int, ...]:
        """Every block's k, by the time; that is read from the device if nobody else knows it."""
        table = self.table(num_tokens)
        if table.is_constant:  # whatever the steps are
            return table.counts[0]
        run, times = self._look(torch.as_tensor(timestep))
        if run is not None:
            table = self.table(num_tokens, run)
        else:
            self._tell_law()
        rows = {table.row(t) for t in times}
        if len(rows) > 1:
            raise ValueError(
                f"the samples of one forward must share their time bin, so that they keep equally "
                f"many tokens; got times {sorted(set(times))}. Split the batch by timestep."
            )
        return rows.pop()

    @property
    def running(self) -> object:
        """What the forwards of one run share and no other's do; None if nothing is known of it."""
        return None if self.clock is None else self.clock.times.running

    def _look(self, timestep: Tensor) -> tuple[Run | None, list[float]]:
        if self.clock is not None:
            return self.clock.look(timestep, self.spec.time)
        return None, [self.spec.time(step) for step in timestep.flatten().tolist()]

    def _tell_missed(self, table: KeepTable) -> None:
        asked, executed = self.schedule.mean_keep_ratio, table.mean_keep_ratio
        if abs(executed - asked) > MISSED * asked:
            logger.warning(
                "shiva_dit: %.1f%% of %d tokens are kept on average, %.1f%% were asked for: so few "
                "steps and blocks round no nearer with multiple = %s and segments = %s.",
                *(100 * executed, table.num_tokens, 100 * asked, self.multiple, self.segments),
            )

    def _tell_law(self) -> None:
        if not self._told and len(set(self.schedule.ratios)) > 1:  # else it's the same by any law
            self._told = True
            logger.warning(
                "shiva_dit: the steps of the run are not known: tokens are budgeted by the density "
                "of %s steps. apply(..., timesteps=) makes the mean exact for a list.",
                self.schedule.law.name,
            )

    def reference_row(self, num_tokens: int) -> tuple[int, ...]:
        """Every block's k of references that have so many tokens together, whatever the time.

        Rounded as the schedule is; over blocks their mean is the ratio. None is left without any.
        """
        assert self.references is not None
        known = self._reference_rows.get(num_tokens)
        if known is None and not self.references.keep_ratio:
            none = tuple(0 if may else num_tokens for may in self.prunable)
            known = self._reference_rows[num_tokens] = none
        if known is None:
            flat = Schedule.uniform(
                self.references.keep_ratio,
                num_blocks=self.schedule.num_blocks,
                full_blocks=self.schedule.full_blocks,
            )
            table = flat.for_tokens(num_tokens, multiple=self.multiple, segments=1)
            known = self._reference_rows[num_tokens] = table.counts[0]
        return known

    def by_role(
        self, counts: Sequence[int], spans: Sequence[Span]
    ) -> tuple[tuple[int, ...], Grouping]:
        """Every block's k of all tokens together, and of each group.

        Args:
            counts: Every block's k of the target's tokens.
            spans: Of all tokens; empty where they share one budget.
        """
        if not spans:
            return tuple(counts), ()
        roles = roles_in(spans)
        rows = {TARGET: tuple(counts), REFERENCE: self.reference_row(num_of(spans, REFERENCE))}
        groups = tuple(
            grouped(spans, [rows[role][block] for role in roles])
            for block in range(self.schedule.num_blocks)
        )
        return tuple(sum(group.k for group in own) for own in groups), groups

    def plan(
        self,
        counts: Sequence[int],
        num_tokens: int,
        selecting: Sequence[bool],
        groups: Grouping = (),
    ) -> ForwardPlan:
        """What every block does in a forward; made once for each row.

        Args:
            counts: k of every block.
            num_tokens: N.
            selecting: Of every block, whether it chooses tokens also where it keeps all of them.
            groups: Of every block, where tokens are in groups (`by_role`).
        """
        key = row, _, selects, _ = tuple(counts), num_tokens, tuple(selecting), groups
        if key not in self._plans:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[key] = make_plan(
                row, num_tokens, selects, lambda block: self.leader(block, row, num_tokens), groups
            )
        return self._plans[key]

    def check(self, counts: Sequence[int], num_tokens: int) -> None:
        """Raise a ValueError unless these are counts for this model and N."""
        if len(counts) != self.schedule.num_blocks:
            raise ValueError(
                f"expected k for {self.schedule.num_blocks} blocks, got {len(counts)} values."
            )
        for k in counts:
            if not 1 <= k <= num_tokens:
                raise ValueError(f"k must lie in [1, N] = [1, {num_tokens}], got {k}.")

    def leader(self, block: int, counts: Sequence[int], num_tokens: int) -> int | None:
        """The block whose scores another one uses; None where it scores by itself."""
        first = self._first.get(block, block)
        return first if first != block and counts[first] < num_tokens else None
