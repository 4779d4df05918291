"""How many tokens each block keeps in a forward: by the schedule, the time and N."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from shiva_dit.core.keep_table import KeepTable
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.clock import Clock
from shiva_dit.models.families import model_spec


class Counts:
    """k of every block of one model, as integers that are known before the forward.

    Args:
        model: A supported transformer.
        schedule: Keep ratios for its blocks.
        multiple: k is a multiple of this; see `Schedule.for_tokens`.
        segments: At most so many different rows over time.
        select_every: So many prunable blocks in a row share their first one's scores.

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
    ) -> None:
        if multiple is not None and multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}.")
        if select_every < 1:
            raise ValueError(f"select_every must be at least 1, got {select_every}.")
        if segments is not None and segments < 1:
            raise ValueError(f"segments must be at least 1, got {segments}.")
        self.model, self.spec = model, model_spec(model)
        self.multiple, self.segments, self.select_every = multiple, segments, select_every
        self.clock: Clock | None = None
        """Knows times without reading them."""
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
        self._tables: dict[int, KeepTable] = {}

    def table(self, num_tokens: int) -> KeepTable:
        """The integers executed for N image tokens."""
        if num_tokens not in self._tables:
            self._tables[num_tokens] = self.schedule.for_tokens(
                num_tokens, multiple=self.multiple, segments=self.segments
            )
        return self._tables[num_tokens]

    def row(self, num_tokens: int, timestep: Tensor | float) -> tuple[int, ...]:
        """Every block's k, by the time; that is read from the device if nobody else knows it."""
        table = self.table(num_tokens)
        if len(set(table.counts)) == 1:
            return table.counts[0]
        clock = self.clock if isinstance(timestep, Tensor) else None
        if clock is not None and isinstance(timestep, Tensor):
            told = clock.time(self.spec.time(timestep))
            if told is not None:
                return table.row(told)
        steps = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep]
        times = [self.spec.time(step) for step in steps]
        rows = {table.row(t) for t in times}
        if len(rows) > 1:
            raise ValueError(
                f"the samples of one forward must share their time bin, so that they keep equally "
                f"many tokens; got times {sorted(set(times))}. Split the batch by timestep."
            )
        if clock is not None:
            clock.learn(times[0])
        return rows.pop()

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
        prunable = self.schedule.prunable_blocks
        if self.select_every == 1 or block not in prunable:
            return None
        place = prunable.index(block)
        first = prunable[place - place % self.select_every]
        return first if first != block and counts[first] < num_tokens else None
