"""The Frechet distance, against what is known of Gaussians and against another formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiva_dit.metrics import frechet_distance


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whitened(num: int, width: int, seed: int = 0) -> Tensor:
    """Samples whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = normal(num, width, seed=seed)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(torch.cov(x.T).reshape(width, width))
    return torch.linalg.solve_triangular(root, x.T, upper=False).T


def test_known_gaussians():
    """Mean 3 apart, standard deviations (1, 2) against (4, 2): 9 + (1 - 4)^2 = 18."""
    x = whitened(50, 2) * torch.tensor([1.0, 2.0])
    y = whitened(80, 2, seed=1) * torch.tensor([4.0, 2.0]) + torch.tensor([0.0, 3.0])
    assert frechet_distance(x, y) == pytest.approx(18.0, abs=1e-9)


def test_one_feature():
    x, y = whitened(20, 1), 3.0 * whitened(20, 1, seed=1) + 2.0
    assert frechet_distance(x, y) == pytest.approx((1 - 3) ** 2 + 2.0**2, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_against_the_eigenvalues_of_the_product(seed, width):
    """Tr (C1 C2)^(1/2) from the eigenvalues of the unsymmetric product itself."""
    mix = normal(width, width, seed=seed + 2)
    x = normal(40, width, seed=seed) @ mix
    y = normal(50, width, seed=seed + 1) + 1.0
    cov_x = torch.cov(x.T).reshape(width, width)
    cov_y = torch.cov(y.T).reshape(width, width)
    cross = torch.linalg.eigvals(cov_x @ cov_y).real.clamp_min(0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    # The root of an eigenvalue near 0 keeps only half of its digits: 1e-8 of the largest.
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 20))
def test_a_distance_is_symmetric_not_negative_and_zero_to_itself(seed, width, num):
    x, y = normal(num, width, seed=seed), 2 * normal(num + 3, width, seed=seed + 1)
    distance = frechet_distance(x, y)
    # Roots of rounding near 0 (fewer samples than features have a singular covariance).
    assert frechet_distance(y, x) == pytest.approx(distance, abs=1e-5)
    assert distance >= -1e-6
    assert abs(frechet_distance(x, x)) <= 1e-5
    assert abs(frechet_distance(x, x.flip(0))) <= 1e-5  # the order of the samples is no matter


@given(st.integers(0, 10_000))
def test_shifts_rotations_and_scales(seed):
    x, y = normal(30, 4, seed=seed), normal(30, 4, seed=seed + 1) + 0.5
    distance = frechet_distance(x, y)
    shift = normal(4, seed=seed + 2)
    rotation = torch.linalg.qr(normal(4, 4, seed=seed + 3)).Q
    assert frechet_distance(x + shift, y + shift) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * distance, rel=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), abs=1e-6)


def test_single_precision_features_far_from_zero_are_handled_in_double():
    """At a mean of 1e4, float32 moments would be off by more than the distance itself."""
    x = (normal(200, 3) + 1e4).float()
    y = (1.1 * normal(200, 3, seed=1) + 1e4).float()
    exact = frechet_distance(x.double() - 1e4, y.double() - 1e4)
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("num", "other"), [(1, 5), (5, 1), (0, 5)])
def test_a_covariance_needs_two_samples(num: int, other: int):
    with pytest.raises(ValueError, match=f"at least 2 samples.*got {num} and {other}"):
        frechet_distance(normal(num, 3), normal(other, 3))
