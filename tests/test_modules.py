"""What is learned: the router (Eq. 8, 9) and the ratio policy (Eq. 10, 11, 29)."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiva_dit.modules.policy import AdaptiveRatioPolicy
from shiva_dit.modules.router import ShivaRouter, token_scores
from shiva_dit.modules.updates import RejectedUpdates
from tests import tiny


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- router -----------------------------------------------------------------------------------

WIDTH, TIME_DIM, CONTEXT_DIM, BLOCKS, HIDDEN = 12, 10, 8, 6, 16


def make_router(seed: int = 0, **values) -> ShivaRouter:
    torch.manual_seed(seed)
    values = {"num_groups": 3, "hidden": HIDDEN, **values}
    return ShivaRouter(WIDTH, TIME_DIM, CONTEXT_DIM, BLOCKS, **values)


def run_router(router: ShivaRouter, block: int, x: Tensor | None = None) -> Tensor:
    x = normal(2, 9, WIDTH) if x is None else x
    time, context = normal(2, TIME_DIM, seed=1), normal(2, CONTEXT_DIM, seed=2)
    return router(x, router.condition(time, context)[block], block)


@pytest.mark.parametrize(
    ("groups", "hidden", "millions"),
    [
        (1, 64, "0.3"),
        (1, 512, "2.6"),
        (24, 512, "64"),
        (24, 64, "8.0"),
        (4, 128, "2.7"),
        (8, 64, "2.7"),
        (12, 64, "4.1"),
    ],
)
def test_parameter_counts_are_those_of_the_papers_table(groups: int, hidden: int, millions: str):
    """SD3.5-Medium: D = 1536, 24 blocks, pooled text of 2048."""
    with torch.device("meta"):
        router = ShivaRouter(1536, 1536, 2048, 24, groups, hidden)
    count = sum(p.numel() for p in router.parameters()) / 1e6
    if millions == "0.3":  # one printed digit: the same digit
        assert f"{count:.1f}" == millions
    else:
        assert count == pytest.approx(float(millions), rel=0.05)


def test_a_router_has_the_layers_of_eq_8_and_9_and_no_others():
    count = sum(p.numel() for p in make_router(num_groups=2).parameters())
    projections = HIDDEN * (WIDTH + TIME_DIM + CONTEXT_DIM + 64) + 4 * HIDDEN
    per_group = projections + 2 * HIDDEN + HIDDEN  # the norm's weight and bias, w without a bias
    assert count == 2 * per_group + 64 * BLOCKS


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("block", range(BLOCKS))
def test_scores_are_eq_8_and_9(block: int, normalize: bool):
    router = make_router(normalize_inputs=normalize)
    x, time, context = normal(2, 9, WIDTH), normal(2, TIME_DIM), normal(2, CONTEXT_DIM)
    scores = router(x, router.condition(time, context)[block], block)

    def inner(value: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:]) if normalize else value

    group = router.groups[block // 2]
    layer = router.layer_embedding(torch.tensor([block]))
    h = group.project_time(inner(time)) + group.project_context(inner(context))
    h = h + group.project_layer(layer)
    hidden = F.silu(group.project_tokens(inner(x)) + h[:, None])
    expected = F.layer_norm(hidden, (HIDDEN,)) @ group.score.weight[0]
    assert scores.shape == (2, 9)
    # Rounding of float32 in a sum of 16 normalised terms; weights and biases start at 1 and 0.
    assert (scores - expected).abs().max() <= 1e-5


def test_adjacent_blocks_share_weights_and_the_layer_embedding_tells_them_apart():
    router = make_router()
    assert [router.group(b) is router.groups[b // 2] for b in range(BLOCKS)] == [True] * BLOCKS
    first, second = run_router(router, 2), run_router(router, 3)
    assert (first - second).abs().max() > 1e-2
    with torch.no_grad():
        router.layer_embedding.weight[3] = router.layer_embedding.weight[2]
    # The two rows of a product of equal rows: rounding of float32.
    assert (run_router(router, 2) - run_router(router, 3)).abs().max() <= 1e-5


def test_each_group_count_maps_every_block_to_its_own_share():
    for groups in (1, 2, 3, 4, 6, 8, 12, 24):
        with torch.device("meta"):
            router = ShivaRouter(4, 4, 4, 24, groups, 4)
        used = [list(router.groups).index(router.group(block)) for block in range(24)]
        assert used == [block // (24 // groups) for block in range(24)]


@pytest.mark.parametrize("groups", [0, 7, -1])
def test_there_are_as_many_groups_as_blocks_at_most(groups: int):
    with pytest.raises(ValueError, match=r"between 1 and the number of blocks, 6, got"):
        make_router(num_groups=groups)


@pytest.mark.parametrize(("blocks", "groups"), [(57, 29), (57, 28), (19, 4), (7, 7), (5, 3)])
def test_adjacent_blocks_share_a_group_also_where_depth_does_not_divide(blocks: int, groups: int):
    with torch.device("meta"):
        router = ShivaRouter(4, 4, 4, blocks, groups, 4)
    sizes = Counter(router.group_of)
    assert router.group_of == sorted(router.group_of)
    assert sorted(sizes) == list(range(groups))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert all(router.group(b) is router.groups[g] for b, g in enumerate(router.group_of))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "values", [{}, {"num_groups": 4}, {"inputs": ("layer",)}, {"inputs": ("time",)}], ids=str
)
def test_frozen_weights_score_as_the_modules_do(batch: int, dtype: torch.dtype, values: dict):
    router = make_router(**values)
    tiny.randomize(router, seed=3)
    x = normal(batch, 9, WIDTH, seed=1).to(dtype)
    time, context = normal(batch, TIME_DIM, seed=1), normal(batch, CONTEXT_DIM, seed=2)
    with torch.no_grad():
        plain = router.terms(time, context)
        expected = [router(x, router.condition(time, context)[b], b) for b in range(BLOCKS)]
        router.freeze(dtype)
        frozen = router.terms(time, context)
    for block in range(BLOCKS):
        assert frozen[block].weight.dtype == dtype
        for terms in (plain[block], frozen[block]):
            scores = token_scores(x, terms, normalize_inputs=True)
            assert scores.dtype == torch.float32
            # The same products of the same numbers in another order; all may be moved alike.
            off = (scores - expected[block]) - (scores - expected[block]).mean()
            assert off.abs().max() <= 1e-4 * expected[block].std()
        # Tokens may be wider than the latents that weights were cast for.
        wide = token_scores(x.float(), frozen[block], normalize_inputs=True)
        assert wide.dtype == torch.float32
        assert (wide - wide.mean() - expected[block] + expected[block].mean()).abs().max() <= (
            0.1 * expected[block].std()  # 16 bits: 0.004 of each product
        )
    assert set(router.state_dict()) == set(make_router(**values).state_dict())
    assert router.terms(time, context)[0].weight.requires_grad  # training reads its own


def test_gradients_reach_all_of_a_blocks_group_and_nothing_else():
    router = make_router()
    run_router(router, 2).square().sum().backward()
    for name, parameter in router.groups[1].named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name
    for group in (router.groups[0], router.groups[2]):
        # The context terms of all blocks are one product: other groups get zeros from it.
        grads = [parameter.grad for parameter in group.parameters() if parameter.grad is not None]
        assert not any(grad.any() for grad in grads)
    rows = router.layer_embedding.weight.grad.abs().amax(1)
    assert (rows > 0).tolist() == [False, False, True, False, False, False]


def test_time_text_and_tokens_all_move_the_scores():
    router = make_router()
    x = normal(2, 9, WIDTH).requires_grad_()
    time, context = normal(2, TIME_DIM).requires_grad_(), normal(2, CONTEXT_DIM).requires_grad_()
    scores = router(x, router.condition(time, context)[1], 1)
    weight = normal(2, 9, seed=5)
    grads = torch.autograd.grad((scores * weight).sum(), (x, time, context))
    assert all(grad.abs().max() > 1e-3 for grad in grads)
    # A token's score depends on that token alone, and on its own sample's context.
    (grad,) = torch.autograd.grad(router(x, router.condition(time, context)[1], 1)[0, 4], x)
    rows = grad.abs().amax(-1) > 0
    expected = torch.zeros(2, 9, dtype=torch.bool)
    expected[0, 4] = True
    assert torch.equal(rows, expected)


def test_a_permutation_of_tokens_permutes_their_scores():
    router, x = make_router(), normal(2, 9, WIDTH)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    permuted = run_router(router, 1, x[:, order])
    # The same products in another place of a matrix product: rounding of float32.
    assert (permuted - run_router(router, 1, x)[:, order]).abs().max() <= 1e-5


def test_normalised_inputs_make_scores_blind_to_the_size_of_deep_tokens():
    x = normal(2, 9, WIDTH)
    normalised, plain = make_router(), make_router(normalize_inputs=False)
    # The norm's eps of 1e-5 beside a variance of about 1 is left of the scale: measured 7e-6.
    assert (run_router(normalised, 1, 1000 * x) - run_router(normalised, 1, x)).abs().max() <= 5e-5
    assert (run_router(plain, 1, 1000 * x) - run_router(plain, 1, x)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_get_single_precision_scores(dtype: torch.dtype):
    router = make_router(hidden=64)
    x = normal(1, 4096, WIDTH).to(dtype)
    time, context = normal(1, TIME_DIM).to(dtype), normal(1, CONTEXT_DIM).to(dtype)
    scores = router(x, router.condition(time, context)[1], 1)
    assert scores.dtype == torch.float32
    # Rounded to half precision they would be 1,072 (bfloat16) or 2,845 (float16).
    assert len(scores.unique()) > 4000
    reference = router(x.float(), router.condition(time.float(), context.float())[1], 1)
    # The token projection is rounded: measured 0.0038 of the scores' deviation in bfloat16.
    assert (scores - reference).std() <= 0.008 * reference.std()


# --- what rejected tokens get -----------------------------------------------------------------


def make_updates(seed: int = 0, num_groups: int = 3, rank: int = 4) -> RejectedUpdates:
    torch.manual_seed(seed)
    return RejectedUpdates(WIDTH, TIME_DIM, CONTEXT_DIM, BLOCKS, num_groups, rank)


def filled_updates(**values) -> RejectedUpdates:
    updates = make_updates(**values)
    with torch.no_grad():
        for index, parameter in enumerate(updates.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=index))
    return updates


def test_an_update_starts_at_zero():
    updates = make_updates()
    condition = updates.condition(normal(2, TIME_DIM), normal(2, CONTEXT_DIM))[3]
    update = updates.group(3)(normal(2, 9, WIDTH), condition)
    assert torch.equal(update, torch.zeros(2, 9, WIDTH))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_an_update_is_its_formula(block: int):
    updates = filled_updates()
    group = updates.group(block)
    assert group is updates.groups[block // 2]
    x, time, context = 3.0 * normal(2, 9, WIDTH), normal(2, TIME_DIM), normal(2, CONTEXT_DIM)
    found = group(x, updates.condition(time, context)[block])

    layer = updates.layer_embedding(torch.tensor([block]))
    h = group.project_time(F.layer_norm(time, (TIME_DIM,))) + group.project_layer(layer)
    h = h + group.project_context(F.layer_norm(context, (CONTEXT_DIM,)))
    size = x.std(-1, keepdim=True, correction=0)
    normed = (x - x.mean(-1, keepdim=True)) / (size.square() + 1e-5).sqrt()
    hidden = (group.down(normed) + h[:, None, :4]) * (1 + h[:, None, 4:])
    expected = size * (hidden @ group.up.weight.T)
    # Rounding of float32 in three sums of a dozen terms of size 10.
    assert (found - expected).abs().max() <= 1e-4
    assert expected.abs().max() > 1.0


def test_an_update_grows_with_its_token():
    """Blocks whose tokens differ in size by orders of magnitude can share weights and rates."""
    group = filled_updates().group(0)
    x, condition = normal(2, 9, WIDTH), normal(2, 8, seed=2)
    # The norm's epsilon of 1e-5 weighs a little less at 1,000 times the size.
    assert torch.allclose(group(1000.0 * x, condition), 1000.0 * group(x, condition), rtol=1e-3)


def test_an_update_of_half_precision_is_close():
    group = filled_updates().group(0)
    x, condition = normal(2, 9, WIDTH), normal(2, 8, seed=2)
    exact, found = group(x, condition), group(x.bfloat16(), condition)
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 0.4% per rounding, a handful of roundings.
    assert (found.float() - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("rank", [1, 4, WIDTH])
def test_a_fit_is_the_best_map_of_its_rank(rank: int):
    """Its squared error is that of least squares plus what the dropped directions explained."""
    group = make_updates(rank=rank).double().group(0)
    x, noise = (normal(2, 200, WIDTH, seed=seed, dtype=torch.float64) for seed in (0, 1))
    x = x * normal(2, 200, 1, seed=4, dtype=torch.float64).exp()
    design = group.design(x)
    weights = normal(WIDTH + 1, WIDTH, seed=2, dtype=torch.float64)
    updates = (design.double() @ weights).view(x.shape) + 0.5 * noise
    group.fit(design.T.double() @ design.double(), design.T.double() @ updates.flatten(0, 1))

    condition = torch.zeros(2, 2 * rank, dtype=torch.float64)
    error = (group(x, condition) - updates).square().sum().item()
    # Normalised channels sum to 0 up to rounding, which is no regressor.
    full = torch.linalg.lstsq(
        design.double(), updates.flatten(0, 1), rcond=1e-5, driver="gelsd"
    ).solution
    explained = torch.linalg.svdvals(design.double() @ full).square()
    residual = (design.double() @ full - updates.flatten(0, 1)).square().sum()
    # The penalty of 1e-6 costs little (measured: 1e-5); the design is float32.
    assert error == pytest.approx(float(residual + explained[rank:].sum()), rel=1e-4)


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match=r"rejected_rank must be at most the width, 12, got 13"):
        make_updates(rank=13)


# --- policy -----------------------------------------------------------------------------------

TIMES = (torch.arange(11) / 10).clamp(0, 1)


def trained_policy(seed: int = 0, target: float = 0.5, **values) -> AdaptiveRatioPolicy:
    """A policy with some structure: its last layers start at zero, and here they don't."""
    torch.manual_seed(seed)
    policy = AdaptiveRatioPolicy(6, target, **values)
    with torch.no_grad():
        for branch in (policy.time_branch, policy.layer_branch):
            branch[-1].weight.normal_(std=0.3)
            branch[-1].bias.normal_(std=0.3)
    return policy


@given(st.floats(0.001, 0.999))
def test_a_policy_starts_exactly_at_its_target(target):
    policy = AdaptiveRatioPolicy(5, target)
    assert torch.equal(policy.logits(TIMES), policy.anchor.expand(11, 5))  # to the bit
    ratios = policy(TIMES)
    assert torch.equal(ratios[:, 0], torch.ones(11))
    # The logit is rounded to float32: at most 7 * 6e-8 * r (1 - r) <= 1e-7, and the sigmoid's own.
    assert (ratios[:, 1:].double() - target).abs().max() <= 2e-7


@given(st.floats(0.01, 1.0), st.integers(1, 70), st.integers(0, 20))
def test_a_schedule_meets_any_target_whatever_was_learned(target, num_bins, seed):
    schedule = trained_policy(seed).schedule(target, num_bins)
    assert schedule.num_bins == num_bins
    assert schedule.full_blocks == (0,)
    # The smallest ratio is 1e-6, hence the tolerance; without that it is rounding of float64.
    assert schedule.mean_keep_ratio == pytest.approx(target, abs=1e-6)


def test_a_schedule_at_the_policys_own_mean_is_the_policy():
    policy = trained_policy()
    centres = (torch.arange(32) + 0.5) / 32
    ratios = policy(centres).detach().double()
    schedule = policy.schedule(float(ratios[:, 1:].mean()), 32)
    assert ratios[:, 1:].std() > 0.05
    # Rounding of float32 ratios.
    assert (torch.tensor(schedule.ratios, dtype=torch.float64) - ratios).abs().max() <= 1e-6


def test_a_policy_that_knows_its_target_has_a_shape_for_each():
    """It starts as one that doesn't; the mean is met whatever it has learned."""
    policy = trained_policy(knows_target=True)
    plain = trained_policy()
    state = {n: v for n, v in policy.state_dict().items() if not n.endswith("_by_target")}
    plain.load_state_dict(state)
    for target in (0.2, 0.7, 1.0):
        assert policy.schedule(target, 8).ratios == plain.schedule(target, 8).ratios
    with torch.no_grad():
        policy.time_by_target.normal_(generator=torch.Generator().manual_seed(1))
        policy.layer_by_target.normal_(generator=torch.Generator().manual_seed(2))
    assert torch.equal(policy.logits(TIMES), policy.logits(TIMES, 0.5))  # its own

    def shape(target: float) -> torch.Tensor:
        found = policy.schedule(target, 8)
        assert found.mean_keep_ratio == pytest.approx(target, abs=1e-9)
        logits = torch.tensor(found.ratios, dtype=torch.float64)[:, 1:].logit()
        return logits - logits.mean()

    assert float((shape(0.2) - shape(0.7)).abs().max()) > 0.05


def test_logits_are_time_plus_layer_plus_anchor():
    policy = trained_policy()
    logits = policy.logits(TIMES).double()
    assert logits.shape == (11, 6)
    time = logits - logits[:1]
    layer = logits - logits[:, :1]
    # Rounding of float32 sums of order 1.
    assert (time - time[:, :1]).abs().max() <= 1e-6
    assert (layer - layer[:1]).abs().max() <= 1e-6
    assert time.std() > 0.01
    assert layer.std() > 0.01
    with torch.no_grad():
        policy.anchor += 1.0
    assert (policy.logits(TIMES).double() - logits - 1.0).abs().max() <= 1e-6


def test_ratios_are_the_sigmoid_and_never_pruned_blocks_are_one():
    policy = trained_policy(full_blocks=(0, 3))
    assert policy.prunable_blocks == (1, 2, 4, 5)
    ratios, expected = policy(TIMES), torch.sigmoid(policy.logits(TIMES))
    assert torch.equal(ratios[:, [0, 3]], torch.ones(11, 2))
    assert torch.equal(ratios[:, [1, 2, 4, 5]], expected[:, [1, 2, 4, 5]])


def test_noise_is_added_to_the_logits():
    policy, noise = trained_policy(), normal(11, 6)
    ratios = policy(TIMES, noise)
    expected = torch.sigmoid(policy.logits(TIMES) + noise)
    assert torch.equal(ratios[:, 1:], expected[:, 1:])
    assert torch.equal(ratios[:, 0], torch.ones(11))  # noise does not prune what is never pruned
    assert torch.equal(policy(TIMES, torch.zeros(11, 6)), policy(TIMES))


def test_the_first_step_moves_anchor_and_last_layers_the_second_moves_all():
    torch.manual_seed(0)
    policy = AdaptiveRatioPolicy(6, 0.4)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    weight = normal(11, 5)

    def gradients() -> dict[str, float]:
        optimizer.zero_grad()
        (policy(TIMES)[:, 1:] * weight).sum().backward()
        return {name: float(p.grad.abs().max()) for name, p in policy.named_parameters()}

    first = gradients()
    moving = {name for name, size in first.items() if size > 0}
    last = {
        f"{branch}.2.{p}" for branch in ("time_branch", "layer_branch") for p in ("weight", "bias")
    }
    assert moving == {"anchor", *last}
    # d mean / d anchor = r (1 - r): the sum of the weights times that.
    assert first["anchor"] == pytest.approx(abs(float(weight.sum())) * 0.24, rel=1e-5)
    optimizer.step()
    assert all(size > 0 for size in gradients().values())


def test_never_pruned_blocks_teach_the_policy_nothing():
    policy = trained_policy()
    policy(TIMES).sum().backward()
    rows = policy.layer_embedding.weight.grad.abs().amax(1) > 0
    assert rows.tolist() == [False, True, True, True, True, True]


def test_neighbouring_times_get_different_ratios():
    """The time features tell all of 1000 timesteps apart."""
    policy = trained_policy()
    logits = policy.logits(torch.arange(1001) / 1000)[:, 1].detach()
    assert len(logits.unique()) > 990
    # Smooth on the scale of one timestep: no jumps of the order of the whole range.
    assert logits.diff().abs().max() < 0.5 * (logits.max() - logits.min())


def test_a_policy_is_additive_in_its_parameters_too():
    """Hidden width 256 in both branches, one scalar out of each (section 6 of the method)."""
    with torch.device("meta"):
        policy = AdaptiveRatioPolicy(24, 0.6)
    branch = 256 * 256 + 256 + 256 + 1
    assert sum(p.numel() for p in policy.parameters()) == 2 * branch + 24 * 256 + 1


@pytest.mark.parametrize("target", [0.0, 1.0, -0.2, 1.2])
def test_a_policy_needs_a_target_it_can_reach(target: float):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        AdaptiveRatioPolicy(4, target)


def test_the_anchor_is_the_targets_logit():
    assert float(AdaptiveRatioPolicy(4, 0.6).anchor.detach()) == pytest.approx(
        math.log(1.5), rel=1e-7
    )


def test_the_condition_is_the_same_under_autocast():
    """Training may run under autocast, inference does not."""
    router = ShivaRouter(16, 12, 10, num_blocks=4, num_groups=2, hidden=8)
    generator = torch.Generator().manual_seed(0)
    time = torch.randn(3, 12, generator=generator)
    context = torch.randn(3, 10, generator=generator)
    expected = router.condition(time, context)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router.condition(time, context)[2]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_scores_stay_in_float32_under_autocast():
    torch.manual_seed(0)
    router = ShivaRouter(32, 16, 12, num_blocks=4, num_groups=2, hidden=8)
    generator = torch.Generator().manual_seed(0)
    x, time, context = (
        torch.randn(*s, generator=generator) for s in ((2, 64, 32), (2, 16), (2, 12))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = router(x.bfloat16(), router.condition(time, context)[1], 1)
    assert scores.dtype == torch.float32
    # One score in 2^16 is a number of bfloat16 by chance, and all would be that were rounded to it.
    assert (scores != scores.bfloat16()).double().mean() > 0.95
