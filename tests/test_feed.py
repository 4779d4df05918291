"""What is trained on next: shuffled, in groups, read ahead, and gone on with from a position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shiva_dit.training.data import Batch, Feed, GroupedIndices, ShuffledIndices
from shiva_dit.training.plan import Part

GROUPS = [0] * 30 + [1] * 12 + [2] * 3


class Plain:
    """Data with what is asked of all."""

    def __len__(self) -> int:
        return 45

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        raise NotImplementedError

    def unconditional(self) -> dict[str, Tensor]:
        raise NotImplementedError


class Ahead(Plain):
    """Data that can be read ahead."""

    def __init__(self, groups: list[int] | None = None) -> None:
        self.numbers = groups
        self.expected: list[list[int]] = []

    def groups(self) -> list[int] | None:
        return self.numbers

    def expect(self, indices: Tensor) -> None:
        self.expected.append(indices.tolist())


def test_a_take_is_of_one_group_as_often_as_its_share() -> None:
    order, groups = GroupedIndices(GROUPS, seed=1), torch.tensor(GROUPS)
    takes = [order.take(4) for _ in range(45)]  # whose turn it is goes round once
    found = [set(groups[take].tolist()) for take in takes]
    assert all(len(group) == 1 for group in found)
    assert [found.count({number}) for number in range(3)] == [30, 12, 3]
    # Each sample four times: the samples of a group come in epochs of their own.
    assert torch.cat(takes).bincount().tolist() == [4] * 45


@pytest.mark.parametrize("count", [1, 4, 7])
def test_grouped_indices_go_on_from_a_position(count: int) -> None:
    whole = GroupedIndices(GROUPS, seed=3)
    takes = [whole.take(count) for _ in range(200)]
    again = GroupedIndices(GROUPS, seed=3)
    again.position = 120 * count
    for expected in takes[120:]:
        assert torch.equal(again.take(count), expected)
    assert again.position == whole.position
    if count > 1:
        again.position = count + 1
        with pytest.raises(ValueError, match=f"{count + 1} samples were not taken {count} at a t"):
            again.take(count)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_what_is_taken_was_expected(groups: list[int] | None) -> None:
    data = Ahead(groups)
    feed = Feed(data, seed=2, ahead=3)
    plain = ShuffledIndices(45, 2) if groups is None else GroupedIndices(groups, 2)
    for number in range(60):
        taken = feed.take(5)
        assert torch.equal(taken, plain.take(5))
        assert feed.position == plain.position == 5 * (number + 1)
        assert data.expected[number] == taken.tolist()
        assert number + 2 <= len(data.expected) <= number + 4
    feed.position = 50
    again = Feed(Ahead(groups), seed=2)
    again.position = 50
    assert torch.equal(feed.take(5), again.take(5))


def test_another_count_goes_on_where_the_last_take_ended() -> None:
    feed, plain = Feed(Ahead(), seed=2), ShuffledIndices(45, 2)
    for count in (5, 5, 3, 8):
        assert torch.equal(feed.take(count), plain.take(count))


def test_data_that_is_not_read_ahead_gives_the_order_alone() -> None:
    feed, plain = Feed(Plain(), seed=4), ShuffledIndices(45, 4)
    assert torch.equal(feed.take(50), plain.take(50))


def test_a_part_keeps_its_shares_at_another_number_of_tokens() -> None:
    ratios = torch.tensor([0.5, 0.25, 1.0], requires_grad=True)
    part = Part(t=torch.zeros(2), counts=(32, 16, 64), soft_k=list((ratios * 64).unbind()))
    assert part.for_tokens(64, 64) is part
    other = part.for_tokens(96, 64)
    assert other.counts == (48, 24, 96)
    assert [float(k) for k in other.soft_k] == [48.0, 24.0, 96.0]
    sum(other.soft_k).backward()  # type: ignore[union-attr]
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [96.0] * 3
