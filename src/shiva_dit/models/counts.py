"""How many tokens each block keeps in a forward: by the schedule, the time and N."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shiva_dit.core.keep_table import KeepTable
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.clock import Clock, Run
from shiva_dit.models.families import model_spec
from shiva_dit.models.plan import ForwardPlan, make_plan

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
        self._plans: dict[tuple[tuple[int, ...], int, tuple[bool, ...]], ForwardPlan] = {}
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

    def plan(
        self, counts: Sequence[int], num_tokens: int, selecting: Sequence[bool]
    ) -> ForwardPlan:
        """What every block does in a forward; made once for each row.

        Args:
            counts: k of every block.
            num_tokens: N.
            selecting: Of every block, whether it chooses tokens also where it keeps all of them.
        """
        key = row, _, selects = tuple(counts), num_tokens, tuple(selecting)
        if key not in self._plans:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[key] = make_plan(
                row, num_tokens, selects, lambda block: self.leader(block, row, num_tokens)
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
