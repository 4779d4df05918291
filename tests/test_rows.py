"""Rows per image token, against plain indexing, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shiva_dit.models.rows import TABLE, Rows, RowsBySample, apart, together

N, T, K = 6, 3, 4
CHOSEN = torch.tensor([[5, 0, 3, 2], [1, 4, 0, 5]])


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.tensor(shape).prod())).view(shape)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("given", ["own", "shared"])
@pytest.mark.parametrize("text", ["none", "first", "last"])
@pytest.mark.parametrize(("axis", "before"), [(1, ()), (2, (1,)), (-1, (1, 1)), (2, (5,))])
def test_rows_are_those_of_the_chosen_tokens(
    batch: int, given: str, text: Any, axis: int, before: tuple[int, ...]
) -> None:
    after = () if axis == -1 else (3,)
    size = N if text == "none" else N + T
    value = numbered(batch if given == "own" else 1, *before, size, *after)
    found = Rows(axis=axis, text=text)(value, CHOSEN[:batch], N)
    start, place = (T if text == "first" else 0), 1 + len(before)
    for sample in range(batch):
        rows = CHOSEN[sample] + start
        others = [*range(start), *range(start + N, size)]
        order = [*others, *rows] if text == "first" else [*rows, *others]
        expected = value[min(sample, len(value) - 1)].index_select(place - 1, torch.tensor(order))
        assert torch.equal(found[sample], expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_pairs_of_tokens_lie_as_attention_wants_its_mask(batch: int) -> None:
    mask = numbered(1, 1, N, N)
    found = Rows(axis=(3, 2))(mask, CHOSEN[:batch], N)
    assert found.shape == (batch, 1, K, K)
    assert found.stride(-1) == 1
    for sample, rows in enumerate(CHOSEN[:batch]):
        assert torch.equal(found[sample, 0], mask[0, 0][rows][:, rows])


def test_a_table_for_all_samples_is_one_table_for_one_sample() -> None:
    table = numbered(T + N, 2)
    one = TABLE((table,), CHOSEN[:1], N)[0]
    assert torch.equal(one, torch.cat([table[:T], table[T:][CHOSEN[0]]]))
    two = TABLE((table,), CHOSEN, N)[0]
    assert isinstance(two, RowsBySample)
    for sample, rows in enumerate(CHOSEN):
        expected = torch.cat([table[:T], table[T:][rows]])
        assert torch.equal(two[None, None][sample, 0], expected)  # heads before the tokens
        assert torch.equal(two[None, :, None][sample, :, 0], expected)
        assert torch.equal(two.unsqueeze(1)[sample, :, 0], expected)
    assert torch.equal(Rows(batch="none")(table[T:], CHOSEN, N), table[T:][CHOSEN])


def test_what_is_by_sample_stays() -> None:
    by_sample, for_all = numbered(2, 6, 5), numbered(2, 1, 5)
    assert Rows(dims=4)(by_sample, CHOSEN, N) is by_sample
    assert Rows()(for_all, CHOSEN, N) is for_all
    by_token = numbered(1, N, 6, 5)
    assert torch.equal(Rows(dims=4)(by_token, CHOSEN, N), by_token[0][CHOSEN])
    assert torch.equal(
        Rows(axis=2, dims=4)(by_token.transpose(1, 2), CHOSEN, N),
        by_token[0][CHOSEN].transpose(1, 2),
    )


@pytest.mark.parametrize("text", ["none", "first", "last"])
def test_apart_and_together_are_inverse(text: Any) -> None:
    values = numbered(2, N if text == "none" else N + T, 3)
    of_text, image = apart(values, N, text)
    assert image.shape == (2, N, 3)
    assert (of_text is None) == (text == "none")
    assert torch.equal(together(of_text, image, text), values)
