"""Soft ranks and inclusion scores (Eq. 5, 6, 16-20, 30)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiva_dit.core.soft_rank import inclusion_scores, soft_rank, standardize

# Largest error of the fits of sigmoid(-z) on z >= 0, by number of terms; measured, rounded up.
FIT_ERROR = {4: 1.92e-5, 6: 2.77e-7, 8: 1.35e-8}
METHODS = ("exp_sum", "chunked")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_rank(scores: Tensor, tau: float) -> Tensor:
    """Eq. 5 word for word, N x N comparisons and autograd's own backward."""
    differences = scores[:, None, :] - scores[:, :, None]
    other = ~torch.eye(scores.shape[-1], dtype=torch.bool)
    return 1.0 + torch.where(other, torch.sigmoid(differences / tau), 0.0).sum(-1)


def rank_and_gradient(rank, scores: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    ranks = rank(scores)
    (gradient,) = torch.autograd.grad(ranks, scores, upstream)
    return ranks.detach(), gradient


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# --- exactness ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("tau", [0.2, 0.002])
def test_chunked_is_the_definition(chunk_size: int, tau: float):
    scores, upstream = normal(2, 100), normal(2, 100, seed=1)
    ranks, gradient = rank_and_gradient(
        lambda s: soft_rank(s, tau, method="chunked", chunk_size=chunk_size), scores, upstream
    )
    expected, expected_gradient = rank_and_gradient(lambda s: naive_rank(s, tau), scores, upstream)
    # The acceptance bound; only the order of float64 sums differs (measured: below 1e-12).
    assert (ranks - expected).abs().max() <= 1e-10
    assert (gradient - expected_gradient).abs().max() <= 1e-10


# Gradient errors grow slowly as tau falls. 6 terms: the acceptance bound. 4 and 8 terms: twice the
# largest error measured over 8 seeds at tau = 0.002 (4.6e-4 and 6.0e-7).
GRADIENT_BOUND = {4: 1e-3, 6: 1e-5, 8: 1.2e-6}


@pytest.mark.parametrize("tau", [0.2, 0.02, 0.002])
@pytest.mark.parametrize("num_terms", [4, 6, 8])
def test_exp_sum_matches_the_exact_ranks_and_gradients(num_terms: int, tau: float):
    num_tokens = 300
    scores, upstream = normal(2, num_tokens), normal(2, num_tokens, seed=1)
    ranks, gradient = rank_and_gradient(
        lambda s: soft_rank(s, tau, num_terms=num_terms), scores, upstream
    )
    expected, expected_gradient = rank_and_gradient(
        lambda s: soft_rank(s, tau, method="chunked"), scores, upstream
    )
    # Derived: each of the N - 1 pairs is off by at most the error of the fit.
    assert (ranks - expected).abs().max() <= FIT_ERROR[num_terms] * (num_tokens - 1)
    assert relative(gradient, expected_gradient) <= GRADIENT_BOUND[num_terms]


@pytest.mark.parametrize("num_terms", [4, 6, 8])
def test_each_fit_reaches_its_stated_error_and_no_other(num_terms: int):
    """Two tokens make one pair: rank of the better one is 1 + sigma(-z)."""
    z = torch.linspace(0.0, 40.0, 40_001, dtype=torch.float64)
    ranks = soft_rank(torch.stack([z, torch.zeros_like(z)], dim=1), 1.0, num_terms=num_terms)
    error = (ranks[:, 0] - 1.0 - torch.sigmoid(-z)).abs().max()
    # Rounded up, hence 1% less at most; a damaged digit of a or c is seen at once.
    assert 0.99 * FIT_ERROR[num_terms] <= float(error) <= FIT_ERROR[num_terms]


@pytest.mark.parametrize("method", METHODS)
def test_backward_passes_gradcheck(method: str):
    # Distinct scores: at ties the sum of exponentials has a kink of the size of its error.
    scores = (3.0 * normal(2, 7)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: soft_rank(s, 0.7, method=method, chunk_size=3), (scores,)
    )


@pytest.mark.parametrize("method", METHODS)
def test_jacobian_has_the_signs_and_values_of_eq_17_to_19(method: str):
    tau, scores = 0.5, normal(1, 9)
    jacobian = torch.autograd.functional.jacobian(
        lambda s: (
            soft_rank(s, tau, method=method, num_terms=8)
            if method == "exp_sum"
            else soft_rank(s, tau, method=method)
        ),
        scores,
    )[0, :, 0, :]
    p = torch.sigmoid((scores - scores.T) / tau)
    slopes = p * (1 - p) / tau
    slopes.fill_diagonal_(0.0)
    expected = slopes - torch.diag(slopes.sum(1))
    # Measured 2.0e-7 for 8 exponentials; the exact method differs by the rounding of float64, in
    # sums of 9 slopes of up to 1 / (4 tau) = 0.5.
    assert (jacobian - expected).abs().max() <= (4e-7 if method == "exp_sum" else 1e-13)
    assert (jacobian.diagonal() < 0).all()
    assert (jacobian[~torch.eye(9, dtype=torch.bool)] > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_ranks_become_integer_ranks_as_tau_falls(method: str):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    scores = -order.double()[None]  # neighbours are 1 apart, exp(-1 / 0.01) is below rounding
    ranks = soft_rank(scores, 0.01, method=method)
    assert torch.equal(ranks.round(), order.double()[None] + 1)
    assert (ranks - order - 1).abs().max() <= 1e-9  # rounding of float64 sums over 200 tokens


# --- invariants -----------------------------------------------------------------------------

score_rows = st.lists(
    st.floats(-50.0, 50.0, allow_nan=False, width=32), min_size=1, max_size=40
).map(lambda row: torch.tensor([row], dtype=torch.float64))
taus = st.sampled_from([0.002, 0.02, 0.2, 1.0, 10.0])


@given(score_rows, taus, st.sampled_from(METHODS))
def test_rows_sum_to_the_triangular_number_and_ranks_lie_in_range(scores, tau, method):
    num_tokens = scores.shape[1]
    ranks = soft_rank(scores, tau, method=method)
    # Pairs cancel whatever the fit is; what is left is rounding: e^x has a relative error of
    # |x| eps, with |x| <= 4.5 * 100 / 0.002 = 2e5 here, hence 5e-11 per pair.
    assert abs(float(ranks.sum()) - num_tokens * (num_tokens + 1) / 2) <= 1e-9 * num_tokens**2
    slack = FIT_ERROR[6] * num_tokens + 1e-9
    assert ranks.min() >= 1.0 - slack
    assert ranks.max() <= num_tokens + slack


@given(score_rows, taus, st.sampled_from(METHODS))
def test_a_constant_added_to_all_scores_or_upstream_gradients_changes_nothing(scores, tau, method):
    def rank(s):
        return soft_rank(s, tau, method=method)

    upstream = torch.linspace(-1, 1, scores.shape[1], dtype=torch.float64)[None].sin()
    ranks, gradient = rank_and_gradient(rank, scores, upstream)
    shifted, _ = rank_and_gradient(rank, scores + 64.0, upstream)
    _, same_gradient = rank_and_gradient(rank, scores, upstream + 1.0)
    # Scores that differ by less than rounding become ties: off by the error of the fit per pair.
    assert (ranks - shifted).abs().max() <= FIT_ERROR[6] * scores.shape[1] + 1e-8
    # Rounding of exponents up to 2e5 (see above).
    assert (gradient - same_gradient).abs().max() <= 1e-8 / tau
    assert abs(float(gradient.sum())) <= 1e-8 / tau  # w is symmetric: sum of dL/ds is 0


@given(score_rows, st.floats(0.01, 100.0))
def test_only_scores_over_tau_matter(scores, factor):
    ranks = soft_rank(scores, 0.5)
    assert torch.allclose(ranks, soft_rank(scores * factor, 0.5 * factor), rtol=0, atol=1e-9)


@given(score_rows, st.randoms(use_true_random=False))
def test_a_permutation_of_tokens_permutes_their_ranks(scores, random):
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    ranks, permuted = soft_rank(scores, 0.2), soft_rank(scores[:, order], 0.2)
    # Equal scores get ranks that differ by twice the error of the fit at 0, 6.4e-8, per pair.
    assert torch.allclose(permuted, ranks[:, order], rtol=0, atol=1.3e-7 * scores.shape[1])


def test_rows_do_not_see_each_other():
    scores = normal(3, 50)
    together = soft_rank(scores, 0.2)
    alone = torch.cat([soft_rank(row, 0.2) for row in scores.split(1)])
    # Exponents of up to 4.5 * 5 / 0.2 = 113 are rounded to 1e-14, in 50 terms of up to 1.
    assert (together - alone).abs().max() <= 1e-12


# --- edges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -7.5, 1e5])
def test_all_equal_scores(method: str, value: float):
    num_tokens, tau = 33, 0.2
    upstream = normal(2, num_tokens)
    ranks, gradient = rank_and_gradient(
        lambda s: soft_rank(s, tau, method=method),
        torch.full((2, num_tokens), value, dtype=torch.float64),
        upstream,
    )
    slack = FIT_ERROR[6] * num_tokens if method == "exp_sum" else 0.0
    assert (ranks - (num_tokens + 1) / 2).abs().max() <= slack
    # Closed form: all w are 1/4, so dL/ds_i = (sum_j G_j - N G_i) / (4 tau).
    expected = (upstream.sum(-1, keepdim=True) - num_tokens * upstream) / (4 * tau)
    # At z = 0 the 6-term fit has the slope sum a c = 0.2499816, 7.4e-5 below 1/4; at 1e5 the
    # exponents of 2e6 add rounding of 5e-10.
    assert relative(gradient, expected) <= (7.5e-5 if method == "exp_sum" else 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_1e5_tau(method: str, dtype: torch.dtype):
    tau = 0.002
    scores = 200.0 * torch.linspace(-1, 1, 101, dtype=dtype).flip(0)[None]  # |s| / tau = 1e5
    ranks, gradient = rank_and_gradient(
        lambda s: soft_rank(s, tau, method=method), scores, normal(1, 101).to(dtype)
    )
    # Neighbours are 2000 tau apart: ranks are the integers, and nothing can be moved.
    assert torch.allclose(ranks, torch.arange(1, 102, dtype=dtype)[None], rtol=0, atol=1e-5)
    # Exponents of 4.5e5 are rounded to 6e-11, times 10 (the largest a c), over tau: 3e-7 each.
    assert gradient.abs().max() <= (1e-5 if method == "exp_sum" else 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_one_far_outlier_leaves_the_others_exact(method: str):
    scores = torch.cat([normal(1, 30), torch.tensor([[2e4]], dtype=torch.float64)], dim=1)
    ranks, gradient = rank_and_gradient(
        lambda s: soft_rank(s, 0.2, method=method), scores, normal(1, 31, seed=1)
    )
    expected, expected_gradient = rank_and_gradient(
        lambda s: naive_rank(s, 0.2), scores, normal(1, 31, seed=1)
    )
    assert (ranks - expected).abs().max() <= FIT_ERROR[6] * 30
    assert relative(gradient, expected_gradient) <= 1e-5  # the acceptance bound


@pytest.mark.parametrize("method", METHODS)
def test_a_single_token_has_rank_one_and_no_gradient(method: str):
    ranks, gradient = rank_and_gradient(
        lambda s: soft_rank(s, 0.2, method=method),
        torch.tensor([[3.0], [-1e6]]),
        torch.ones(2, 1),
    )
    assert torch.equal(ranks, torch.ones(2, 1))
    assert torch.equal(gradient, torch.zeros(2, 1))


def test_16384_tokens_agree_with_the_definition_on_a_sample_of_rows():
    num_tokens, tau = 16384, 0.2
    scores, upstream = normal(1, num_tokens), normal(1, num_tokens, seed=1)
    ranks, gradient = rank_and_gradient(lambda s: soft_rank(s, tau), scores, upstream)
    rows = torch.arange(0, num_tokens, 331)
    p = torch.sigmoid((scores - scores[0, rows, None]) / tau)  # (rows, N)
    expected = p.sum(-1) + 0.5
    expected_gradient = (p * (1 - p) * (upstream - upstream[0, rows, None])).sum(-1) / tau
    assert (ranks[0, rows] - expected).abs().max() <= FIT_ERROR[6] * num_tokens
    assert relative(gradient[0, rows], expected_gradient) <= 1e-5  # the acceptance bound
    single = soft_rank(scores.float(), tau)
    # float32 keeps the scores to 2^-24 of 4 and the ranks to 2^-11: measured 1.5e-3 together.
    assert (single - ranks).abs().max() <= 4e-3


def test_ranks_keep_the_dtype_and_lose_only_its_rounding():
    scores = normal(2, 1024)
    exact = soft_rank(scores.float().double(), 0.2)
    ranks = soft_rank(scores.float(), 0.2)
    assert ranks.dtype == torch.float32
    # Half a unit in the last place of 1024, since the sums are taken in float64.
    assert (ranks.double() - exact).abs().max() <= 2.0**-14
    # Under autocast nothing changes.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_rank(scores.float(), 0.2), ranks)


@pytest.mark.parametrize("method", METHODS)
def test_tiny_gradients_survive(method: str):
    """A mean-reduced loss brings gradients of 1e-12 and less."""
    scores, upstream = normal(1, 64), normal(1, 64, seed=1)
    _, gradient = rank_and_gradient(lambda s: soft_rank(s, 0.2, method=method), scores, upstream)
    _, tiny = rank_and_gradient(
        lambda s: soft_rank(s, 0.2, method=method), scores, upstream * 2.0**-100
    )
    assert relative(tiny * 2.0**100, gradient) <= 1e-10  # rounding: powers of two are exact


@pytest.mark.parametrize("method", METHODS)
def test_memory_saved_for_backward_is_linear_in_the_number_of_tokens(method: str):
    def saved(num_tokens: int) -> int:
        sizes = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        scores = normal(2, num_tokens).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ranks = soft_rank(scores, 0.2, method=method)
        assert ranks.requires_grad
        return sum(sizes)

    # Scores and their order: twice B N at most.
    assert 0 < saved(512) <= 2 * 2 * 512
    assert saved(1024) == 2 * saved(512)


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, -0.2, float("nan")])
def test_a_temperature_must_be_positive(tau: float):
    with pytest.raises(ValueError, match="tau must be positive"):
        soft_rank(torch.zeros(1, 3), tau)
    with pytest.raises(ValueError, match="tau must be positive"):
        inclusion_scores(torch.ones(1, 3), 1.0, tau)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"num_terms must be one of \[4, 6, 8\], got 5"):
        soft_rank(torch.zeros(1, 3), 0.2, num_terms=5)
    # A run-time type check, where one is on, refuses the literal first, with a TypeError.
    with pytest.raises((ValueError, TypeError), match="method"):
        soft_rank(torch.zeros(1, 3), 0.2, method="pairs")


# --- inclusion scores -----------------------------------------------------------------------


@given(
    st.lists(st.floats(1.0, 50.0), min_size=1, max_size=50),
    st.floats(0.0, 50.0),
    st.floats(0.01, 1.0),
)
def test_inclusion_is_the_normalised_sigmoid_of_eq_30(ranks, k, tau):
    ranks = torch.tensor([ranks], dtype=torch.float64)
    expected = 1 / (1 + ((ranks - k) / (tau * ranks.shape[1])).exp())
    assert torch.allclose(inclusion_scores(ranks, k, tau), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gradient_of_all_inclusions_to_k(share: float):
    """The sum over ranks is an integral: sigma(k / (tau N)) - sigma((k - N) / (tau N))."""
    num_tokens, tau = 4096, 0.1
    k = torch.tensor(share * num_tokens, dtype=torch.float64, requires_grad=True)
    ranks = torch.arange(1, num_tokens + 1, dtype=torch.float64)[None]
    inclusion_scores(ranks, k, tau).sum().backward()
    ends = torch.tensor([share, share - 1.0], dtype=torch.float64) / tau
    expected = float(ends.sigmoid()[0] - ends.sigmoid()[1])
    # The sum differs from the integral by half a cell at each end, at most 1 / (4 tau N) each.
    assert float(k.grad) == pytest.approx(expected, abs=1.3e-3)


def test_inclusion_decides_between_the_ranks_around_k():
    inclusion = inclusion_scores(torch.arange(1.0, 101.0)[None], 30.0, 0.1)
    assert float(inclusion[0, 29]) == 0.5  # the last token kept
    assert (inclusion[0, :29] > 0.5).all()
    assert (inclusion[0, 30:] < 0.5).all()


# --- standardized scores --------------------------------------------------------------------


@given(st.floats(1e-2, 1e4), st.floats(-100.0, 100.0), st.integers(2, 64))
def test_standardized_scores_have_mean_zero_and_deviation_one(scale, shift, num_tokens):
    unit = normal(2, num_tokens)
    scores = unit * scale + shift
    result = standardize(scores)
    # eps = 1e-6 beside a variance of at least (0.01 * spread)^2 is what keeps it from 1.
    variance = scores.var(-1, correction=0)
    assert torch.allclose(result.mean(-1), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(result.var(-1, correction=0), variance / (variance + 1e-6), rtol=1e-9)
    assert torch.equal(result.argsort(-1), scores.argsort(-1))


def test_standardized_scores_of_equal_tokens_are_zero_with_a_finite_gradient():
    scores = torch.full((2, 8), 3.25, requires_grad=True)
    result = standardize(scores)
    assert torch.equal(result, torch.zeros(2, 8))
    result.backward(normal(2, 8, dtype=torch.float32))
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().max() <= 1e4  # at most |G - mean| / sqrt(eps) = 1e3 |G|


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_standardized_scores_are_at_least_single_precision(given_dtype, expected):
    scores = normal(2, 16).to(given_dtype)
    result = standardize(scores)
    assert result.dtype == expected
    reference = standardize(scores.double())
    # Rounding of float32: a few units in the last place of 4.
    assert (result.double() - reference).abs().max() <= 2e-6


def test_standardizing_keeps_ranks_from_collapsing():
    """Scores 100 times smaller than tau would all get rank (N + 1) / 2."""
    scores = 0.002 * normal(1, 512)
    collapsed = soft_rank(scores, 0.2)
    spread = soft_rank(standardize(scores), 0.2)
    assert float(collapsed.std()) < 10.0
    assert float(spread.std()) > 120.0  # integer ranks: sqrt((512^2 - 1) / 12) = 147.8
