"""Gradients of a hard selection (Eq. 7, 21-24): the gates, and the object that places them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shiva_dit.core.estimators import (
    EstimatorConfig,
    RejectedUpdate,
    gate,
    gate_input,
    selection_benefit,
)
from shiva_dit.core.selection import (
    best_tokens,
    gather_tokens,
    scatter_tokens,
    select_top_k,
)
from shiva_dit.core.soft_rank import inclusion_scores, soft_rank, standardize
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.methods.shiva import ShivaSelector
from shiva_dit.modules.router import ShivaRouter

B, N, D, K = 3, 20, 16, 8
TAU_RANK, TAU_SELECT = 0.2, 0.1
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Block(nn.Module):
    """A pre-norm attention block with its skip, as in a diffusion transformer."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        weights = 0.5 * normal(5, D, D, seed=42)
        self.q, self.k, self.v, self.out, self.ff = (w.to(dtype) for w in weights)
        self.on_value: Callable[[Tensor], Tensor] = lambda value: value

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, (D,))
        value = self.on_value(normed @ self.v)
        attended = F.scaled_dot_product_attention(normed @ self.q, normed @ self.k, value)
        y = x + attended @ self.out
        return y + F.silu(F.layer_norm(y, (D,)) @ self.ff)


def loss_of(out: Tensor) -> Tensor:
    """Curved, and different at every token."""
    return (out * normal(*out.shape, seed=7).to(out)).sum() + (0.3 * out).tanh().square().sum()


def rejected_mask(chosen: Tensor) -> Tensor:
    return torch.ones(B, N, dtype=torch.bool).scatter(1, chosen, False)


@dataclass
class Truth:
    """Gradients of the ungated pipeline at every place that an estimator looks at."""

    x: Tensor
    scores: Tensor
    chosen: Tensor
    value: Tensor
    update: Tensor
    grad_x: Tensor
    grad_entry: Tensor
    grad_value: Tensor
    grad_out: Tensor


@pytest.fixture(scope="module")
def truth() -> Truth:
    x, scores = normal(B, N, D), normal(B, N, seed=1)
    chosen = best_tokens(scores, K)
    block, seen = Block(), {}
    block.on_value = lambda value: seen.setdefault("value", value)
    base = x.clone().requires_grad_()
    entry = gather_tokens(base, chosen)
    after = block(entry)
    out = scatter_tokens(base, chosen, after)
    grads = torch.autograd.grad(loss_of(out), (base, entry, seen["value"], out))
    return Truth(x, scores, chosen, seen["value"].detach(), (after - entry).detach(), *grads)


# --- closed forms of the chain, word for word from the equations ------------------------------


def closed_form(d: Tensor, scores: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """dL/ds and dL/dk (Eq. 24) from D = dL/dpi."""
    p = torch.sigmoid((scores[:, None, :] - scores[:, :, None]) / TAU_RANK)
    ranks = p.sum(-1) + 0.5
    inclusion = torch.sigmoid((k - ranks) / (TAU_SELECT * N))
    slope = d * inclusion * (1 - inclusion) / (TAU_SELECT * N)
    upstream = -slope  # G = dL/dr
    differences = upstream[:, None, :] - upstream[:, :, None]
    ds = (p * (1 - p) * differences).sum(-1) / TAU_RANK
    return ds, slope.sum()


def paper_inclusion_gradient(truth: Truth) -> Tensor:
    """Eq. 7 from the gradients of the ungated pipeline."""
    d = -(truth.grad_out * truth.x).sum(-1)
    selected = (truth.grad_entry * gather_tokens(truth.x, truth.chosen)).sum(-1)
    return d.scatter(1, truth.chosen, selected)


def residual_inclusion_gradient(
    truth: Truth, rejected_update: Tensor | None, kv_gate: bool
) -> Tensor:
    d = torch.zeros(B, N, dtype=torch.float64)
    if rejected_update is not None:
        d = (truth.grad_out * rejected_update).sum(-1)
    selected = (gather_tokens(truth.grad_out, truth.chosen) * truth.update).sum(-1)
    if kv_gate:
        selected = selected + (truth.grad_value * truth.value).sum(-1)
    return d.scatter(1, truth.chosen, selected)


# --- the paper's estimator --------------------------------------------------------------------


def run_paper(truth: Truth, gated_input: Callable[..., Tensor]):
    x = truth.x.clone().requires_grad_()
    scores = truth.scores.clone().requires_grad_()
    k = torch.tensor(K + 0.3, dtype=torch.float64, requires_grad=True)
    inclusion = inclusion_scores(soft_rank(scores, TAU_RANK, method="chunked"), k, TAU_SELECT)
    inclusion.retain_grad()
    gated = gated_input(x, inclusion, truth.chosen)
    out = scatter_tokens(gated, truth.chosen, Block()(gather_tokens(gated, truth.chosen)))
    loss_of(out).backward()
    return inclusion.grad, scores.grad, k.grad, x.grad, out.detach()


def test_paper_estimator_is_the_closed_form(truth: Truth):
    d, ds, dk, dx, _ = run_paper(truth, gate_input)
    expected = paper_inclusion_gradient(truth)
    expected_ds, expected_dk = closed_form(expected, truth.scores, K + 0.3)
    # Rounding of float64: D up to 30, sums of all tokens or of the chosen ones; slopes up to
    # 1 / (4 tau) = 1.25 and 1 / (4 tau N).
    assert (d - expected).abs().max() <= 1e-13
    assert (ds - expected_ds).abs().max() <= 1e-13
    assert (dk - expected_dk).abs() <= 1e-13
    assert torch.equal(dx, truth.grad_x)  # the gate costs the backbone nothing
    assert ds.sum(-1).abs().max() <= 1e-13  # moving all scores alike changes nothing
    assert expected_ds.abs().max() > 0.1  # or the bounds above would say nothing


def test_paper_estimator_equals_the_multiplication_by_one_plus_zero(truth: Truth):
    """x (1 +- e) with e = pi - sg(pi): another way to write Eq. 7, by plain autograd."""

    def multiply(x: Tensor, inclusion: Tensor, chosen: Tensor) -> Tensor:
        e = (inclusion - inclusion.detach())[..., None]
        sign = torch.where(rejected_mask(chosen), -1.0, 1.0)[..., None]
        return x * (1 + sign * e)

    for ours, theirs in zip(run_paper(truth, gate_input), run_paper(truth, multiply), strict=True):
        assert (ours - theirs).abs().max() <= 1e-13  # rounding of float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_paper_gate_leaves_the_forward_to_the_bit(dtype: torch.dtype):
    x, block = normal(B, N, D).to(dtype), Block(dtype)
    scores = normal(B, N, seed=1, dtype=torch.float32).requires_grad_()
    inclusion = inclusion_scores(soft_rank(scores, TAU_RANK), float(K), TAU_SELECT)
    chosen = best_tokens(scores.detach(), K)
    gated = gate_input(x, inclusion, chosen)
    out = scatter_tokens(gated, chosen, block(gather_tokens(gated, chosen)))
    plain = scatter_tokens(x, chosen, block(gather_tokens(x, chosen)))
    assert out.dtype == dtype
    assert torch.equal(out, plain)
    loss_of(out.float()).backward()
    assert scores.grad.dtype == torch.float32
    assert scores.grad.abs().max() > 0


# --- single gates -----------------------------------------------------------------------------


def test_a_gate_passes_value_and_gradient_and_measures_the_direction():
    value = normal(2, 5, 4).requires_grad_()
    direction = normal(2, 5, 4, seed=1).requires_grad_()
    inclusion = torch.full((2, 5), 0.5, dtype=torch.float64, requires_grad=True)
    upstream = normal(2, 5, 4, seed=2)
    passed = gate(value, direction, inclusion)
    passed.backward(upstream)
    assert torch.equal(passed, value)
    assert torch.equal(value.grad, upstream)
    assert direction.grad is None
    assert torch.equal(inclusion.grad, (upstream * direction.detach()).sum(-1))


def test_one_direction_serves_all_tokens():
    value, direction = normal(2, 5, 4), normal(2, 1, 4, seed=1)
    inclusion = torch.full((2, 5), 0.5, dtype=torch.float64, requires_grad=True)
    upstream = normal(2, 5, 4, seed=2)
    gate(value, direction, inclusion).backward(upstream)
    assert torch.equal(inclusion.grad, (upstream * direction).sum(-1))


def test_half_precision_gradients_are_summed_in_single_precision():
    """4097 ones: bfloat16 would say 4096, float16 would say 4096 too."""
    for dtype in (torch.bfloat16, torch.float16):
        value = torch.ones(1, 2, 4097, dtype=dtype)
        inclusion = torch.full((1, 2), 0.5, requires_grad=True)
        gate(value, value, inclusion).backward(torch.ones_like(value))
        assert inclusion.grad.tolist() == [[4097.0, 4097.0]]


def test_the_gate_is_the_multiplication_of_the_benefit(truth: Truth):
    """pi (x + F) + (1 - pi) (x + u), by plain autograd at every token's own pi."""
    instead, teacher = normal(B, N, D, seed=5), normal(B, N, D, seed=6)
    chosen, rest = truth.chosen, truth.x + instead
    output = scatter_tokens(rest, chosen, gather_tokens(truth.x, chosen) + truth.update)
    benefit = selection_benefit(
        "teacher", truth.x, chosen, output, instead=instead, teacher=teacher
    )
    inclusion = torch.full((B, N), 0.5, dtype=torch.float64, requires_grad=True)
    gated = gate(output, benefit, inclusion)
    assert torch.equal(gated, output)
    loss_of(gated).backward()
    pi = (~rejected_mask(chosen)).double().requires_grad_()
    update = scatter_tokens(teacher, chosen, truth.update)
    mixture = pi[..., None] * (truth.x + update) + (1 - pi[..., None]) * rest
    loss_of(mixture).backward()
    # Sums of 16 terms of float64, and output - x is the update up to its rounding.
    assert (inclusion.grad - pi.grad).abs().max() <= 1e-13


def test_descent_keeps_tokens_whose_update_lowers_the_loss():
    """The sign: a step against dL/ds must raise a helpful token and lower a harmful one."""
    scores = torch.tensor([[1.0, 0.9]], dtype=torch.float64, requires_grad=True)
    inclusion = inclusion_scores(soft_rank(scores, 0.5), 1.0, 0.5)
    output = torch.ones(1, 2, 1, dtype=torch.float64)
    chosen = torch.tensor([[0, 1]])
    benefit = selection_benefit("none", torch.zeros_like(output), chosen, output)
    gated = gate(output, benefit, inclusion)
    target = torch.tensor(
        [[[-1.0], [1.0]]], dtype=torch.float64
    )  # harms the first, helps the other
    (gated - target).square().sum().backward()
    assert float(scores.grad[0, 0]) > 0 > float(scores.grad[0, 1])


# --- estimates of the rejected update ---------------------------------------------------------


def estimate(kind: str, x: Tensor, chosen: Tensor, update: Tensor, **options) -> Tensor:
    """The benefit of selection, given the update itself."""
    after = gather_tokens(x, chosen) + update
    return selection_benefit(kind, x, chosen, scatter_tokens(x, chosen, after), **options)


def direct_ridge(x: Tensor, chosen: Tensor, update: Tensor, ridge: float) -> Tensor:
    """Least squares on the rows [A; sqrt(ridge) I], [F; 0]: another route than normal equations."""
    results = []
    for sample in range(len(x)):
        row = x[sample]
        centred = row - row.mean(-1, keepdim=True)
        normed = centred / (row.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        design = torch.cat([normed, torch.ones(len(row), 1, dtype=row.dtype)], dim=1)
        columns = design.shape[1]
        top = design[chosen[sample]]
        a = torch.cat([top, ridge**0.5 * torch.eye(columns, dtype=row.dtype)])
        b = torch.cat([update[sample], torch.zeros(columns, update.shape[-1], dtype=row.dtype)])
        results.append(design @ torch.linalg.lstsq(a, b).solution)
    return torch.stack(results)


@pytest.mark.parametrize("ridge", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 8, 16, 17, 18, 20])
def test_ridge_solves_its_least_squares_problem_in_both_forms(k: int, ridge: float):
    """Up to 16 chosen tokens the dual form runs, from 17 columns on the primal one."""
    x, update = normal(B, N, D), normal(B, k, D, seed=3)
    chosen = select_top_k(normal(B, N, seed=1), k)
    result = estimate("ridge", x, chosen, update, ridge=ridge)
    expected = scatter_tokens(direct_ridge(x, chosen, update, ridge), chosen, update)
    # Condition number at most 1 + 20 * 17 / 0.3 = 1e3, times rounding of float64.
    assert (result - expected).abs().max() <= 1e-11


def test_ridge_finds_a_linear_update():
    """Enough tokens, a linear truth and hardly a penalty: the prediction is the truth."""
    x = normal(2, 64, 8)
    truth = F.layer_norm(x, (8,)) @ normal(8, 8, seed=1) + 0.5
    chosen = select_top_k(normal(2, 64, seed=2), 32)
    result = estimate("ridge", x, chosen, gather_tokens(truth, chosen), ridge=1e-9)
    assert (result - truth).abs().max() <= 1e-6  # of the order of the penalty over the spectrum


def test_ridge_of_half_precision_is_solved_in_single_precision():
    x, update = normal(B, N, D).bfloat16(), normal(B, K, D, seed=3)
    chosen = select_top_k(normal(B, N, seed=1), K)
    after = gather_tokens(x, chosen) + update.bfloat16()
    output = scatter_tokens(x, chosen, after)
    half = selection_benefit("ridge", x, chosen, output)
    rounded = (after - gather_tokens(x, chosen)).double()
    exact = direct_ridge(x.double(), chosen, rounded, 1.0)
    assert half.dtype == torch.float32
    rejected = rejected_mask(chosen)
    # Rounding of float32 at a condition number of a few hundred.
    assert (half - exact)[rejected].abs().max() <= 1e-4


def test_estimates_of_mean_teacher_and_none():
    x, update, teacher = normal(B, N, D), normal(B, K, D, seed=3), normal(B, N, D, seed=4)
    chosen = select_top_k(normal(B, N, seed=1), K)
    rejected = rejected_mask(chosen)
    for kind, expected in (
        ("mean", update.mean(1, keepdim=True).expand(B, N, D)),
        ("teacher", teacher),
        ("none", torch.zeros(B, N, D).double()),
    ):
        benefit = estimate(kind, x, chosen, update, teacher=teacher)
        # output - x is the update up to rounding of float64.
        assert (gather_tokens(benefit, chosen) - update).abs().max() <= 1e-14
        assert (benefit - expected)[rejected].abs().max() <= 1e-14


@pytest.mark.parametrize("rejected", ["none", "mean", "ridge"])
def test_directions_are_kept_in_the_dtype_of_the_tokens(rejected: Any) -> None:
    """They are as many as all tokens of a block, and wait for backward."""
    x = normal(B, N, D, dtype=torch.bfloat16)
    gates = SelectionGates(
        config=EstimatorConfig(rejected=rejected), tau_rank=0.3, tau_select=0.1, soft_k=float(K)
    )
    scores = normal(B, N, seed=2, dtype=torch.float32).requires_grad_()
    output = scatter_tokens(x, gates.choose(scores, K), normal(B, K, D, seed=3).bfloat16())
    gates.learn(scores)
    kept: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == x.shape:
            kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gates.leave(x, output).sum().backward()
    assert kept == [torch.bfloat16]
    assert scores.grad is not None
    assert scores.grad.abs().sum() > 0


def test_a_linear_error_of_the_teacher_is_corrected():
    x, teacher = normal(B, N, D), normal(B, N, D, seed=4)
    truth = teacher + F.layer_norm(x, (D,)) @ normal(D, D, seed=1) + 0.5
    chosen = select_top_k(normal(B, N, seed=2), 18)  # more tokens than there are columns
    update = gather_tokens(truth, chosen)
    found = estimate("teacher_ridge", x, chosen, update, teacher=teacher, ridge=1e-9)
    assert (found - truth).abs().max() <= 1e-6  # of the order of the penalty over the spectrum
    alone = estimate("ridge", x, chosen, update, ridge=1e-9)
    rejected = rejected_mask(chosen)
    assert (alone - truth)[rejected].abs().max() > 0.1  # the teacher isn't linear
    heavy = estimate("teacher_ridge", x, chosen, update, teacher=teacher, ridge=1e12)
    assert (heavy - teacher)[rejected].abs().max() <= 1e-9  # a correction of that order


def test_what_a_token_gets_anyway_is_no_benefit():
    x, update, instead = (normal(B, n, D, seed=n) for n in (N, K, N))
    chosen = select_top_k(normal(B, N, seed=1), K)
    rejected = rejected_mask(chosen)
    teacher = normal(B, N, D, seed=4)
    without = estimate("teacher", x, chosen, update, teacher=teacher)
    benefit = estimate("teacher", x, chosen, update, teacher=teacher, instead=instead)
    assert torch.equal(benefit, without - instead)
    nothing = estimate("none", x, chosen, update, instead=instead)[rejected]
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("kind", get_args(RejectedUpdate))
def test_no_gradient_flows_through_an_estimate(kind: str):
    x = normal(B, N, D).requires_grad_()
    update = normal(B, K, D, seed=3).requires_grad_()
    chosen = select_top_k(normal(B, N, seed=1), K)
    teacher = normal(B, N, D, seed=4).requires_grad_()
    assert not estimate(kind, x, chosen, update, teacher=teacher).requires_grad


def test_a_missing_teacher_is_an_error():
    with pytest.raises(ValueError, match=r"needs the unpruned model's update.*ridge"):
        estimate("teacher", normal(B, N, D), torch.zeros(B, K, dtype=torch.long), normal(B, K, D))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "both"}, "kind"),
        ({"rejected": "nearest"}, "rejected"),
        ({"ridge": 0.0}, "ridge must be positive"),
    ],
)
def test_unknown_estimators_are_refused(values: dict, message: str):
    # A run-time type check, where one is on, refuses the literal first, with a TypeError.
    with pytest.raises((ValueError, TypeError), match=message):
        EstimatorConfig(**values)


@pytest.mark.parametrize(
    ("config", "teacher", "value_gate"),
    [
        (EstimatorConfig(), True, False),
        (EstimatorConfig(kv_gate=True), True, True),
        (EstimatorConfig(rejected="ridge", kv_gate=True), False, True),
        (EstimatorConfig(rejected="teacher_ridge"), True, False),
        (EstimatorConfig(kind="paper"), False, False),
    ],
)
def test_what_an_estimator_needs(config: EstimatorConfig, teacher: bool, value_gate: bool):
    assert config.needs_teacher is teacher
    assert config.needs_value_gate is value_gate


# --- the gates of a whole block -----------------------------------------------------------------

CONFIGS = [
    EstimatorConfig(kind="paper"),
    *(
        EstimatorConfig(rejected=rejected, kv_gate=kv_gate, ridge=0.7)
        for rejected in ("none", "mean", "ridge", "teacher")
        for kv_gate in (False, True)
    ),
]
TEACHER = normal(B, N, D, seed=5)


def make_gates(config: EstimatorConfig, **values) -> SelectionGates:
    values = {"soft_k": float(K), "teacher_update": TEACHER, **values}
    return SelectionGates(config=config, tau_rank=TAU_RANK, tau_select=TAU_SELECT, **values)


def run_block(gates: SelectionGates, scores: Tensor, x: Tensor, dtype=torch.float64) -> Tensor:
    """What a hooked block does in training."""
    block = Block(dtype)
    if gates.config.needs_value_gate:
        block.on_value = gates.value
    chosen = gates.choose(scores, K)
    gates.learn(scores)
    x = gates.enter(x)
    output = scatter_tokens(x, chosen, block(gather_tokens(x, chosen)))
    return gates.leave(x, output)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_estimator_follows_its_closed_form(config: EstimatorConfig, truth: Truth):
    scores = truth.scores.clone().requires_grad_()
    x = truth.x.clone().requires_grad_()
    k = torch.tensor(K + 0.3, dtype=torch.float64, requires_grad=True)
    gates = make_gates(config, soft_k=k)
    out = run_block(gates, scores, x)
    assert torch.equal(gates.chosen, truth.chosen)
    assert gates.inclusion is not None
    gates.inclusion.retain_grad()
    loss_of(out).backward()

    if config.kind == "paper":
        expected = paper_inclusion_gradient(truth)
    else:
        rejected_update = {
            "none": None,
            "mean": truth.update.mean(1, keepdim=True),
            "ridge": direct_ridge(truth.x, truth.chosen, truth.update, config.ridge),
            "teacher": TEACHER,
        }[config.rejected]
        expected = residual_inclusion_gradient(truth, rejected_update, config.kv_gate)
    # Rounding of float64; the ridge's condition number of 5e2 comes on top.
    assert (gates.inclusion.grad - expected).abs().max() <= 1e-10
    assert torch.equal(x.grad, truth.grad_x)

    standardized = truth.scores.clone().requires_grad_()
    ds, dk = closed_form(expected, standardize(standardized).detach(), K + 0.3)
    standardize(standardized).backward(ds)
    # The ranks' six exponentials: gradient 1e-5 relative (the acceptance bound), inclusion scores
    # off by 5e-7 N / (4 tau N) = 1.3e-6.
    assert (scores.grad - standardized.grad).norm() <= 2e-5 * standardized.grad.norm()
    assert abs(float(k.grad - dk)) <= 1e-5 * float(expected.abs().sum()) / (TAU_SELECT * N)
    assert scores.grad.sum(-1).abs().max() <= 1e-10
    assert standardized.grad.norm() > 0.1
    assert abs(float(dk)) > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gates_leave_the_forward_to_the_bit(config: EstimatorConfig, dtype: torch.dtype):
    x, scores = normal(B, N, D).to(dtype), normal(B, N, seed=1, dtype=torch.float32)
    gates = make_gates(config, teacher_update=TEACHER.to(dtype))
    scores.requires_grad_()
    out = run_block(gates, scores, x, dtype)
    chosen = best_tokens(scores.detach(), K)
    plain = scatter_tokens(x, chosen, Block(dtype)(gather_tokens(x, chosen)))
    assert out.dtype == dtype
    assert torch.equal(out, plain)
    loss_of(out.float()).backward()
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().max() > 0


def test_without_an_estimate_rejected_tokens_get_no_gradient(truth: Truth):
    scores = truth.scores.clone().requires_grad_()
    gates = make_gates(EstimatorConfig(rejected="none", kv_gate=True))
    out = run_block(gates, scores, truth.x)
    gates.inclusion.retain_grad()
    loss_of(out).backward()
    rejected = rejected_mask(truth.chosen)
    assert torch.equal(
        gates.inclusion.grad[rejected], torch.zeros(B * (N - K), dtype=torch.float64)
    )
    assert (gates.inclusion.grad[~rejected] != 0).all()


def test_the_same_noise_ranks_and_selects_and_a_second_choice_repeats_it():
    scores = normal(B, N, seed=1)
    gates = make_gates(
        EstimatorConfig(kind="paper"),
        noise_std=2.0,
        generator=torch.Generator().manual_seed(3),
    )
    chosen = gates.choose(scores, K)
    gates.learn(scores)
    noise = 2.0 * torch.randn(B, N, generator=torch.Generator().manual_seed(3)).double()
    perturbed = standardize(scores) + noise
    assert torch.equal(gates.noise, noise)
    assert torch.equal(chosen, best_tokens(perturbed, K))
    assert not torch.equal(chosen, best_tokens(scores, K))
    first = gates.inclusion
    expected = inclusion_scores(soft_rank(perturbed, TAU_RANK), float(K), TAU_SELECT)
    assert torch.equal(first, expected)
    again = gates.choose(scores, K)
    gates.learn(scores)
    assert torch.equal(again, chosen)
    assert torch.equal(gates.inclusion, first)


def test_a_second_choice_keeps_its_tokens_even_if_the_scores_moved():
    """Recomputed scores may differ in their last bits; the saved shapes and tokens must not."""
    gates = make_gates(EstimatorConfig(kind="paper"))
    scores = normal(B, N, seed=1)
    chosen = gates.choose(scores, K)
    assert torch.equal(gates.choose(-scores, K), chosen)


@pytest.mark.parametrize(
    ("autocast", "rounding"),
    # A float32 sum of N products in another order, and 8 bits of bfloat16.
    [(False, N * 2**-23), (True, 2**-8)],
)
def test_scores_computed_anew_have_the_plain_gradient(autocast: bool, rounding: float):
    torch.manual_seed(0)
    router = ShivaRouter(D, 6, 7, num_blocks=3, num_groups=2, hidden=8)
    x, weights = normal(B, N, D).float(), normal(B, N, seed=1).float().abs()
    time, context = normal(B, 6, seed=2).float(), normal(B, 7, seed=3).float()
    score = ShivaSelector(router).scorer(1)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    def gradients(anew: bool) -> dict[str, Tensor]:
        terms = router.terms(time, context)[1]
        gates = make_gates(EstimatorConfig())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = score(x, terms)
            if anew:
                before = gather_tokens(x, gates.choose(scores.detach(), K))
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    scores = gates.scored(score, terms, scores.detach(), x, before)
                assert sum(t.data_ptr() == before.data_ptr() for t in kept) == 1
        router.zero_grad()
        (weights * scores).sum().backward()
        found = {"scores": scores.detach()}
        return found | {n: p.grad for n, p in router.named_parameters() if p.grad is not None}

    plain, found = gradients(False), gradients(True)
    assert found.keys() == plain.keys()
    assert torch.equal(found.pop("scores"), plain.pop("scores"))
    for name, value in found.items():
        assert (value - plain[name]).norm() <= rounding * plain[name].norm(), name
    assert found["groups.0.project_tokens.weight"].norm() > 0
    # The chosen tokens' are those that the block keeps.
    assert [t.shape for t in kept if t.ndim == 3] == [(B, K, D), (B, N - K, D)]


def test_noise_needs_a_generator():
    with pytest.raises(ValueError, match="needs a generator"):
        make_gates(EstimatorConfig(), noise_std=0.1).choose(normal(B, N), K)


def test_noise_is_off_by_default():
    gates = make_gates(EstimatorConfig())
    assert torch.equal(gates.choose(normal(B, N), K), best_tokens(normal(B, N), K))
    assert torch.equal(gates.noise, torch.zeros(B, N, dtype=torch.float64))


def test_a_value_gate_that_saw_nothing_is_an_error():
    gates = make_gates(EstimatorConfig(rejected="mean", kv_gate=True))
    x = normal(B, N, D)
    gates.choose(normal(B, N, seed=1), K)
    gates.learn(normal(B, N, seed=1))
    with pytest.raises(RuntimeError, match=r"KV gate saw nothing.*kv_gate=false"):
        gates.leave(x, x + 1.0)
    # The count starts anew with each choice: an earlier forward does not excuse a later one.
    gates.value(normal(B, K, D))
    gates.leave(x, x + 1.0)
    gates.choose(normal(B, N, seed=1), K)
    with pytest.raises(RuntimeError, match="KV gate saw nothing"):
        gates.leave(x, x + 1.0)


def test_a_missing_teacher_is_an_error_in_a_block():
    gates = make_gates(EstimatorConfig(kv_gate=False), teacher_update=None)
    with pytest.raises(ValueError, match="needs the unpruned model's update"):
        run_block(gates, normal(B, N, seed=1), normal(B, N, D))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_checkpointing_a_block_changes_no_gradient(config: EstimatorConfig):
    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        router = normal(D, seed=9).requires_grad_()
        x = normal(B, N, D).requires_grad_()
        k = torch.tensor(float(K), dtype=torch.float64, requires_grad=True)
        gates = make_gates(
            config, soft_k=k, noise_std=1.0, generator=torch.Generator().manual_seed(3)
        )

        def block(x: Tensor) -> Tensor:
            return run_block(gates, x.detach() @ router, x)

        out = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        loss_of(out).backward()
        return router.grad, x.grad, k.grad

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)
