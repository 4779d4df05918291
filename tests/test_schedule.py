"""Schedules: ratios over time and depth, and the integers that are executed."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from shiva_dit.core.anchor import ratios_from_logits, shifted_logits
from shiva_dit.core.annealing import anneal
from shiva_dit.core.keep_table import KeepTable, merged_bins, nearest_bin
from shiva_dit.core.schedule import Schedule

# --- drawn schedules --------------------------------------------------------------------------


@st.composite
def schedules(draw, low: float = 1e-3) -> Schedule:
    num_blocks = draw(st.integers(1, 8))
    num_bins = draw(st.integers(1, 6))
    full = tuple(sorted(draw(st.sets(st.integers(0, num_blocks - 1), max_size=num_blocks))))
    ratio = st.floats(low, 1.0)
    rows = tuple(
        tuple(1.0 if block in full else draw(ratio) for block in range(num_blocks))
        for _ in range(num_bins)
    )
    return Schedule(ratios=rows, full_blocks=full)


tokens = st.integers(1, 5000)
multiples = st.sampled_from([1, 1, 2, 3, 8, 16, 64, 100, 128])


# --- to JSON and back -------------------------------------------------------------------------


@given(schedules(low=5e-324))
def test_json_gives_the_schedule_back_exactly(schedule):
    text = schedule.to_json()
    assert Schedule.from_json(text) == schedule
    assert Schedule.from_json(text).to_json() == text
    assert list(json.loads(text)) == ["full_blocks", "ratios"]  # sorted: two saves are equal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a schedule"),
        ("{", "not a schedule"),
        ("[[0.5]]", "expected an object"),
        ("null", "expected an object"),
        ('{"ratios": [[1.0]]}', "expected an object"),
        ('{"full_blocks": [0], "ratios": [[1.0]], "more": 1}', "expected an object"),
        ('{"full_blocks": [0], "ratios": 0.5}', "not a schedule"),
        ('{"full_blocks": 0, "ratios": [[1.0]]}', "not a schedule"),
        ('{"full_blocks": [0], "ratios": [0.5]}', "not a schedule"),
        ('{"full_blocks": [0], "ratios": [["half"]]}', "half"),
        ('{"full_blocks": [0], "ratios": []}', "at least one time bin"),
        ('{"full_blocks": [], "ratios": [[]]}', "at least one time bin"),
        ('{"full_blocks": [0], "ratios": [[1.0, 0.5], [1.0]]}', "one ratio per block"),
        ('{"full_blocks": [0], "ratios": [[1.0, 0.0]]}', r"\(0, 1\], got 0.0.*share KEPT"),
        ('{"full_blocks": [0], "ratios": [[1.0, 1.5]]}', r"\(0, 1\], got 1.5"),
        ('{"full_blocks": [0], "ratios": [[1.0, NaN]]}', r"\(0, 1\], got nan"),
        ('{"full_blocks": [0], "ratios": [[0.5, 0.5]]}', "block 0 is listed as never pruned"),
        ('{"full_blocks": [2], "ratios": [[1.0, 0.5]]}', "there is no block 2 among 2"),
        ('{"full_blocks": [-1], "ratios": [[0.5, 1.0]]}', "there is no block -1 among 2"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_reason(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        Schedule.from_json(text)


# --- ratios -----------------------------------------------------------------------------------


def test_the_first_block_of_a_uniform_schedule_is_full():
    schedule = Schedule.uniform(0.4, num_blocks=5, num_bins=3)
    assert schedule.ratios == ((1.0, 0.4, 0.4, 0.4, 0.4),) * 3
    assert schedule.full_blocks == (0,)
    assert schedule.prunable_blocks == (1, 2, 3, 4)
    assert (schedule.num_blocks, schedule.num_bins) == (5, 3)
    assert schedule.mean_keep_ratio == pytest.approx(0.4, abs=1e-15)  # the full block not counted
    assert [row[0] for row in schedule.for_tokens(64).counts] == [64, 64, 64]


def test_the_mean_is_over_prunable_blocks_and_bins():
    schedule = Schedule(ratios=((1.0, 0.2, 0.4), (1.0, 0.6, 1.0)))
    assert schedule.mean_keep_ratio == pytest.approx(0.55, abs=1e-15)
    assert Schedule(ratios=((1.0,),)).mean_keep_ratio == 1.0  # nothing to prune


def test_a_uniform_schedule_may_prune_every_block():
    schedule = Schedule.uniform(0.5, num_blocks=2, full_blocks=())
    assert schedule.ratios == ((0.5, 0.5),)
    assert schedule.for_tokens(10).counts == ((5, 5),)


# --- integers ---------------------------------------------------------------------------------


def executed(schedule: Schedule, num_tokens: int, multiple: int) -> tuple[KeepTable, Schedule]:
    """The table, and the schedule with its bins split alike."""
    assume(multiple == 1 or min(multiple, num_tokens) <= schedule.mean_keep_ratio * num_tokens)
    table = schedule.for_tokens(num_tokens, multiple=multiple)
    parts, rest = divmod(table.num_bins, schedule.num_bins)
    assert rest == 0
    rows = tuple(row for row in schedule.ratios for _ in range(parts))
    return table, Schedule(ratios=rows, full_blocks=schedule.full_blocks)


@given(schedules(), tokens, multiples)
def test_counts_lie_in_range_and_respect_multiples_and_full_blocks(schedule, num_tokens, multiple):
    table, schedule = executed(schedule, num_tokens, multiple)
    assert table.num_tokens == num_tokens
    for row in table.counts:
        assert len(row) == schedule.num_blocks
        assert all(1 <= k <= num_tokens for k in row)
        assert all(k % multiple == 0 or k == num_tokens for k in row)
        assert all(row[block] == num_tokens for block in schedule.full_blocks)


@given(schedules(), tokens, multiples)
def test_the_executed_mean_is_the_schedules_to_half_a_step_of_one_entry(
    schedule, num_tokens, multiple
):
    """Derived: tokens are given back or taken away while more than half a step is owed.

    A step is at most `multiple` tokens of one of n entries, so that the mean is off by at most
    multiple / (2 n N), unless every entry is at its lower bound already.
    """
    assume(schedule.prunable_blocks)
    table, schedule = executed(schedule, num_tokens, multiple)
    entries = [row[block] for row in table.counts for block in schedule.prunable_blocks]
    wanted = math.fsum(
        row[block] * num_tokens for row in schedule.ratios for block in schedule.prunable_blocks
    )
    assert table.mean_keep_ratio == pytest.approx(
        sum(entries) / (len(entries) * num_tokens), abs=1e-12
    )
    if all(k == min(multiple, num_tokens) for k in entries):
        assert sum(entries) >= wanted - multiple / 2
    else:
        # Ratios within 1e-6 of a whole number of steps count as that number.
        assert abs(sum(entries) - wanted) <= multiple / 2 + 2e-6 * len(entries)


@given(schedules(), tokens, multiples)
def test_no_entry_moves_by_more_than_a_step_where_no_bound_is_hit(schedule, num_tokens, multiple):
    assume(all(r * num_tokens >= multiple for row in schedule.ratios for r in row))
    # Near N the last step is a short one; what it cannot take, others must.
    assume(
        all(
            row[b] * num_tokens <= (num_tokens // multiple - 1) * multiple
            for row in schedule.ratios
            for b in schedule.prunable_blocks
        )
    )
    table, schedule = executed(schedule, num_tokens, multiple)
    for ratios, counts in zip(schedule.ratios, table.counts, strict=True):
        for block in schedule.prunable_blocks:
            assert abs(counts[block] - ratios[block] * num_tokens) <= multiple + 1e-6


@pytest.mark.parametrize("num_tokens", [64, 256, 1024, 4096, 4080, 16384])
@pytest.mark.parametrize("multiple", [1, 16, 64])
@pytest.mark.parametrize("target", [0.2, 0.4, 0.6, 0.8])
def test_a_learned_schedule_is_executed_to_a_thousandth(num_tokens, multiple, target):
    """64 bins of 24 blocks: the mean of the integers within 0.1% of the target."""
    logits = 1.5 * torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    schedule = Schedule.from_ratios(ratios_from_logits(logits, target, (0,)))
    if multiple / num_tokens > target:  # every entry must keep that much
        with pytest.raises(
            ValueError, match=f"use a multiple of at most {int(target * num_tokens)}\\."
        ):
            schedule.for_tokens(num_tokens, multiple=multiple)
    else:
        table = schedule.for_tokens(num_tokens, multiple=multiple)
        assert table.num_bins == 64
        assert table.mean_keep_ratio == pytest.approx(target, rel=1e-3)


@pytest.mark.parametrize("num_tokens", [256, 1000, 1024, 4096])
@pytest.mark.parametrize("multiple", [1, 64, 100, 128])
@pytest.mark.parametrize("target", [0.5, 0.6, 0.77, 0.99])
def test_a_uniform_schedule_of_one_bin_is_executed_to_a_thousandth(num_tokens, multiple, target):
    """One row of 23 integers cannot always meet the mean: then the bin is split."""
    schedule = Schedule.uniform(target, num_blocks=24)
    table = schedule.for_tokens(num_tokens, multiple=multiple)
    assert table.mean_keep_ratio == pytest.approx(target, rel=1e-3)
    assert all(k % multiple == 0 or k == num_tokens for row in table.counts for k in row)
    # 1024 tokens by 1: the mean of 23 integers is off by 1 / (2 * 23 * 1024) at most.
    assert (multiple, num_tokens) != (1, 1024) or table.num_bins == 1


def test_few_tokens_do_not_make_a_large_table():
    """Half a step of one entry must not exceed a thousandth of the mean: 500 / (r N) entries."""
    assert Schedule.uniform(0.75, num_blocks=1, full_blocks=()).for_tokens(2).num_bins == 334
    assert Schedule.uniform(1e-6, num_blocks=2).for_tokens(16).num_bins == 1  # out of reach: k = 1


@given(st.floats(0.01, 0.99), st.integers(1, 500), st.integers(2, 10), st.integers(1, 64))
def test_a_uniform_schedule_needs_at_most_two_kinds_of_rows(ratio, num_tokens, blocks, bins):
    """Distinct rows are distinct graphs: the remainder is given to whole blocks first."""
    table = Schedule.uniform(ratio, num_blocks=blocks, num_bins=bins).for_tokens(num_tokens)
    assert len(set(table.counts)) <= 2


def test_tokens_go_back_to_the_entries_that_rounding_took_most_from():
    schedule = Schedule(ratios=((1.0, 0.55, 0.58, 0.57),))
    # 5.5, 5.8, 5.7 of 10 tokens: floors 5, 5, 5 and 2 owed, given to 5.8 and then 5.7.
    assert schedule.for_tokens(10).counts == ((10, 5, 6, 6),)


def test_a_lower_bound_that_spends_too_much_is_paid_for_elsewhere():
    schedule = Schedule(ratios=((1.0, 0.001, 0.5, 0.5),))
    table = schedule.for_tokens(100, multiple=10)
    # The first entry must keep 10 instead of 0.1: 9.9 too many, so another gives one step of 10.
    assert sum(table.counts[0][1:]) == 100
    assert table.counts[0][1] == 10


def test_one_token_is_always_kept():
    assert Schedule.uniform(1e-3, num_blocks=3).for_tokens(1).counts == ((1, 1, 1),)
    assert Schedule.uniform(1e-6, num_blocks=3).for_tokens(16).counts == ((16, 1, 1),)


def test_a_ratio_of_one_keeps_all_tokens():
    table = Schedule.uniform(1.0, num_blocks=3, num_bins=2).for_tokens(4096, multiple=100)
    assert table.counts == ((4096, 4096, 4096),) * 2
    assert table.mean_keep_ratio == 1.0


@pytest.mark.parametrize(("values", "name"), [((0, 1), "num_tokens"), ((16, 0), "multiple")])
def test_sizes_below_one_are_refused(values: tuple[int, int], name: str):
    num_tokens, multiple = values
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Schedule.uniform(0.5, num_blocks=2).for_tokens(num_tokens, multiple=multiple)


# --- time -------------------------------------------------------------------------------------


@given(st.floats(0.0, 1.0), st.integers(1, 1000))
def test_the_nearest_bin_has_the_nearest_centre(t, num_bins):
    index = nearest_bin(t, num_bins)
    assert 0 <= index < num_bins
    # Half a bin, and the rounding of t * num_bins.
    assert abs(t - (index + 0.5) / num_bins) <= 0.5 / num_bins + 1e-15


def test_every_centre_lies_in_its_bin_and_the_ends_in_the_outer_ones():
    for num_bins in (1, 2, 3, 28, 50, 64, 1000):
        assert [nearest_bin((b + 0.5) / num_bins, num_bins) for b in range(num_bins)] == list(
            range(num_bins)
        )
        assert nearest_bin(0.0, num_bins) == 0
        assert nearest_bin(1.0, num_bins) == num_bins - 1
    assert nearest_bin(1.0 + 5e-7, 8) == 7  # timesteps that a sampler rounded up


@pytest.mark.parametrize("t", [-1e-3, 1.001, 999.0, float("nan")])
def test_times_outside_the_unit_interval_are_refused(t: float):
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        nearest_bin(t, 4)


def test_rows_and_means_follow_the_times_of_a_sampler():
    table = Schedule(ratios=((1.0, 0.2), (1.0, 0.4), (1.0, 0.8), (1.0, 1.0))).for_tokens(10)
    assert table.row(0.1) == (10, 2)
    assert table.row(0.6) == (10, 8)
    assert table.mean_keep_ratio == pytest.approx(0.6, abs=1e-15)
    assert table.mean_keep_ratio_at([1.0, 0.9, 0.3]) == pytest.approx(0.8, abs=1e-15)


# --- temperatures -----------------------------------------------------------------------------


@given(st.floats(1e-4, 10.0), st.floats(1e-4, 10.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_annealing_is_geometric_and_monotone(start, end, first, second):
    first, second = sorted((first, second))
    a, b = anneal(start, end, first), anneal(start, end, second)
    assert math.log(a) == pytest.approx(
        (1 - first) * math.log(start) + first * math.log(end), abs=1e-12
    )
    assert (b - a) * (end - start) >= -1e-15


def test_annealing_stays_at_its_ends():
    assert anneal(0.2, 0.02, -1.0) == anneal(0.2, 0.02, 0.0) == 0.2
    assert anneal(0.2, 0.02, 7.0) == anneal(0.2, 0.02, 1.0) == pytest.approx(0.02, rel=1e-15)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (0.1, 0.0), (-0.1, 0.1)])
def test_temperatures_are_positive(start: float, end: float):
    with pytest.raises(ValueError, match="temperatures must be positive"):
        anneal(start, end, 0.5)


# --- from logits to ratios --------------------------------------------------------------------


@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.floats(0.01, 0.99), st.integers(1, 5))
def test_shifted_logits_meet_any_target_and_keep_their_shape(seed, spread, target, num_bins):
    logits = spread * torch.randn(num_bins, 6, generator=torch.Generator().manual_seed(seed))
    full = (0, 3)
    ratios = ratios_from_logits(logits, target, full)
    schedule = Schedule.from_ratios(ratios, full)
    assert all(row[block] == 1.0 for row in ratios for block in full)
    # 200 halvings of the shift: only the rounding of a float64 mean is left.
    assert schedule.mean_keep_ratio == pytest.approx(target, abs=1e-12)
    kept = torch.tensor(ratios, dtype=torch.float64)[:, [1, 2, 4, 5]]
    shift = kept.logit() - logits.double()[:, [1, 2, 4, 5]]
    # One shift for all. Logits lie within 13 of 0 here: ratios stay above the least one, 1e-6, and
    # the logit of one near 1 loses 1e-16 e^13 = 5e-11.
    assert (shift - shift[0, 0]).abs().max() <= 1e-9


def test_a_target_of_one_keeps_everything():
    assert ratios_from_logits(torch.randn(2, 3), 1.0, (0,)) == ((1.0, 1.0, 1.0),) * 2


def test_logits_without_prunable_blocks_give_ones():
    assert ratios_from_logits(torch.zeros(2, 2), 0.4, (0, 1)) == ((1.0, 1.0),) * 2


def test_ratios_stay_above_zero_however_far_apart_the_logits_are():
    logits = torch.tensor([[0.0, 200.0, -200.0]])
    ratios = ratios_from_logits(logits, 0.5, (0,))
    assert Schedule.from_ratios(ratios).mean_keep_ratio == pytest.approx(0.5, abs=1e-6)
    assert ratios[0][2] == 1e-6  # the smallest ratio there is


def test_shifted_logits_carry_the_shifts_own_gradient():
    """Of a random sum of the ratios, against differences; all moved alike change nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weights, task = [1.0, 0.5, 1.5], torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def loss(values):
        return (torch.sigmoid(shifted_logits(values, 0.3, (0,), weights))[:, 1:] * task).sum()

    (found,) = torch.autograd.grad(loss(logits), logits)
    wanted = ratios_from_logits(logits, 0.3, (0,), weights)
    shifted = torch.sigmoid(shifted_logits(logits.detach(), 0.3, (0,), weights))[:, 1:]
    torch.testing.assert_close(shifted, torch.tensor(wanted, dtype=torch.float64)[:, 1:])
    assert float(found[:, 1:].abs().max()) > 1e-2
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-12)
    for row in range(3):
        for block in range(4):
            step = torch.zeros_like(logits)
            step[row, block] = 1e-4
            by_hand = (loss(logits + step) - loss(logits - step)) / 2e-4
            assert float(found[row, block]) == pytest.approx(by_hand.item(), abs=1e-7)


@pytest.mark.parametrize("target", [0.0, -0.1, 1.1, float("nan")])
def test_targets_outside_the_range_are_refused(target: float):
    with pytest.raises(ValueError, match=r"target keep ratio must lie in \(0, 1\]"):
        ratios_from_logits(torch.zeros(1, 2), target, (0,))


# --- few different rows -----------------------------------------------------------------------


def cost(ratios: list[list[float]], lengths: list[int]) -> float:
    """Sum of squared distances from the runs' means."""
    total, start = 0.0, 0
    for length in lengths:
        run = torch.tensor(ratios[start : start + length], dtype=torch.float64)
        total += float((run - run.mean(0)).square().sum())
        start += length
    return total


@given(
    st.integers(1, 7).flatmap(
        lambda bins: st.lists(
            st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3), min_size=bins, max_size=bins
        )
    ),
    st.integers(1, 8),
)
def test_no_other_way_to_merge_time_changes_ratios_less(ratios, num_segments):
    found = merged_bins(ratios, num_segments)
    assert sum(found) == len(ratios)
    assert 1 <= len(found) <= num_segments
    cuts = range(1, len(ratios))
    others = [
        [b - a for a, b in itertools.pairwise((0, *chosen, len(ratios)))]
        for count in range(min(num_segments, len(ratios)))
        for chosen in itertools.combinations(cuts, count)
    ]
    # Sums of at most 21 squares below 1, taken in another order.
    assert cost(ratios, found) <= min(cost(ratios, other) for other in others) + 1e-14


@given(schedules(0.05), st.integers(64, 5000), st.sampled_from([1, 8, 64]), st.integers(1, 4))
def test_merged_tables_have_few_rows_and_the_mean(schedule, num_tokens, multiple, segments):
    assume(min(multiple, num_tokens) <= schedule.mean_keep_ratio * num_tokens)
    table = schedule.for_tokens(num_tokens, multiple=multiple, segments=segments)
    assert table.num_bins == schedule.num_bins
    assert len(set(table.counts)) <= segments
    for row in table.counts:
        assert all(1 <= k <= num_tokens and (k % multiple == 0 or k == num_tokens) for k in row)
        assert all(row[block] == num_tokens for block in schedule.full_blocks)
    entries = max(1, schedule.num_bins * len(schedule.prunable_blocks))
    longest = max(len(list(run)) for _, run in itertools.groupby(table.counts))
    bound = multiple * longest / (2 * num_tokens * entries)
    assert abs(table.mean_keep_ratio - schedule.mean_keep_ratio) <= bound + 1e-9


def test_merged_rows_keep_the_budget_of_a_real_size():
    """SD3.5-Medium at 1024 pixels, 20 bins: four rows of multiples of 128 miss it by 0.03%."""
    ratios = [[1.0, *(0.2 + 0.6 * abs(b / 23 - t / 19) for b in range(23))] for t in range(20)]
    schedule = Schedule.from_ratios(ratios)
    table = schedule.for_tokens(4096, multiple=128, segments=4)
    assert len(set(table.counts)) == 4
    assert table.mean_keep_ratio == pytest.approx(schedule.mean_keep_ratio, rel=5e-4)


def test_as_many_segments_as_bins_change_nothing():
    schedule = Schedule(ratios=((1.0, 0.2, 0.4), (1.0, 0.6, 0.9)))
    assert schedule.for_tokens(100, segments=2) == schedule.for_tokens(100)
    with pytest.raises(ValueError, match="segments must be at least 1"):
        schedule.for_tokens(100, segments=0)


@pytest.mark.parametrize(
    ("num_tokens", "keep_ratio", "multiple"),
    [(1024, 0.25, 16), (1024, 0.249, 1), (4096, 0.6, 16), (256, 0.9, 1), (64, 0.4, 1)],
)
def test_many_tokens_are_kept_in_sixteens(num_tokens: int, keep_ratio: float, multiple: int):
    """By default; the mean stays as near as ever."""
    schedule = Schedule.uniform(keep_ratio, num_blocks=8)
    table = schedule.for_tokens(num_tokens)
    assert table == schedule.for_tokens(num_tokens, multiple=multiple)
    if multiple == 16:
        assert all(k % 16 == 0 for row in table.counts for k in row)
    assert table.mean_keep_ratio == pytest.approx(keep_ratio, rel=1e-3)
