"""Published methods of token reduction: what all of them must keep to, and what defines each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor

import shiva_dit
from shiva_dit.methods.base import Reducer, Where
from shiva_dit.methods.ibtm import IBTM, PUBLISHED, by_importance
from shiva_dit.methods.matching import cells, draws, merged, merged_cells
from shiva_dit.methods.plans import AssignPlan, CachedPlan, FillPlan, Plan
from shiva_dit.methods.sdtm import SDTM
from shiva_dit.methods.tofu import LongMeanPlan, PrunedPlan, ToFu, leaders
from shiva_dit.methods.toma import SHARPNESS, TiledPlan, ToMA, cover
from shiva_dit.methods.tomesd import ToMeSD
from shiva_dit.models.counted import model_flops
from shiva_dit.models.reducing import Reduction, attach_reducer
from tests import families, running, tiny

MADE: dict[str, Callable[[float], Reducer]] = {
    "tomesd": ToMeSD,
    "tofu": ToFu,
    "ibtm": IBTM,
    "toma": lambda keep_ratio: ToMA(keep_ratio, tile=(4, 4)),
    "toma, reused": lambda keep_ratio: ToMA(
        keep_ratio, tile=(4, 4), destinations_every=3, weights_every=2
    ),
    "sdtm": SDTM,
    "sdtm, no cache": lambda keep_ratio: SDTM(keep_ratio, refresh=None),
}
SERVED = ("pixart-sigma", "dit", "sd3", "sd3-dual")
PIPELINES = ("StableDiffusion3Pipeline", "PixArtSigmaPipeline", "DiTPipeline")
STEPS, BLOCKS, GRID, N = 5, 4, (8, 8), 64
every_method = pytest.mark.parametrize("method", MADE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_of(name: str) -> Any:
    if name.startswith("sd3"):
        return tiny.sd3("dual" if name == "sd3-dual" else "plain")
    return families.made(name)


def half(given: Any, which: slice) -> Any:
    if isinstance(given, dict):
        return {key: half(value, which) for key, value in given.items()}
    return given[which] if isinstance(given, Tensor) else given


def predictions(
    model: Any,
    name: str,
    attached: Reduction | None = None,
    *,
    in_turn: bool = False,
    size: tuple[int, int] = (16, 16),
    seed: int = 0,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Both passes' predictions (uncond, cond) at each step of a guided loop, two images."""
    own = None if attached is None else shiva_dit.steps(attached.model, steps)
    x = normal(2, 4, *size, seed=seed).to(dtype)

    def predict(given: dict[str, Any], step: int, passes: str) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if own is not None:
                stack.enter_context(own.step(step))
                stack.enter_context(shiva_dit.guided(model, passes))
            return model(**given, return_dict=False)[0][:, :4]

    for step in range(steps):
        t = 1.0 - step / steps
        given = tiny.inputs(4, t) if name.startswith("sd3") else families.arguments(name, 4, t)
        given = {key: v.to(dtype) if is_float(v) else v for key, v in given.items()}
        given["hidden_states"] = torch.cat([x, x])
        if in_turn:
            cond = predict(half(given, slice(2, 4)), step, "cond")
            uncond = predict(half(given, slice(0, 2)), step, "uncond")
        else:
            uncond, cond = predict(given, step, "both").chunk(2)
        yield torch.cat([uncond, cond])
        x = x - (uncond + 3.0 * (cond - uncond)) / steps


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def noted(reducer: Reducer) -> list[tuple[Where, Tensor, Plan | None]]:
    """Where its plans are asked for, of what, and what they are, from now on."""
    calls: list[tuple[Where, Tensor, Plan | None]] = []
    make = reducer.plan

    def plan(x: Tensor, where: Where) -> Plan | None:
        calls.append((where, x, make(x, where)))
        return calls[-1][2]

    reducer.plan = plan  # type: ignore[method-assign]
    return calls


# --- every method -----------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("name", ["dit", "sd3-dual"])
def test_nothing_reduced_is_the_model_itself(name: str, method: str) -> None:
    model = model_of(name)
    bare = list(predictions(model, name, steps=2))
    attached = attach_reducer(model, MADE[method](1.0))
    for ours, its in zip(predictions(model, name, attached, steps=2), bare, strict=True):
        assert torch.equal(ours, its)


@every_method
@pytest.mark.parametrize("name", SERVED)
def test_plans_hold_all_tokens_and_leave_no_group_empty(name: str, method: str) -> None:
    """In every module, and through attach and detach, twice: the model is as it was after it."""
    model = model_of(name)
    marks = tiny.footprint(model)
    last = list(predictions(model, name))[-1]
    for _ in range(2):
        reducer = MADE[method](0.6)
        calls = noted(reducer)
        attached = attach_reducer(model, reducer)
        ours = list(predictions(model, name, attached))[-1]
        assert torch.isfinite(ours).all()
        assert not torch.equal(ours, last)
        attached.detach()
        assert tiny.footprint(model) == marks
    assert torch.equal(list(predictions(model, name))[-1], last)
    plans = [(x, plan) for _, x, plan in calls if plan is not None]
    assert len(plans) > STEPS
    for x, plan in plans:
        if isinstance(plan, CachedPlan):
            plan = replace(plan, cache=None)
        constant = torch.full_like(x, 2.0)
        back = plan.restore(plan.reduce(constant), constant)
        # Of mixtures, weights sum to 1 but for rounding: two sums of 16 float32 terms.
        off = 1e-5 if isinstance(plan, TiledPlan) else 0.0
        torch.testing.assert_close(back, constant, rtol=0.0, atol=off)
        if isinstance(plan, AssignPlan):
            sizes = torch.stack([row.bincount(minlength=plan.k) for row in plan.group])
            assert sizes.shape == (4, plan.k)
            assert sizes.min() >= 1
            less = plan.reduce(x)
            assert less.shape == (4, plan.k, x.shape[-1])
            if type(plan) in (AssignPlan, CachedPlan):  # means: weighted by sizes, the sum of all
                total = (less * sizes[..., None]).sum(1)
                torch.testing.assert_close(total, x.sum(1), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in MADE if not name.startswith("toma")])
@pytest.mark.parametrize("name", ["pixart-sigma", "sd3"])
def test_both_passes_in_one_batch_and_in_turn_are_the_same(name: str, method: str) -> None:
    model = model_of(name)
    attached = attach_reducer(model, MADE[method](0.6))
    together = predictions(model, name, attached)
    for one, other in zip(together, predictions(model, name, attached, in_turn=True), strict=True):
        # Sums over other batches: measured 2e-6 for values up to 4.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@every_method
def test_interleaved_runs_and_earlier_ones_change_nothing(method: str) -> None:
    model = model_of("sd3")
    attached = attach_reducer(model, MADE[method](0.6))
    alone = [list(predictions(model, "sd3", attached, seed=seed)) for seed in (1, 2)]
    one, other = (predictions(model, "sd3", attached, seed=seed) for seed in (1, 2))
    for a, b, x, y in zip(one, other, *alone, strict=True):
        assert torch.equal(a, x)
        assert torch.equal(b, y)


@every_method
def test_pictures_that_are_no_squares(method: str) -> None:
    model = model_of("pixart-sigma")
    bare = list(predictions(model, "pixart-sigma", size=(16, 24), steps=2))
    attached = attach_reducer(model, MADE[method](0.6))
    ours = list(predictions(model, "pixart-sigma", attached, size=(16, 24), steps=2))
    assert ours[-1].shape == bare[-1].shape
    assert not torch.equal(ours[-1], bare[-1])
    odd = predictions(model, "pixart-sigma", attached, size=(12, 20), steps=1)
    if method.startswith("toma"):
        with pytest.raises(ValueError, match=r"whole tiles of 4 x 4 tokens.*\(6, 10\): pass ano"):
            list(odd)
    else:
        assert torch.isfinite(torch.cat(list(odd))).all()


@every_method
def test_16_bits(method: str) -> None:
    """Plans are made in 32 bits: those of the same tokens in float32."""
    model = model_of("sd3-dual").bfloat16()
    reducer = MADE[method](0.6)
    calls = noted(reducer)
    attached = attach_reducer(model, reducer)
    for output in predictions(model, "sd3-dual", attached, dtype=torch.bfloat16, steps=3):
        assert output.dtype == torch.bfloat16
        assert torch.isfinite(output).all()
    again = MADE[method](0.6)
    memory: dict[Any, Any] = {}
    for where, x, plan in calls:
        told = replace(where, earlier=None, memory=None if where.memory is None else memory)
        made = again.plan(x.float(), told)
        if isinstance(made, FillPlan):
            made.restore(x.float(), x.float())
        if where.place == "attn2":  # takes over what attention had
            continue
        assert type(made) is type(plan)
        if where.site == "attention" and isinstance(plan, AssignPlan):
            assert isinstance(made, AssignPlan)
            assert torch.equal(made.group, plan.group)
            assert plan.reduce(x).dtype == torch.bfloat16


@every_method
def test_autocast_takes_no_bits_from_a_matching(method: str) -> None:
    x, guidance = normal(2, N, 16), torch.rand(2, N)
    plans = []
    for enabled in (False, True):
        where = Where(
            site="feed_forward",
            block=1,
            num_blocks=BLOCKS,
            grid=GRID,
            step=8,
            num_steps=9,
            memory={(1, ""): torch.zeros_like(x)},
            guidance=guidance,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            plans.append(MADE[method](0.6).plan(x, where))
    one, other = plans
    if isinstance(one, TiledPlan):
        assert isinstance(other, TiledPlan)
        assert torch.equal(one.weights, other.weights)
    else:
        assert isinstance(one, AssignPlan)
        assert isinstance(other, AssignPlan)
        assert torch.equal(one.group, other.group)


@every_method
def test_the_second_attention_goes_by_the_plan_of_the_first(method: str) -> None:
    model = model_of("sd3-dual")
    reducer = MADE[method](0.6)
    calls = noted(reducer)
    attached = attach_reducer(model, reducer)
    list(predictions(model, "sd3-dual", attached, steps=3))
    pairs = 0
    for (first, _, one), (second, _, other) in pairwise(calls):
        if second.place == "attn2":
            assert (first.place, first.block) == ("attn", second.block)
            assert type(one) is type(other)
            if isinstance(one, AssignPlan):
                assert isinstance(other, AssignPlan)
                assert torch.equal(one.group, other.group)
                pairs += 1
            pairs += isinstance(one, TiledPlan) and one is other
    assert pairs


@every_method
def test_flops_fall_with_what_is_kept(method: str) -> None:
    model = model_of("pixart-sigma")
    costs = [2 * model_flops(model, N, families.TEXT).dense()]
    for keep_ratio in (1.0, 0.7, 0.3):
        attached = attach_reducer(model, MADE[method](keep_ratio))
        costs.append(attached.run_flops(*GRID, families.TEXT, 2))
        attached.detach()
    assert costs[0] == costs[1] > costs[2] > costs[3]
    if "steps" in attached.reducer.needs:
        with pytest.raises(ValueError, match=r"changes from step to step: run_flops\("):
            attached.flops(*GRID, families.TEXT)
    else:
        assert costs[-1] == 2 * attached.flops(*GRID, families.TEXT)


def saved(k: int, sites: str, blocks: int = 1) -> int:
    """FLOPs that PixArt's modules of k tokens instead of all spare, width 48."""
    attention = 2 * 4 * 48 * 48 * (N - k) + 2 * 2 * 48 * (N * N - k * k)
    feed_forward = 2 * 8 * 48 * 48 * (N - k)
    return blocks * {"a": attention, "f": feed_forward, "af": attention + feed_forward}[sites]


def test_flops_are_those_of_what_runs_and_of_the_matching() -> None:
    model, steps = model_of("pixart-sigma"), 3
    dense = model_flops(model, N, families.TEXT).dense()

    def spared(reducer: Reducer) -> int:
        attached = attach_reducer(model, reducer)
        found = attached.run_flops(*GRID, families.TEXT, steps)
        attached.detach()
        return steps * dense - found

    cosines = 2 * 48 * 16 * 48  # of 48 sources with 16 destinations, width 48
    assert spared(ToFu(0.5)) == steps * (saved(32, "a", BLOCKS) - BLOCKS * cosines)
    # The first step and half of the blocks run on all tokens; distances multiply no matrices.
    assert spared(IBTM(0.5)) == (steps - 1) * saved(32, "a", 2)
    mixing = 4 * 2 * (2 * 8 * 16 * 48)  # 4 tiles of 8 x 16 weights, there and back, each site
    cosines_of_tiles = 4 * 2 * (16 * 16 + 8 * 16) * 48
    toma = saved(32, "af") - 2 * mixing - cosines_of_tiles
    assert spared(ToMA(0.5, tile=(4, 4))) == steps * (BLOCKS - 1) * toma
    sdtm, expected = SDTM(0.6), 0
    for step in (1, 2):  # 0 runs on all tokens
        num = N - int(N * (1 - sdtm.merged_share(step, steps)) + 1e-6)
        early = step == 1
        spares = saved(N - num // 3 * 3, "af") if early else saved(N - num, "f") - cosines
        expected += BLOCKS * spares
    assert spared(sdtm) == expected


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_tell_steps_and_guidance_and_leave_nothing(name: str) -> None:
    pipe: Any = running.build(name)
    bare = running.call(name, pipe)[0]
    attached = shiva_dit.attach_reducer(pipe.transformer, IBTM(0.6))
    calls = noted(attached.reducer)
    with pytest.raises(ValueError, match=r"IBTM goes by what guidance changes.*guidance_scale"):
        running.call(name, pipe, guided=False)
    first = running.call(name, pipe)[0]
    steps = {(where.step, where.num_steps, where.is_both) for where, _, _ in calls}
    assert steps == {(step, running.STEPS, True) for step in range(running.STEPS)}
    assert all((where.guidance is None) == (where.step == 0) for where, _, _ in calls)
    assert not torch.equal(torch.as_tensor(first), torch.as_tensor(bare))
    assert not attached.runs._runs
    assert torch.equal(torch.as_tensor(running.call(name, pipe)[0]), torch.as_tensor(first))
    attached.detach()
    attached = shiva_dit.attach_reducer(pipe.transformer, SDTM(0.6))
    assert torch.isfinite(torch.as_tensor(running.call(name, pipe, guided=False)[0])).all()
    assert not attached.runs._runs
    shiva_dit.remove(pipe)
    assert torch.equal(torch.as_tensor(running.call(name, pipe)[0]), torch.as_tensor(bare))


def test_a_pass_is_what_its_context_says() -> None:
    """Of models that name their passes by `cache_context`; these three don't (diffusers 0.42.1)."""
    model = tiny.sd3()
    attached = attach_reducer(model, IBTM(0.6))
    calls = noted(attached.reducer)
    own = shiva_dit.steps(attached.model, 2)
    for step in range(2):
        for name, seed in (("pred_cond", 1), ("pred_uncond", 2)):
            _set_cache_context(model, CacheContext(name))
            with own.step(step):
                tiny.run(model, tiny.inputs(seed=seed))
    assert [where.guidance is not None for where, _, _ in calls] == [False] * 8 + [True] * 8
    memories = [where.memory for where, _, _ in calls]
    assert all(memory is memories[0] for memory in (*memories[:4], *memories[8:12]))
    assert all(memory is memories[4] for memory in (*memories[4:8], *memories[12:]))
    assert memories[0] is not memories[4]
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
    with (
        pytest.raises(ValueError, match=r"of no guided run"),
        shiva_dit.steps(attached.model, 2).step(0),
    ):
        tiny.run(model, tiny.inputs())


def test_a_third_pass_goes_by_the_guidance_of_the_step_before_as_well() -> None:
    model = tiny.sd3()
    attached = attach_reducer(model, IBTM(0.6))
    calls = noted(attached.reducer)
    own = shiva_dit.steps(attached.model, 3)
    for step in range(3):
        with own.step(step):
            with shiva_dit.guided(model, "both"):
                tiny.run(model, tiny.inputs(4, seed=step))
            tiny.run(model, tiny.inputs(2, seed=step))
    found = [calls[at : at + 4] for at in range(0, len(calls), 4)]  # by forward
    for both, third in zip(found[::2], found[1::2], strict=True):
        assert both[0][0].guidance is third[0][0].guidance
    maps = [both[0][0].guidance for both in found[::2]]
    assert maps[0] is None
    assert maps[1] is not None
    assert maps[2] is not None
    assert not torch.equal(maps[1], maps[2])


def test_a_run_that_was_broken_off_is_forgotten_by_the_next() -> None:
    model = tiny.sd3()
    attached = attach_reducer(model, SDTM(0.6))
    pipe = tiny.pipeline(model)
    whole, longer = (tiny.generate(pipe, 4.0, num_inference_steps=num) for num in (4, 6))

    def broken(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    def broken_late(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        return broken(pipe, step, t, given) if step == 2 else given

    with pytest.raises(KeyboardInterrupt):
        tiny.generate(pipe, 4.0, callback_on_step_end=broken)
    assert len(attached.runs._runs) == 1
    assert torch.equal(tiny.generate(pipe, 4.0, num_inference_steps=6), longer)
    assert not attached.runs._runs
    with pytest.raises(KeyboardInterrupt):
        tiny.generate(pipe, 4.0, callback_on_step_end=broken_late)
    scheduler: Any = pipe.scheduler  # also if it goes through the same list once more
    scheduler.set_timesteps = lambda *args, **kwargs: setattr(scheduler, "_step_index", None)
    assert torch.equal(tiny.generate(pipe, 4.0), whole)


def test_a_run_of_a_part_of_the_list_begins_at_its_own_first_step() -> None:
    name = "StableDiffusion3Img2ImgPipeline"
    pipe = running.build(name)
    attached = attach_reducer(pipe.transformer, SDTM(0.6))
    calls = noted(attached.reducer)
    running.call(name, pipe, num_inference_steps=6, strength=0.5)
    assert {(where.step, where.num_steps) for where, _, _ in calls} == {(i, 3) for i in range(3)}


@pytest.mark.parametrize("method", [IBTM, SDTM])
def test_a_pipeline_within_anothers_callback_and_skipped_layers(method: Any) -> None:
    """A pass of one half that skips a layer, and another run on the same model amid the first."""
    model = tiny.sd3()
    attach_reducer(model, method(0.6))
    outer, inner = tiny.pipeline(model), tiny.pipeline(model)
    skips = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}
    alone = tiny.generate(outer, 4.0), tiny.generate(inner, 3.0, **skips)
    found: list[Tensor] = []

    def between(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        found.append(tiny.generate(inner, 3.0, **skips))
        return given

    assert torch.equal(tiny.generate(outer, 4.0, callback_on_step_end=between), alone[0])
    assert len(found) == 4
    assert all(torch.equal(images, alone[1]) for images in found)


@pytest.mark.parametrize("method", ["ibtm", "sdtm", "toma, reused"])
def test_calls_that_say_nothing_of_their_step_are_refused(method: str) -> None:
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    attached = attach_reducer(model, MADE[method](0.6))
    with pytest.raises(
        ValueError, match=r"goes by the steps of a run.*\bsteps\(model, num_steps\)"
    ):
        tiny.run(model, tiny.inputs())
    with shiva_dit.disabled(model):
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    own = shiva_dit.steps(attached.model, 2)
    with pytest.raises(ValueError, match="a run of 2 steps has no step 2"), own.step(2):
        pass
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        shiva_dit.steps(attached.model, 0)
    with own.step(0), shiva_dit.guided(model, "both"):
        with pytest.raises(ValueError, match="3 samples can't hold both"):
            tiny.run(model, tiny.inputs(3))
        assert torch.isfinite(tiny.run(model, tiny.inputs())).all()


# --- ToFu -----------------------------------------------------------------------------------------


def test_tofu_prunes_in_the_first_half_and_merges_in_the_second() -> None:
    model = model_of("dit")
    reducer = ToFu(0.5)
    calls = noted(reducer)
    attached = attach_reducer(model, reducer)
    list(predictions(model, "dit", attached, steps=1))
    kinds = [type(plan) for _, _, plan in calls]
    assert kinds == [PrunedPlan] * 2 + [LongMeanPlan] * 2
    for where, x, plan in calls:  # the groups are those of Token Merging
        theirs = ToMeSD(0.5).plan(x, where)
        assert isinstance(theirs, AssignPlan)
        assert isinstance(plan, AssignPlan)
        assert torch.equal(plan.group, theirs.group)
    odd = Where(site="attention", block=1, num_blocks=3, grid=GRID)
    assert type(ToFu(0.5).plan(calls[0][1], odd)) is PrunedPlan
    with pytest.raises(ValueError, match="needs their number"):
        ToFu(0.5).plan(calls[0][1], replace(odd, num_blocks=None))


def test_a_token_of_tofu_is_its_destination_or_as_long_as_the_longest() -> None:
    x = normal(2, N, 16) * torch.linspace(0.5, 2.0, N)[:, None]
    places = torch.arange(0, N, 4)
    plan = merged(x, places, 40)
    pruned = PrunedPlan(plan.group, plan.k, leaders(plan, places)).reduce(x)
    long = LongMeanPlan(plan.group, plan.k).reduce(x)
    for b in range(2):
        for slot in range(plan.k):
            group = [i for i in range(N) if plan.group[b, i] == slot]
            leader = group[0] if len(group) == 1 else next(i for i in group if i in places)
            assert torch.equal(pruned[b, slot], x[b, leader])
            rows = x[b, group].double()
            mean = rows.mean(0)
            by_words = mean / mean.norm() * rows.norm(dim=1).max()
            # Float32 sums of at most 49 values below 10: measured 1e-6.
            torch.testing.assert_close(long[b, slot].double(), by_words, rtol=0.0, atol=1e-5)
    opposite = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    nothing = LongMeanPlan(torch.zeros(1, 2, dtype=torch.long), 1).reduce(opposite)
    assert torch.equal(nothing, torch.zeros(1, 1, 2))


# --- IBTM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "k"), [((8, 8), 40), ((6, 10), 20), ((5, 7), 4)])
def test_the_least_important_go_to_the_nearest_of_some_important(
    grid: tuple[int, int], k: int
) -> None:
    num = grid[0] * grid[1]
    importance = torch.rand(3, num, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(num, generator=torch.Generator().manual_seed(2))
    group = by_importance(importance, grid, k, order)
    for b in range(3):
        kept = sorted(range(num), key=lambda i: -float(importance[b, i]))[:k]
        slots = {token: slot for slot, token in enumerate(sorted(kept))}
        near = sorted(kept, key=lambda i: int(order[i]))[: max(1, min(num // 4, k))]
        for i in range(num):
            if i in slots:
                assert group[b, i] == slots[i]
                continue
            away = [math.dist(divmod(i, grid[1]), divmod(j, grid[1])) for j in near]
            assert group[b, i] == slots[near[away.index(min(away))]]


def test_importance_is_what_guidance_changed_at_the_step_before() -> None:
    model = model_of("sd3")
    bare = next(predictions(model, "sd3"))
    reducer = IBTM(0.6)
    calls = noted(reducer)
    attached = attach_reducer(model, reducer)
    outputs = list(predictions(model, "sd3", attached, steps=3))
    assert torch.equal(outputs[0], next(predictions(model, "sd3", attached, steps=3)))
    assert torch.equal(outputs[0], bare)  # the first step runs on all tokens
    for where, x, plan in calls:
        if where.step:
            uncond, cond = outputs[where.step - 1].chunk(2)
            size = (cond - uncond).abs().mean(1)
            pooled = size.view(2, 8, 2, 8, 2).mean(dim=(2, 4)).flatten(1)
            assert where.guidance is not None
            torch.testing.assert_close(where.guidance, pooled)
            if where.block in (1, 2):  # the middle half
                assert isinstance(plan, AssignPlan)
                order = draws(N, 0, where, x.device)
                group = by_importance(where.guidance, GRID, int(0.6 * N), order)
                assert torch.equal(plan.group, group.repeat(2, 1))
        assert (plan is None) == (where.step == 0 or where.block in (0, 3))


def test_ibtm_works_in_its_published_blocks() -> None:
    def blocks(reducer: IBTM, num_blocks: int) -> list[int]:
        x, guidance = normal(2, N, 4), torch.rand(2, N)
        where = Where(site="attention", block=0, grid=GRID, guidance=guidance)
        told = [replace(where, block=i, num_blocks=num_blocks) for i in range(num_blocks)]
        return [i for i, each in enumerate(told) if reducer.plan(x, each) is not None]

    assert blocks(IBTM(0.5), 28) == blocks(IBTM(0.5), 24) == list(PUBLISHED) == list(range(7, 21))
    assert blocks(IBTM(0.5), 12) == list(range(3, 9))
    assert blocks(IBTM(0.5, blocks=(0, 5)), 12) == [0, 5]
    with pytest.raises(ValueError, match=r"blocks must be some of 0 to 3, got \(4,\)"):
        blocks(IBTM(0.5, blocks=(4,)), 4)
    with pytest.raises(ValueError, match=r"keep_ratio must lie in \(0, 1\]"):
        IBTM(1.5)


# --- ToMA -----------------------------------------------------------------------------------------


def test_cover_is_that_of_plain_loops() -> None:
    """Small whole numbers, so that no sum is rounded; of two tokens alike both come in the end."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (3, 9, 5), generator=generator).float()
    x[1, 4] = x[1, 5]
    similarity = x @ x.mT
    chosen = cover(similarity, 9)
    for b in range(3):
        found: list[int] = []
        for _ in range(9):
            left = [v for v in range(9) if v not in found]
            reached = [
                sum(max(float(similarity[b, i, j]) for j in [*found, v]) for i in range(9))
                for v in left
            ]
            found.append(left[reached.index(max(reached))])
        assert chosen[b].tolist() == found


def test_weights_of_toma_and_its_means() -> None:
    x = normal(2, N, 16)
    memory: dict[Any, Any] = {}
    where = Where(site="attention", block=1, grid=GRID, memory=memory)
    plan = ToMA(0.5, tile=(4, 4)).plan(x, where)
    assert isinstance(plan, TiledPlan)
    assert plan.weights.dtype == torch.float32
    ones = torch.ones(())
    # 8 and 16 float32 terms.
    torch.testing.assert_close(plan.weights.sum(2), ones.expand(2, 4, 16), rtol=0.0, atol=1e-6)
    mix = plan.weights / plan.weights.sum(-1, keepdim=True)
    torch.testing.assert_close(mix.sum(-1), ones.expand(2, 4, 8), rtol=0.0, atol=1e-6)
    less = plan.reduce(x)
    back = plan.restore(less, x)
    members = cells(GRID, (4, 4), x.device)
    for b in range(2):
        for tile in range(4):
            rows = x[b, members[tile]].double()
            unit = rows / rows.norm(dim=1, keepdim=True)
            chosen = memory[1, "chosen"][b, tile]  # (each other's nearest are a tie)
            assert len(set(chosen.tolist())) == 8
            weights = (SHARPNESS * (unit[chosen] @ unit.T)).softmax(dim=0)
            means = torch.stack([(w[:, None] * rows).sum(0) / w.sum() for w in weights])
            # Cosines of float32, times 1000: weights are off by 1e-4 where two are alike.
            ours = less[b, 8 * tile : 8 * tile + 8].double()
            torch.testing.assert_close(ours, means, rtol=0.0, atol=1e-3)
            mixed = weights.T @ means
            torch.testing.assert_close(back[b, members[tile]].double(), mixed, rtol=0.0, atol=1e-3)


def test_both_passes_of_toma_take_the_same_tokens_and_the_first_block_all() -> None:
    x = normal(4, N, 16)
    where = Where(site="attention", block=1, grid=GRID, memory={})
    plans = []
    for is_both in (True, False):
        memory: dict[Any, Any] = {}
        plans.append(ToMA(0.5).plan(x, replace(where, is_both=is_both, memory=memory)))
        one, other = memory[1, "chosen"].chunk(2)
        assert torch.equal(one, other) == is_both
    unit = torch.nn.functional.normalize(x, dim=-1)
    similarity = unit @ unit.mT
    shared = cover((similarity[:2] + similarity[2:]) / 2, 32)
    own = cells(GRID, (8, 8), x.device)[0]
    assert isinstance(plans[0], TiledPlan)
    near = unit[:, own].take_along_dim(shared.repeat(2, 1)[..., None], dim=1)
    weights = (SHARPNESS * (near @ unit.mT)).softmax(dim=1)
    torch.testing.assert_close(plans[0].weights[:, 0], weights, rtol=0.0, atol=1e-3)
    assert ToMA(0.5).plan(x, replace(where, block=0)) is None
    with pytest.raises(ValueError, match="must be 1 at least"):
        ToMA(0.5, weights_every=0)


def test_toma_chooses_and_weighs_anew_when_its_turn_comes() -> None:
    reducer = ToMA(0.5, destinations_every=4, weights_every=2)
    memory: dict[Any, Any] = {}
    chosen, weights = [], []
    for step in range(9):
        where = Where(site="attention", block=1, grid=GRID, step=step, num_steps=9, memory=memory)
        reducer.plan(normal(2, N, 16, seed=step), where)
        chosen.append(memory[1, "chosen"])
        weights.append(memory[1, "weights"])

    def changes(found: list[Tensor]) -> list[int]:
        return [i for i in range(1, 9) if found[i] is not found[i - 1]]

    assert changes(chosen) == [4, 8]
    assert changes(weights) == [2, 4, 6, 8]


# --- SDTM -----------------------------------------------------------------------------------------


def test_sdtm_merges_less_from_step_to_step_at_few_levels() -> None:
    reducer = SDTM(0.7, levels=1001)
    for step in range(50):
        share = (0.3 - 0.2) + 2 * 0.2 * math.cos(math.pi * step / (2 * 49))
        assert reducer.merged_share(step, 50) == pytest.approx(share, abs=0.2 / 1000 + 1e-9)
    shares = [SDTM(0.7).merged_share(step, 50) for step in range(50)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 8
    assert (shares[0], shares[-1]) == (pytest.approx(0.5), pytest.approx(0.1))
    assert SDTM(0.7).merged_share(0, 1) == pytest.approx(0.5)
    for keep_ratio, least, most in ((0.25, 0.75, 0.75), (0.4, 0.45, 0.75), (0.9, 0.0, 0.2)):
        shares = [SDTM(keep_ratio).merged_share(step, 20) for step in range(20)]
        assert (min(shares), max(shares)) == (pytest.approx(least), pytest.approx(most))
    for options in ({"keep_ratio": 0.2}, {"levels": 1}, {"refresh": 1}):
        with pytest.raises(ValueError, match=r"must lie in \[1/4, 1\]|must be 2 at least"):
            SDTM(**options)
    with pytest.raises(ValueError, match="by the steps of a run on a grid"):
        SDTM(0.5).plan(normal(1, N, 4), Where(site="attention", block=0))


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
def test_cells_that_are_most_alike_merge(grid: tuple[int, int]) -> None:
    num = grid[0] * grid[1]
    x, bonus = normal(2, num, 6), 0.3 * torch.rand(2, num)
    members = cells(grid, (2, 2), x.device)
    plan = merged_cells(x, members, 3, bonus)
    assert plan.k == num - 9
    for b in range(2):
        worth = []
        for cell in members.tolist():
            pairs = [(i, j) for i in cell for j in cell]
            cosines = [
                float(torch.cosine_similarity(x[b, i], x[b, j], dim=0, eps=0.0)) for i, j in pairs
            ]
            worth.append(sum(cosines) / 16 + float(bonus[b, cell].mean()))
        best = sorted(range(len(worth)), key=lambda cell: -worth[cell])[:3]
        for rank, cell in enumerate(best):
            assert plan.group[b, members[cell]].tolist() == [plan.k - 3 + rank] * 4
        alone = [i for i in range(num) if i not in members[best].flatten().tolist()]
        assert plan.group[b, alone].tolist() == list(range(num - 12))
    with pytest.raises(ValueError, match="cells can't be merged"):
        merged_cells(x, members[:2], 3, bonus)


def test_sdtm_mixes_what_merged_tokens_get_with_the_last_whole_step() -> None:
    """Around plain functions: whole steps, cells, then single tokens in the feed-forward alone."""
    reducer = SDTM(0.6, refresh=4, switch=0.3, weight=0.25, age_weight=0.5)
    memory: dict[Any, Any] = {}
    kept: dict[str, Tensor] = {}
    ages = torch.zeros(2, N)
    for step in range(7):
        inputs = {"attn": normal(2, N, 8, seed=step), "ff": normal(2, N, 8, seed=50 + step)}
        for place, x in inputs.items():
            site: Any = {"attn": "attention", "ff": "feed_forward"}[place]
            where = Where(
                site=site, block=2, place=place, grid=GRID, step=step, num_steps=7, memory=memory
            )
            plan = reducer.plan(x, where)
            early = step <= 2
            if not early and place == "attn":
                assert plan is None
                continue
            assert plan is not None
            output = 3.0 * plan.reduce(x) + step
            got = plan.restore(output, torch.zeros_like(x))
            if step % 4 == 0:  # all tokens run
                assert torch.equal(got, 3.0 * x + step)
                kept[place] = got
                continue
            assert isinstance(plan, CachedPlan)
            share = reducer.merged_share(step, 7)
            num = N - int(N * (1 - share) + 1e-6)
            assert plan.k == N - (num // 3 * 3 if early else num)
            copied = output.take_along_dim(plan.group[..., None], dim=1)
            for b in range(2):
                sizes = plan.group[b].bincount()[plan.group[b]]
                together = sizes > 1 if early else plan.group[b] >= plan.k - 16
                assert torch.equal(plan.together[b], together)
                expected = torch.where(
                    together[:, None], 0.25 * copied[b] + 0.75 * kept[place][b], copied[b]
                )
                torch.testing.assert_close(got[b], expected, rtol=1e-5, atol=1e-5)
            if place == "ff":  # both had one plan, and ages count it once
                ages = torch.where(plan.together, ages + 1, 0.0)
                assert torch.equal(memory[2, "ages"], ages)
                if not early:  # the oldest of each cell is a destination: a group of its own
                    for b, cell in [(b, c) for b in range(2) for c in cells(GRID, (2, 2), None)]:
                        held = plan.group[b, cell[0]]
                        assert (plan.group[b, cell] >= plan.k - 16).any(), held
    assert (2, "attn") not in memory  # not needed any more


def test_a_bonus_moves_sources_up_and_each_sample_has_its_own_destinations() -> None:
    x, bonus = normal(2, 12, 4), torch.rand(2, 12)
    places = torch.tensor([[0, 5, 7], [11, 2, 3]])
    plan = merged(x, places, 4, bonus)
    for b in range(2):
        sources = [i for i in range(12) if i not in places[b].tolist()]
        worth, mates = {}, {}
        for i in sources:
            rows = x[b, places[b]]
            alike = torch.cosine_similarity(x[b, i].expand_as(rows), rows, dim=1)
            worth[i], mates[i] = float(alike.max() + bonus[b, i]), int(alike.argmax())
        ranked = sorted(sources, key=lambda i: -worth[i])
        assert plan.group[b, places[b]].tolist() == [5, 6, 7]
        assert [int(plan.group[b, i]) - 5 for i in ranked[:4]] == [mates[i] for i in ranked[:4]]
        assert plan.group[b, ranked[4:]].tolist() == list(range(5))


def test_the_longest_merged_of_a_cell_is_its_destination() -> None:
    ages = torch.randperm(N, generator=torch.Generator().manual_seed(3)).float().expand(2, -1)
    memory: dict[Any, Any] = {(0, "ages"): ages}
    where = Where(site="feed_forward", block=0, grid=GRID, step=8, num_steps=9, memory=memory)
    x = normal(2, N, 8)
    plan = SDTM(0.6, refresh=None, age_weight=0.5).plan(x, where)
    assert isinstance(plan, CachedPlan)
    members = cells(GRID, (2, 2), x.device)
    places = torch.stack([max(cell, key=lambda i: float(ages[0, i])) for cell in members])
    theirs = merged(x, places, N - plan.k, 0.5 * ages / ages.mean(1, keepdim=True))
    assert torch.equal(plan.group, theirs.group)
