"""The budget: strata, and the controller of the mean keep ratio (Eq. 12, 13, 15, 25-28)."""

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiva_dit.core.budget import (
    BudgetConfig,
    BudgetController,
    logit_normal,
    stratified,
    stratified_ratios,
)
from shiva_dit.modules.policy import AdaptiveRatioPolicy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- strata -----------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 2**31))
def test_each_stratum_gets_one_draw(num_strata, seed):
    draws = stratified(num_strata, seeded(seed))
    assert draws.shape == (num_strata,)
    places = draws.double() * num_strata - torch.arange(num_strata)
    # Rounding of float32 near 1, times the number of strata.
    assert places.min() >= -6e-8 * num_strata
    assert places.max() <= 1 + 6e-8 * num_strata


def test_draws_follow_the_generator_and_are_independent_across_strata():
    assert torch.equal(stratified(16, seeded(1)), stratified(16, seeded(1)))
    draws = torch.stack([stratified(4, g) for g in [seeded()] for _ in range(4000)])
    inside = draws * 4 - torch.arange(4)
    # Uniform in each stratum: standard errors are 0.289 / sqrt(4000) = 0.0046 and 1 / 63 = 0.016.
    assert (inside.mean(0) - 0.5).abs().max() <= 5 * 0.0046
    assert (torch.corrcoef(inside.T) - torch.eye(4)).abs().max() <= 5 * 0.016


def test_stratified_times_cut_the_variance_of_the_mean_ratio():
    """Linear r(t) at B = 4: B^2 = 16 times less variance (the acceptance bound is 10)."""
    generator = seeded()

    def ratio(t: Tensor) -> Tensor:
        return 0.4 + 0.4 * t

    strata = torch.stack([ratio(stratified(4, generator)).mean() for _ in range(4000)])
    uniform = ratio(torch.rand(4000, 4, generator=generator)).mean(1)
    gain = float(uniform.var() / strata.var())
    assert gain >= 10
    # The relative standard error of each variance is sqrt(2 / 4000) = 2.2%, together 3.2%.
    assert gain == pytest.approx(16.0, rel=5 * 0.032)
    assert float(strata.mean()) == pytest.approx(0.6, abs=1e-3)  # unbiased; se 2.3e-4


@given(st.integers(1, 50), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_stratified_ratios_take_one_from_each_interval(num_groups, first, second, seed):
    low, high = sorted((first, second))
    ratios = stratified_ratios(num_groups, low, high, seeded(seed)).sort().values.double()
    edges = low + (high - low) * torch.arange(num_groups + 1, dtype=torch.float64) / num_groups
    assert (ratios >= edges[:-1] - 1e-6).all()  # rounding of float32
    assert (ratios <= edges[1:] + 1e-6).all()


def test_stratified_ratios_come_in_random_order():
    orders = {
        tuple(stratified_ratios(3, 0.2, 0.8, seeded(seed)).argsort().tolist())
        for seed in range(100)
    }
    assert len(orders) == 6


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.6, 0.5), (0.5, 1.1), (-0.1, 0.5)])
def test_ratios_outside_the_range_are_refused(low: float, high: float):
    with pytest.raises(ValueError, match="0 < low <= high <= 1"):
        stratified_ratios(4, low, high, seeded())


def test_there_is_at_least_one_stratum():
    with pytest.raises(ValueError, match="num_strata must be at least 1, got 0"):
        stratified(0, seeded())


def test_logit_normal_quantiles():
    # The normal quantiles of 0.158655, 0.5 and 0.841345 are -1, 0 and 1.
    quantiles = torch.tensor([0.15865525393145707, 0.5, 0.8413447460685429], dtype=torch.float64)
    expected = torch.sigmoid(0.3 + 1.7 * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(logit_normal(quantiles, 0.3, 1.7), expected, rtol=0, atol=1e-12)


def test_logit_normal_is_increasing_and_stays_inside_the_unit_interval():
    times = logit_normal(torch.linspace(0, 1, 1001))
    assert times.dtype == torch.float32
    assert (times.diff() > 0).all()
    assert 0 < float(times[0]) < 0.01
    assert 0.99 < float(times[-1]) < 1
    # One draw per stratum becomes one draw per logit-normal stratum.
    edges = logit_normal(torch.linspace(0, 1, 9))
    draws = logit_normal(stratified(8, seeded()))
    assert (draws >= edges[:-1]).all()
    assert (draws <= edges[1:]).all()


# --- the controller's equations ---------------------------------------------------------------


def test_loss_uses_the_updated_mean():
    """Eq. 12 and 13 by hand: mu = 0.2 * 0.9 + 0.8 * 0.6 = 0.66, then 0.2 * 0.5 + 0.8 * 0.66."""
    controller = BudgetController(0.6, BudgetConfig(weight=5.0, momentum=0.2))
    for value, mean in ((0.9, 0.66), (0.5, 0.628)):
        ratio = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        loss = controller.loss(ratio)
        loss.backward()
        assert controller.mean == pytest.approx(mean, abs=1e-12)
        assert float(ratio.grad) == pytest.approx(2 * 5.0 * (mean - 0.6), abs=1e-12)
        assert float(loss.detach()) == pytest.approx(value * 2 * 5.0 * (mean - 0.6), abs=1e-12)


def test_the_integral_term_sums_the_errors():
    controller = BudgetController(0.5, BudgetConfig(weight=1.0, momentum=1.0, integral=0.25))
    gradients = []
    for value in (0.75, 0.25, 1.0):
        ratio = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        controller.loss(ratio).backward()
        gradients.append(float(ratio.grad))
    # Errors 0.25, -0.25, 0.5; d = 0.25 of their running sum: 0.0625, 0, 0.125.
    assert gradients == [0.5 + 0.0625, -0.5, 1.0 + 0.125]


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_the_loss_pushes_towards_the_target(target, value):
    controller = BudgetController(target)
    ratio = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    controller.loss(ratio).backward()
    # Equal up to the rounding of the running mean.
    expected = 2 * 5.0 * 0.2 * (value - target)
    assert float(ratio.grad) == pytest.approx(expected, abs=1e-14)


def test_a_resumed_controller_goes_on_as_if_nothing_had_happened():
    config = BudgetConfig(integral=0.01)
    whole, stopped = BudgetController(0.4, config), BudgetController(0.4, config)
    values = torch.rand(20, generator=seeded(), dtype=torch.float64)
    for value in values[:10]:
        whole.loss(value)
        stopped.loss(value)
    resumed = BudgetController(0.4, config)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for value in values[10:]:
        assert torch.equal(whole.loss(value), resumed.loss(value))
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mean_that_is_not_finite_is_an_error_and_changes_nothing(value: float):
    controller = BudgetController(0.4)
    with pytest.raises(ValueError, match="must be finite"):
        controller.loss(torch.tensor(value))
    assert controller.state_dict() == {"mean": 0.4, "dual": 0.0}


@pytest.mark.parametrize("target", [0.0, -0.5, 1.5, float("nan")])
def test_a_target_outside_the_range_is_refused(target: float):
    with pytest.raises(ValueError, match=r"target keep ratio must lie in \(0, 1\]"):
        BudgetController(target)


@pytest.mark.parametrize(
    "values",
    [{"weight": 0.0}, {"weight": -1.0}, {"momentum": 0.0}, {"momentum": 1.1}, {"integral": -0.1}],
)
def test_settings_outside_the_range_are_refused(values: dict[str, float]):
    (name,) = values
    with pytest.raises(ValueError, match=name):
        BudgetConfig(**values)


# --- the closed loop: policy, task and controller ---------------------------------------------

TARGET = 0.6
GRID = (torch.arange(8) + 0.5) / 8


def task_loss(ratios: Tensor) -> Tensor:
    """Convex, wants all tokens: |dL/dr| = 0.25 (1 - r) = 0.1 at r = 0.6."""
    return 0.125 * (1.0 - ratios).square().mean()


def no_task(ratios: Tensor) -> Tensor:
    return 0.0 * ratios.sum()


def train(
    ratios: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    config: BudgetConfig,
    num_steps: int,
    task: Callable[[Tensor], Tensor] = task_loss,
) -> list[float]:
    """The mean ratio at each step of training against task and budget."""
    controller = BudgetController(TARGET, config)
    means = []
    for _ in range(num_steps):
        current = ratios()
        mean = current.mean()
        optimizer.zero_grad()
        (task(current) + controller.loss(mean)).backward()
        optimizer.step()
        means.append(float(mean.detach()))
    return means


def steady_error(means: list[float]) -> float:
    return sum(means[-50:]) / 50 - TARGET


@pytest.mark.parametrize("weight", [1.0, 2.0, 5.0])
def test_steady_error_is_the_task_gradient_over_twice_the_weight(weight: float):
    """The real policy of 24 blocks from 0.9, at the paper's learning rate."""
    torch.manual_seed(0)
    policy = AdaptiveRatioPolicy(24, 0.9)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)
    means = train(lambda: policy(GRID)[:, 1:], optimizer, BudgetConfig(weight=weight), 300)
    error = steady_error(means)
    assert error == pytest.approx(0.25 * (1.0 - TARGET) / (2 * weight), rel=0.35)  # acceptance
    # Where both gradients balance, 2 lambda e = 0.25 (0.4 - e). Measured within 0.3%.
    assert error == pytest.approx(0.1 / (2 * weight + 0.25), rel=0.05)


def test_an_integral_term_removes_the_steady_error():
    """A table of ratios: what is left decays by 1 - 0.003 / 2.25 per step, to 2% in 3000."""
    results = {}
    for integral in (0.0, 0.003):
        logits = torch.full((8, 23), 2.0, requires_grad=True)
        results[integral] = steady_error(
            train(
                logits.sigmoid,
                torch.optim.SGD([logits], lr=50.0),
                BudgetConfig(weight=1.0, integral=integral),
                3000,
            )
        )
    assert abs(results[0.003]) < 0.003  # the acceptance bound
    assert results[0.0] == pytest.approx(0.1 / 2.25, rel=1e-3)


def test_without_a_task_the_target_is_met():
    logits = torch.full((8, 23), 2.0, requires_grad=True)
    means = train(
        logits.sigmoid, torch.optim.SGD([logits], lr=50.0), BudgetConfig(), 300, task=no_task
    )
    # The error decays geometrically: down to float32 after 300 steps.
    assert abs(steady_error(means)) <= 1e-6
