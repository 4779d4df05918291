"""How many tokens each block keeps at each time: ratios, and the integers that are executed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shiva_dit.config import from_dict
from shiva_dit.core.anchor import ratios_from_logits
from shiva_dit.core.keep_table import (
    KeepTable,
    merged_bins,
    nearest_bin,
    rounded_counts,
    weighted_mean,
)
from shiva_dit.core.time_law import UNIFORM, TimeLaw

MEAN_TOLERANCE = 1e-3
"""How far the mean of executed counts may lie from the ratios', as a share of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Keep ratios over time and depth, independent of resolution.

    >>> schedule = Schedule.uniform(0.4, num_blocks=6)
    >>> schedule.for_tokens(64).counts
    ((64, 26, 26, 26, 25, 25),)
    """

    ratios: tuple[tuple[float, ...], ...]
    """Keep ratio r in (0, 1] of each (time bin, block). Bin b of S covers t in [b/S, (b+1)/S]."""
    full_blocks: tuple[int, ...] = (0,)
    """Blocks that are never pruned; their ratios are 1."""
    law: TimeLaw = UNIFORM
    """Whose steps the mean keep ratio is over."""
    prunable_blocks: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Blocks that may be pruned."""

    def __post_init__(self) -> None:
        if not self.ratios or not self.ratios[0]:
            raise ValueError("a schedule needs at least one time bin and one block.")
        num_blocks = len(self.ratios[0])
        for row in self.ratios:
            if len(row) != num_blocks:
                raise ValueError("all rows of a schedule must have one ratio per block.")
            for ratio in row:
                if not 0.0 < ratio <= 1.0:
                    raise ValueError(
                        f"keep ratios must lie in (0, 1], got {ratio}: a ratio is the share KEPT."
                    )
        for block in self.full_blocks:
            if not 0 <= block < num_blocks:
                raise ValueError(f"full_blocks: there is no block {block} among {num_blocks}.")
            if any(row[block] != 1.0 for row in self.ratios):
                raise ValueError(f"block {block} is listed as never pruned: its ratios must be 1.")
        full = set(self.full_blocks)
        prunable = tuple(b for b in range(num_blocks) if b not in full)
        object.__setattr__(self, "prunable_blocks", prunable)

    @classmethod
    def uniform(
        cls,
        keep_ratio: float,
        *,
        num_blocks: int,
        num_bins: int = 1,
        full_blocks: Sequence[int] = (0,),
        law: TimeLaw = UNIFORM,
    ) -> Schedule:
        """The same ratio in every block that may be pruned, at every time."""
        row = tuple(1.0 if b in full_blocks else float(keep_ratio) for b in range(num_blocks))
        ratios = (row,) * num_bins
        return cls(ratios=ratios, full_blocks=tuple(full_blocks), law=law)

    @property
    def num_bins(self) -> int:
        """Time bins."""
        return len(self.ratios)

    @property
    def num_blocks(self) -> int:
        """Blocks, the never pruned ones included."""
        return len(self.ratios[0])

    @property
    def mean_keep_ratio(self) -> float:
        """Mean over all steps, as the law spreads them, and all blocks that may be pruned.

        This is what a target refers to, and what every table keeps.
        """
        means = [self._mean(row) for row in self.ratios]
        return weighted_mean(means, self.law.weights(self.num_bins))

    def _mean(self, row: Sequence[float]) -> float:
        """Mean ratio of one row over the blocks that may be pruned."""
        values = [row[block] for block in self.prunable_blocks]
        return math.fsum(values) / len(values) if values else 1.0

    def for_tokens(
        self, num_tokens: int, *, multiple: int | None = None, segments: int | None = None
    ) -> KeepTable:
        """The integers that are executed for N tokens, by time bin, with the mean ratio kept.

        Rounding each ratio down would spend less than was asked for (by multiple / 2N on average),
        so the remainder is given back, one step at a time, where rounding took most; among equals
        whole blocks first, so that few distinct rows arise. Where a table has too few entries for
        the mean to be met, each time bin is split into several that differ by a step.

        Args:
            num_tokens: N, at least 1.
            multiple: k is a multiple of this, or N. By default 16 where 256 tokens or more are
                kept on average, which matrix products like (`docs/performance.md`), and 1 below.
            segments: At most so many different rows: neighbouring time bins share one, each
                block its mean, where that changes the ratios least (sum of squares). No bin is
                split then, so that few entries and a large multiple can miss the mean by more
                than is said below: by `multiple * longest segment / (2 N bins blocks)` at most.
                `KeepTable.mean_keep_ratio` says what is executed.

        Returns:
            A table whose mean ratio, over steps as the law spreads them, is within 0.1% of the
            schedule's (where that is at least 1 / N: no block keeps fewer tokens than one), or the
            nearest where the law names its few steps.

        Raises:
            ValueError: If no multiple comes that low: k is at least one `multiple`.
        """
        multiple = self._multiple(num_tokens, multiple, segments)
        wanted, weights = self.mean_keep_ratio, self.law.weights(self.num_bins)
        table = self._table(self.ratios, weights, num_tokens, multiple, segments)
        reachable = min(multiple, num_tokens) <= wanted * num_tokens  # else k = 1 is the nearest
        splits = segments is None and not self.law.steps  # a step is in one bin, however many
        if splits and reachable and not _met(table, wanted):
            # The mean of n entries misses by half a step at most: multiple / (2 n N).
            entries = len(self.prunable_blocks) * self.num_bins
            needed = multiple / (2 * MEAN_TOLERANCE * wanted * num_tokens * entries)
            parts = math.ceil(needed * max(weights))
            rows = tuple(row for row in self.ratios for _ in range(parts))
            weights = self.law.weights(len(rows))
            # Within a bin the law may be uneven, which would move the mean between bins.
            rows = self._moved(rows, weights)
            table = self._table(rows, weights, num_tokens, multiple, None)
        return table

    def for_steps(
        self,
        times: Sequence[float],
        num_tokens: int,
        *,
        multiple: int | None = None,
        segments: int | None = None,
    ) -> KeepTable:
        """The integers that are executed in a run of known steps, with the mean ratio kept.

        The mean is over this very list, few steps and part of the way included: all logits of the
        ratios at these times are moved alike to meet it, and then rounded as in `for_tokens`.

        Args:
            times: t of each step in [0, 1], in any order; one that comes twice counts twice.
            num_tokens: N, at least 1.
            multiple: As in `for_tokens`; by default it is halved, too, until the mean is met.
            segments: At most so many different rows.

        Returns:
            A table with a row for each time. Its mean is within 0.1% of the schedule's, or the
            nearest that can be reached: a half `multiple` per step and block, at most.

        Raises:
            ValueError: If there are no times, one lies outside [0, 1], or no multiple comes that
                low.
        """
        if not times:
            raise ValueError("times must name at least one step.")
        chosen = self._multiple(num_tokens, multiple, segments)
        repeats = sorted(Counter(times).items())
        weights = [float(count) for _, count in repeats]
        rows = [self.ratios[nearest_bin(t, self.num_bins)] for t, _ in repeats]
        rows, wanted = self._moved(rows, weights), self.mean_keep_ratio
        unique = tuple(t for t, _ in repeats)
        table = self._table(rows, weights, num_tokens, chosen, segments, times=unique)
        while multiple is None and chosen > 1 and not _met(table, wanted):
            chosen //= 2
            table = self._table(rows, weights, num_tokens, chosen, segments, times=unique)
        return table

    def _multiple(self, num_tokens: int, multiple: int | None, segments: int | None) -> int:
        """The multiple that is asked for, or the default one; all numbers checked."""
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}.")
        wanted = self.mean_keep_ratio
        if multiple is None:
            multiple = 16 if wanted * num_tokens >= 256 else 1
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}.")
        if segments is not None and segments < 1:
            raise ValueError(f"segments must be at least 1, got {segments}.")
        lowest = min(multiple, num_tokens)
        if multiple > 1 and lowest > wanted * num_tokens * (1.0 + MEAN_TOLERANCE):
            raise ValueError(
                f"with multiple = {multiple} every block keeps at least {lowest} of {num_tokens} "
                f"tokens, more than the mean of {wanted:.4g} asked for: use a multiple of at most "
                f"{max(1, int(wanted * num_tokens))}."
            )
        return multiple

    def _moved(
        self, rows: Sequence[Sequence[float]], weights: Sequence[float]
    ) -> tuple[tuple[float, ...], ...]:
        """Ratios, their logits moved alike so that the mean by these weights is the schedule's."""
        now = weighted_mean([self._mean(row) for row in rows], weights)
        if abs(now - self.mean_keep_ratio) <= 1e-12:
            return tuple(map(tuple, rows))
        ratios = torch.tensor(rows, dtype=torch.float64)
        logits = ratios.logit().clamp(-40.0, 40.0)  # a ratio of 1 stays one while others can give
        return ratios_from_logits(logits, self.mean_keep_ratio, self.full_blocks, weights)

    def _table(
        self,
        rows: Sequence[Sequence[float]],
        weights: Sequence[float],
        num_tokens: int,
        multiple: int,
        segments: int | None,
        times: tuple[float, ...] = (),
    ) -> KeepTable:
        """The integers; neighbouring rows share theirs where there may be but few segments."""
        lengths = [1] * len(rows)
        if segments is not None:
            lengths = merged_bins(rows, segments, weights)
        means, totals, start = [], [], 0
        for length in lengths:
            part = slice(start, start + length)
            totals.append(math.fsum(weights[part]))
            # Bins in which no step falls have no say in the mean; among themselves all alike.
            each = weights[part] if totals[-1] else [1.0] * length
            means.append([weighted_mean(c, each) for c in zip(*rows[part], strict=True)])
            start += length
        rounded = rounded_counts(means, totals, self.prunable_blocks, num_tokens, multiple)
        return KeepTable(
            counts=tuple(
                tuple(row)
                for row, length in zip(rounded, lengths, strict=True)
                for _ in range(length)
            ),
            num_tokens=num_tokens,
            prunable_blocks=self.prunable_blocks,
            weights=tuple(weights),
            times=times,
        )

    def to_json(self) -> str:
        """This schedule as JSON; `from_json` gives it back exactly."""
        data: dict[str, Any] = {"full_blocks": self.full_blocks, "ratios": self.ratios}
        if self.law != UNIFORM:
            data["law"] = {"name": self.law.name, "times": self.law.times}
            if self.law.steps:
                data["law"]["steps"] = self.law.steps
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """A schedule from `to_json`; one without a law is for the uniform one.

        Raises:
            ValueError: If the text is not one.
        """
        try:
            data = json.loads(text)
            needed = {"full_blocks", "ratios"}
            if not isinstance(data, dict) or set(data) - {"law"} != needed:
                raise ValueError('expected an object with "full_blocks" and "ratios".')
            law = from_dict(TimeLaw, data.get("law", {}), "law")
            return cls.from_ratios(data["ratios"], data["full_blocks"], law)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a schedule: {error}") from error

    @classmethod
    def from_ratios(
        cls,
        ratios: Iterable[Iterable[float]],
        full_blocks: Iterable[int] = (0,),
        law: TimeLaw = UNIFORM,
    ) -> Schedule:
        """A schedule from nested lists (bins, then blocks); for the uniform law by default."""
        rows = tuple(tuple(float(ratio) for ratio in row) for row in ratios)
        full = tuple(int(block) for block in full_blocks)
        return cls(ratios=rows, full_blocks=full, law=law)


def _met(table: KeepTable, wanted: float) -> bool:
    return abs(table.mean_keep_ratio - wanted) <= MEAN_TOLERANCE * wanted
