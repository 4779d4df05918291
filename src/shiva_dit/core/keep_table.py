"""The integers that are executed: rounding that keeps the mean, and few different rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


def nearest_bin(t: float, num_bins: int) -> int:
    """The bin of a time among `num_bins` equal bins of [0, 1]; the nearest centre, never equality.

    >>> nearest_bin(0.0, 4), nearest_bin(0.49, 4), nearest_bin(1.0, 4)
    (0, 1, 3)
    """
    if not 0.0 <= t <= 1.0 + 1e-6:
        raise ValueError(f"t must lie in [0, 1] (1 = pure noise), got {t}.")
    return min(int(t * num_bins), num_bins - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepTable:
    """Tokens kept at each (time, block) for one number of tokens: static, known beforehand."""

    counts: tuple[tuple[int, ...], ...]
    """k in [1, N] of each (row, block); a row for each time bin, or each of `times`."""
    num_tokens: int
    """N."""
    prunable_blocks: tuple[int, ...]
    """Blocks that count for the mean."""
    weights: tuple[float, ...] = ()
    """How much each row counts for the mean, at least 0; all alike by default."""
    times: tuple[float, ...] = ()
    """A run's own rising times in [0, 1], a row for each. Empty: rows are equal bins of [0, 1]."""
    is_constant: bool = field(init=False, repr=False, compare=False)
    """Whether all rows are equal: no time needs to be known."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_constant", len(set(self.counts)) == 1)

    @property
    def num_bins(self) -> int:
        """Rows: the schedule's time bins or several for each of them, or a run's times."""
        return len(self.counts)

    def row(self, t: float) -> tuple[int, ...]:
        """Tokens kept, k, of every block at time t in [0, 1]: of its bin, or the nearest time."""
        if not self.times:
            return self.counts[nearest_bin(t, len(self.counts))]
        return self.counts[min(range(len(self.times)), key=lambda i: abs(self.times[i] - t))]

    @property
    def mean_keep_ratio(self) -> float:
        """Mean of k / N over all rows, by their weights, and prunable blocks."""
        return self.weighed([self.kept(row) for row in self.counts])

    def mean_keep_ratio_at(self, times: Iterable[float]) -> float:
        """Mean of k / N over the given steps' times in [0, 1] and all prunable blocks."""
        ratios = [self.kept(self.row(t)) for t in times]
        return sum(ratios) / len(ratios)

    def kept(self, row: Sequence[int]) -> float:
        """Mean of k / N of one row over the prunable blocks."""
        if not self.prunable_blocks:
            return 1.0
        kept = sum(row[block] for block in self.prunable_blocks)
        return kept / (len(self.prunable_blocks) * self.num_tokens)

    def weighed(self, values: Sequence[float]) -> float:
        """Mean of one value per row, by the rows' weights."""
        return weighted_mean(values, self.weights or [1.0] * len(self.counts))


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean of values by weights, not all of them 0."""
    pairs = zip(values, weights, strict=True)
    return math.fsum(value * weight for value, weight in pairs) / math.fsum(weights)


def rounded_counts(
    ratios: Sequence[Sequence[float]],
    weights: Sequence[float],
    prunable_blocks: Sequence[int],
    num_tokens: int,
    multiple: int,
) -> list[list[int]]:
    """Ratios as numbers of tokens, rounded so that their mean stays.

    Args:
        ratios: Keep ratio of each (row, block).
        weights: How much each row counts for the mean, at least 0.
        prunable_blocks: Blocks that count; the others keep all tokens.
        num_tokens: N.
        multiple: Each count is a multiple of this, or N.
    """
    counts = [[num_tokens] * len(row) for row in ratios]
    lowest = min(multiple, num_tokens)
    cells: list[tuple[float, int, int, int]] = []
    remainder = 0.0
    for place, block in enumerate(prunable_blocks):
        for row, (of_blocks, weight) in enumerate(zip(ratios, weights, strict=True)):
            exact = of_blocks[block] * num_tokens
            low = max(lowest, int((exact + 1e-6) // multiple) * multiple)
            low = min(low, num_tokens)
            counts[row][block] = low
            remainder += (exact - low) * weight
            cells.append((round(low - exact, 6), place, row, block))
    remainder = _raise_counts(counts, weights, sorted(cells), remainder, num_tokens, multiple)
    _lower_counts(counts, weights, sorted(cells, reverse=True), remainder, multiple, lowest)
    return counts


def _raise_counts(
    counts: list[list[int]],
    weights: Sequence[float],
    cells: list[tuple[float, int, int, int]],
    remainder: float,
    num_tokens: int,
    multiple: int,
) -> float:
    """Give a step back to the most rounded-down entries; returns what could not be given."""
    for _, _, row, block in cells:
        step = min(multiple, num_tokens - counts[row][block])
        if step and remainder >= step * weights[row] / 2:
            counts[row][block] += step
            remainder -= step * weights[row]
    return remainder


def _lower_counts(
    counts: list[list[int]],
    weights: Sequence[float],
    cells: list[tuple[float, int, int, int]],
    remainder: float,
    multiple: int,
    lowest: int,
) -> None:
    """Take tokens away where the lower bound on k has put the sum above the target."""
    progress = True
    while progress:
        progress = False
        for _, _, row, block in cells:
            current = counts[row][block]
            step = current % multiple or multiple
            # Rows that hardly count would be emptied for what is less than one step elsewhere.
            enough = -remainder > step * max(weights[row], 1.0) / 2
            if current - step >= lowest and enough:
                counts[row][block] = current - step
                remainder += step * weights[row]
                progress = True


def merged_bins(
    ratios: Sequence[Sequence[float]],
    num_segments: int,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Neighbouring time bins put together so that ratios change least.

    Dynamic programming over the last segment's start: of all ways to cut the bins into at most
    so many runs, the one with the smallest weighted sum of squared distances of the ratios from
    their run's mean, block by block.

    Args:
        ratios: Keep ratio of each (time bin, block).
        num_segments: At least 1.
        weights: How much each bin counts, at least 0; all alike by default.

    Returns:
        Lengths of the runs, in order; they sum to the number of bins.

    >>> merged_bins([[0.9], [0.8], [0.3], [0.2], [0.2]], 2)
    [2, 3]
    """
    num_bins = len(ratios)
    cost = _costs_of_runs(ratios, weights or [1.0] * num_bins)
    # best[j]: smallest cost of the first j bins in the segments so far, and where the last began.
    best = [cost[0][end] for end in range(num_bins + 1)]
    starts: list[list[int]] = []
    for _ in range(1, min(num_segments, num_bins)):
        choices = [
            min((best[start] + cost[start][end], start) for start in range(end + 1))
            for end in range(num_bins + 1)
        ]
        best = [value for value, _ in choices]
        starts.append([start for _, start in choices])
    lengths, end = [], num_bins
    for begun in reversed(starts):
        lengths.append(end - begun[end])
        end = begun[end]
    return [length for length in (end, *reversed(lengths)) if length]


def _costs_of_runs(
    ratios: Sequence[Sequence[float]], weights: Sequence[float]
) -> list[list[float]]:
    """Sum of squared distances from their mean, of the bins from `start` up to `end`."""
    num_bins, num_blocks = len(ratios), len(ratios[0])
    cost = [[0.0] * (num_bins + 1) for _ in range(num_bins + 1)]
    for start in range(num_bins):
        mean, spread, seen = [0.0] * num_blocks, 0.0, 0.0
        for end in range(start, num_bins):
            seen += weights[end]
            if weights[end]:
                for block, ratio in enumerate(ratios[end]):
                    off = ratio - mean[block]
                    mean[block] += off * weights[end] / seen
                    spread += weights[end] * off * (ratio - mean[block])
            cost[start][end + 1] = spread
    return cost
