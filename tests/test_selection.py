"""Hard top-k selection: choose, gather, scatter (Eq. 3, 4, 32)."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiva_dit.core.selection import (
    flat_rows,
    gather_tokens,
    keep_count,
    scatter_tokens,
    select_top_k,
    share_between_halves,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_indices(batch: int, num_tokens: int, k: int, seed: int = 0) -> Tensor:
    return select_top_k(normal(batch, num_tokens, seed=seed), k)


# --- keep_count -----------------------------------------------------------------------------


@given(st.integers(1, 20_000), st.data())
def test_a_share_of_whole_tokens_is_met_exactly(num_tokens, data):
    """floor(100 * 0.29) is 28 in floats; p / N must give p, for every p and N."""
    k = data.draw(st.integers(1, num_tokens))
    assert keep_count(num_tokens, k / num_tokens) == k


@given(st.integers(1, 20_000), st.floats(1e-6, 1.0))
def test_keep_count_is_the_floor_inside_its_bounds(num_tokens, ratio):
    k = keep_count(num_tokens, ratio)
    if ratio >= 1 - 0.5 / num_tokens:
        assert k == num_tokens
    else:
        # Exact arithmetic; what lies within 1e-6 below a whole number counts as that number.
        exact = Fraction(ratio) * num_tokens
        assert k in {max(1, int(exact)), max(1, int(exact + Fraction(1001, 10**9)))}
    assert 1 <= k <= num_tokens


def test_a_ratio_that_a_sigmoid_can_reach_keeps_all_tokens():
    assert keep_count(4096, 1 - 0.5 / 4096) == 4096
    assert keep_count(4096, 1 - 0.51 / 4096) == 4095
    assert keep_count(1, 0.01) == 1


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, float("nan")])
def test_keep_count_refuses_ratios_outside_the_range(ratio: float):
    with pytest.raises(ValueError, match=r"keep_ratio must lie in \(0, 1\].*share KEPT"):
        keep_count(64, ratio)


def test_keep_count_refuses_no_tokens():
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        keep_count(0, 0.5)


# --- select_top_k ---------------------------------------------------------------------------

# Few distinct values, so that most draws hold ties.
tied_rows = st.lists(st.integers(-2, 2), min_size=1, max_size=30)


@given(tied_rows, st.data())
def test_the_k_best_are_chosen_the_first_among_equals_in_ascending_order(row, data):
    k = data.draw(st.integers(1, len(row)))
    chosen = select_top_k(torch.tensor([row], dtype=torch.float32), k)[0].tolist()
    assert chosen == sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_equal_scores_keep_the_first_tokens(dtype: torch.dtype):
    chosen = select_top_k(torch.zeros(3, 1000, dtype=dtype), 137)
    assert torch.equal(chosen, torch.arange(137).repeat(3, 1))


def test_each_row_is_chosen_by_itself():
    scores = normal(4, 64)
    assert torch.equal(
        select_top_k(scores, 20), torch.cat([select_top_k(row, 20) for row in scores.split(1)])
    )


def test_infinite_scores_force_and_forbid_tokens():
    scores = torch.tensor([[0.0, -float("inf"), float("inf"), 1.0]])
    assert select_top_k(scores, 3).tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("k", [0, -1, 65])
def test_k_outside_the_range_is_an_error_that_names_it(k: int):
    with pytest.raises(ValueError, match=rf"\[1, N\] = \[1, 64\], got {k}.*for_tokens\(64\)"):
        select_top_k(torch.zeros(2, 64), k)


def test_all_tokens_and_one_token():
    scores = normal(2, 9)
    assert torch.equal(select_top_k(scores, 9), torch.arange(9).repeat(2, 1))
    assert torch.equal(select_top_k(scores, 1), scores.argmax(-1, keepdim=True))


# --- guidance halves ------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 1000))
def test_guidance_halves_share_the_elementwise_maximum(half, num_tokens, seed):
    scores = normal(2 * half, num_tokens, seed=seed)
    shared = share_between_halves(scores)
    for sample in range(half):
        expected = torch.stack([scores[sample], scores[half + sample]]).amax(0)
        assert torch.equal(shared[sample], expected)
        assert torch.equal(shared[half + sample], expected)


def test_a_token_that_one_half_wants_is_kept_in_both():
    conditional = torch.tensor([[9.0, 0.0, 1.0, 2.0]])
    unconditional = torch.tensor([[0.0, 8.0, 1.0, 2.0]])
    chosen = select_top_k(share_between_halves(torch.cat([unconditional, conditional])), 2)
    assert chosen.tolist() == [[0, 1], [0, 1]]


def test_an_odd_batch_has_no_halves():
    with pytest.raises(ValueError, match="even batch, got 3 samples"):
        share_between_halves(torch.zeros(3, 4))


# --- gather and scatter ---------------------------------------------------------------------


def test_flat_rows_are_the_rows_of_the_flattened_batch():
    indices = torch.tensor([[0, 2], [1, 3]])
    assert flat_rows(indices, 5).tolist() == [0, 2, 6, 8]


sizes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5))


@given(sizes, st.data())
def test_gather_and_scatter_undo_each_other(size, data):
    batch, num_tokens, width = size
    k = data.draw(st.integers(1, num_tokens))
    x, new = normal(batch, num_tokens, width), normal(batch, k, width, seed=1)
    indices = some_indices(batch, num_tokens, k, seed=data.draw(st.integers(0, 99)))
    gathered = gather_tokens(x, indices)
    for sample in range(batch):
        assert torch.equal(gathered[sample], x[sample, indices[sample]])
    assert torch.equal(scatter_tokens(x, indices, gathered), x)
    scattered = scatter_tokens(x, indices, new)
    assert torch.equal(gather_tokens(scattered, indices), new)
    rejected = torch.ones(batch, num_tokens, dtype=torch.bool).scatter(1, indices, False)
    assert torch.equal(scattered[rejected], x[rejected])


def test_gather_takes_any_order_and_scatter_puts_it_back():
    x = normal(2, 8, 3)
    order = normal(2, 8, seed=1).argsort(-1)
    gathered = gather_tokens(x, order)
    assert torch.equal(gathered[1, 0], x[1, order[1, 0]])
    assert torch.equal(scatter_tokens(torch.zeros_like(x), order, gathered), x)


def test_neither_input_is_modified_and_views_are_fine():
    whole = normal(2, 6, 8)
    x = whole.transpose(1, 2)[:, :, ::2]  # not contiguous
    kept = x.clone()
    indices = some_indices(2, 8, 3)
    scattered = scatter_tokens(x, indices, -gather_tokens(x, indices))
    assert torch.equal(x, kept)
    assert scattered.data_ptr() != x.data_ptr()
    assert torch.equal(scattered.abs(), kept.abs())


def test_gradients_follow_the_path_that_ran():
    base = normal(2, 7, 3).requires_grad_()
    updated = normal(2, 4, 3, seed=1).requires_grad_()
    indices = some_indices(2, 7, 4)
    weight = normal(2, 7, 3, seed=2)
    (scatter_tokens(base, indices, updated) * weight).sum().backward()
    chosen = torch.zeros(2, 7, dtype=torch.bool).scatter(1, indices, True)
    assert torch.equal(base.grad, torch.where(chosen[..., None], 0.0, weight))
    assert torch.equal(updated.grad, gather_tokens(weight, indices))


def test_gradients_pass_gradcheck():
    indices = some_indices(2, 5, 3)
    base = normal(2, 5, 2).requires_grad_()
    updated = normal(2, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, indices), (base,))
    assert torch.autograd.gradcheck(lambda x, y: scatter_tokens(x, indices, y), (base, updated))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_scatter_keeps_no_tokens_for_backward(batch: int):
    base, updated = torch.randn(batch, 6, 4), torch.randn(batch, 3, 4, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scattered = scatter_tokens(base, torch.tensor([[5, 0, 2]] * batch), updated)
    assert [t.dtype for t in kept] == [torch.int64]  # where they lie
    scattered.sum().backward()
    assert torch.equal(updated.grad, torch.ones_like(updated))


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("update_dtype", DTYPES)
def test_the_base_sets_the_dtype_of_a_scatter(base_dtype, update_dtype):
    """Under autocast a block returns another dtype than it was given."""
    base = normal(2, 6, 4).to(base_dtype)
    updated = normal(2, 2, 4, seed=1).to(update_dtype).requires_grad_()
    indices = some_indices(2, 6, 2)
    result = scatter_tokens(base, indices, updated)
    assert result.dtype == base_dtype
    assert torch.equal(gather_tokens(result, indices), updated.detach().to(base_dtype))
    result.sum().backward()
    assert torch.equal(updated.grad, torch.ones_like(updated))


def test_a_block_under_autocast_is_scattered_into_single_precision():
    x, weight = normal(2, 6, 4, dtype=torch.float32), normal(4, 4, dtype=torch.float32)
    indices = some_indices(2, 6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gather_tokens(x, indices) @ weight
        assert out.dtype == torch.bfloat16
        result = scatter_tokens(x, indices, out)
    assert result.dtype == torch.float32
    assert torch.equal(gather_tokens(result, indices), out.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_tokens_is_exact_in_every_dtype(dtype: torch.dtype):
    x = normal(2, 33, 5).to(dtype)
    indices = some_indices(2, 33, 17)
    moved = scatter_tokens(torch.zeros_like(x), indices, gather_tokens(x, indices))
    chosen = torch.zeros(2, 33, dtype=torch.bool).scatter(1, indices, True)
    assert torch.equal(moved, torch.where(chosen[..., None], x, torch.zeros_like(x)))
