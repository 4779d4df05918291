"""Methods by plan: the registry, Token Merging against plain loops, and what a plan can carry."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shiva_dit
from shiva_dit.config import from_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.experiments.quickstart import CONTROLS
from shiva_dit.methods.base import Reducer, Selector, Site, Where
from shiva_dit.methods.blocks import BlockReducer
from shiva_dit.methods.norm import NormSelector
from shiva_dit.methods.plans import AssignPlan, GatherPlan, LinearPlan, Plan, RaggedPlan
from shiva_dit.methods.registry import METHODS, Making, Shape
from shiva_dit.methods.sdtm import SDTM
from shiva_dit.methods.settings import DyDiTConfig, SparseDiTConfig
from shiva_dit.methods.tomesd import ToMeSD, destinations, merged
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.counted import model_flops
from shiva_dit.models.families import model_spec
from shiva_dit.models.reducing import attach_reducer
from shiva_dit.modules.router import ShivaRouter
from shiva_dit.training.recipe import TrainConfig
from tests import families, tiny

SERVED = ("pixart-sigma", "dit", "sd3", "sd3-dual")
TEXT = {"pixart-sigma": families.TEXT, "dit": 0, "sd3": tiny.TEXT_TOKENS}
BLOCKS, GRID = 4, (8, 8)
NUM_TOKENS = GRID[0] * GRID[1]


def model_of(name: str) -> Any:
    if name.startswith("sd3"):
        return tiny.sd3("dual" if name == "sd3-dual" else "plain")
    return families.made(name)


def run(model: Any, name: str, batch: int = 2, t: float = 0.5) -> Tensor:
    with torch.no_grad():
        if name.startswith("sd3"):
            return model(**tiny.inputs(batch, t=t)).sample
        return families.run(model, families.arguments(name, batch, t))


SETTINGS = {
    # Half of the gates off, as training may leave them.
    "dydit": DyDiTConfig(width_bias=0.0, token_bias=0.0),
    "sparsedit": SparseDiTConfig(groups=(1, 0, 1, 1)),  # four blocks
}


def making(keep_ratio: float = 0.5, name: str = "") -> Making:
    torch.manual_seed(0)
    router = ShivaRouter(
        num_blocks=BLOCKS, num_groups=2, width=32, time_dim=32, context_dim=tiny.POOLED_DIM
    )
    return Making(
        num_blocks=BLOCKS,
        grid=lambda: GRID,
        keep_ratio=keep_ratio,
        router=router.eval(),
        generator=torch.Generator().manual_seed(0),
        shape=lambda: Shape(width=32, time_dim=32, num_heads=4),
        settings=None if keep_ratio == 1.0 else SETTINGS.get(name),
    )


def reducers(keep_ratio: float = 0.5) -> dict[str, Reducer]:
    made = {name: method.make(making(keep_ratio, name)) for name, method in METHODS.items()}
    return {name: reducer for name, reducer in made.items() if reducer is not None}


every_method = pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])


# --- every method -----------------------------------------------------------------------------


def put(model: nn.Module, reducer: Reducer, keep_ratio: float) -> Any:
    """On by the way that is the method's."""
    if isinstance(reducer, Selector):
        return attach(model, reducer, Schedule.uniform(keep_ratio, num_blocks=BLOCKS))
    return attach_reducer(model, reducer)


@pytest.mark.parametrize(
    "name", [name for name, r in reducers().items() if not isinstance(r, BlockReducer)]
)
@pytest.mark.parametrize("k", [16, 33, 63])
def test_exactly_k_rows_run_and_all_come_back(name: str, k: int) -> None:
    keep_ratio = (k + 0.5) / NUM_TOKENS if k < 63 else 63 / 64
    reducer = reducers(keep_ratio)[name]
    if name == "sdtm":  # its steps differ
        reducer = SDTM(keep_ratio, deviation=0.0, refresh=None)
    x = torch.randn(3, NUM_TOKENS, 32, generator=torch.Generator().manual_seed(1))
    terms = None
    if isinstance(reducer, Selector):
        every = reducer.terms(torch.randn(3, 32), torch.randn(3, tiny.POOLED_DIM))
        terms = None if every is None else every[1]
    where = Where(
        site=reducer.sites[-1],
        block=1,
        num_blocks=BLOCKS,
        grid=GRID,
        time=torch.tensor(500.0),
        step=1,
        num_steps=2,
        memory={},
        guidance=torch.rand(3, NUM_TOKENS, generator=torch.Generator().manual_seed(2)),
        k=k,
        terms=terms,
    )
    plan = reducer.plan(x, where)
    assert plan is not None
    less = plan.reduce(x)
    assert less.shape == (3, k, 32)
    assert plan.restore(less, x).shape == x.shape
    constant = torch.full_like(x, 2.0)
    back = plan.restore(plan.reduce(constant), constant)
    if name == "toma":  # weights sum to 1 but for rounding: two sums of 64 float32 terms
        torch.testing.assert_close(back, constant, rtol=0.0, atol=2e-5)
    else:
        assert torch.equal(back, constant)


def told(model: nn.Module, attached: Any, batch: int = 2, t: float = 0.5) -> Tensor:
    """A call; of methods that go by the steps of a run, that of its third and last one."""
    if "steps" not in getattr(attached, "reducer", NormSelector()).needs:
        return run(model, "sd3", batch, t)
    own = shiva_dit.steps(attached.model, 3)
    with shiva_dit.guided(model, "both"):
        for step, time in enumerate((1.0, 0.9)):
            with own.step(step):
                run(model, "sd3", batch, time)
        with own.step(2):
            return run(model, "sd3", batch, t)


@every_method
def test_a_forward_leaves_nothing_for_the_next(name: str) -> None:
    """The same call gives the same bits again, whatever ran between (chance goes on)."""
    model = tiny.sd3()
    attached = put(model, reducers()[name].seeded(3), 0.5)
    first = told(model, attached)
    told(model, attached, batch=4, t=0.9)
    again = told(model, attached)
    assert torch.equal(first, again) == (name != "random")


@every_method
def test_at_ratio_1_it_is_the_bare_model(name: str) -> None:
    model = tiny.sd3()
    bare = run(model, "sd3")
    attached = put(model, reducers(1.0)[name], 1.0)
    assert torch.equal(told(model, attached), bare)


def traces(model: nn.Module) -> dict[str, Any]:
    """Attributes of all modules, and their hooks."""
    return {
        name: {key: dict(v) if isinstance(v, dict) else v for key, v in vars(module).items()}
        for name, module in model.named_modules()
    }


@every_method
def test_taken_off_it_leaves_no_trace(name: str) -> None:
    model = tiny.sd3("dual")
    bare, before = run(model, "sd3"), traces(model)
    for _ in range(2):
        attached = put(model, reducers()[name], 0.5)
        assert list(model.state_dict()) == list(tiny.sd3("dual").state_dict())
        assert not torch.equal(told(model, attached), bare)
        attached.detach()
        assert traces(model) == before
        assert torch.equal(run(model, "sd3"), bare)


def test_recipes_know_the_methods_of_the_registry_and_no_others() -> None:
    for name, method in METHODS.items():
        backbone = "lora" if method.tunes else "frozen"
        config = from_dict(TrainConfig, {"method": name, "backbone": backbone}, "test")
        frozen = from_dict(TrainConfig, {"method": name, "backbone": "frozen"}, "test")
        assert config.method == name
        assert frozen.trains_nothing == (not method.learns)
    with pytest.raises(ValueError, match="tomesd"):
        from_dict(TrainConfig, {"method": "none"}, "test")
    with pytest.raises(ValueError, match='runs without training: set backbone = "frozen"'):
        TrainConfig(method="tomesd", backbone="lora")
    assert set(CONTROLS.values()) <= set(METHODS)


# --- Token Merging ----------------------------------------------------------------------------


def by_loops(x: Tensor, places: list[int], num_merged: int) -> list[list[list[int]]]:
    """The groups of tokens, of each sample, by the paper's words."""
    found = []
    for sample in x.double():
        sources = [i for i in range(len(sample)) if i not in places]
        mates = {}
        for source in sources:
            similar = [
                float(sample[source] @ sample[d] / sample[source].norm() / sample[d].norm())
                for d in places
            ]
            best = max(similar)
            mates[source] = best, places[similar.index(best)]
        ranked = sorted(sources, key=lambda source: -mates[source][0])
        groups = {place: [place] for place in places}
        for source in ranked[:num_merged]:
            groups[mates[source][1]].append(source)
        found.append([*groups.values(), *([source] for source in ranked[num_merged:])])
    return found


@settings(max_examples=25, deadline=None)
@given(
    grid=st.sampled_from([(4, 4), (6, 10), (5, 7), (3, 8)]),
    cell=st.sampled_from([(2, 2), (2, 4), (3, 1)]),
    share=st.floats(0.1, 1.0),
    seed=st.integers(0, 1000),
)
def test_merging_is_that_of_plain_loops(
    grid: tuple[int, int], cell: tuple[int, int], share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, grid[0] * grid[1], 16, generator=generator) * 2 - 1
    size = grid[0] // cell[0], grid[1] // cell[1]
    offsets = torch.randint(cell[0] * cell[1], size, generator=generator)
    places = destinations(grid, cell, offsets)
    for row in range(size[0]):  # each lies in its cell, where its offset says
        for column in range(size[1]):
            at = divmod(int(places[row * size[1] + column]), grid[1])
            inside = divmod(int(offsets[row, column]), cell[1])
            assert at == (row * cell[0] + inside[0], column * cell[1] + inside[1])
    num_merged = max(1, int(share * (grid[0] * grid[1] - len(places))))
    plan = merged(x, places, num_merged)
    less = plan.reduce(x)
    assert less.shape[1] == x.shape[1] - num_merged
    restored = plan.restore(less, x)
    for b, groups in enumerate(by_loops(x, places.tolist(), num_merged)):
        for group in groups:
            assert len(set(plan.group[b, group].tolist())) == 1
            mean = x[b, group].double().mean(0).float()
            # Sums of at most 60 values in [-1, 1]; measured: 1.2e-7.
            for token in group:
                torch.testing.assert_close(restored[b, token], mean, rtol=0.0, atol=5e-7)
        assert len(groups) == plan.k


@pytest.mark.skipif(importlib.util.find_spec("tomesd") is None, reason="needs the package tomesd")
@pytest.mark.parametrize(
    ("grid", "cell", "num_merged"),
    [((8, 8), (2, 2), 32), ((6, 10), (2, 2), 20), ((7, 9), (2, 2), 30), ((8, 8), (4, 2), 50)],
)
@pytest.mark.parametrize("random", [True, False])
def test_merging_is_that_of_the_package(
    grid: tuple[int, int], cell: tuple[int, int], num_merged: int, random: bool
) -> None:
    """The same destinations given, values in [-1, 1] agree to 2e-7."""
    matching: Any = importlib.import_module("tomesd.merge").bipartite_soft_matching_random2d
    x = torch.rand(3, grid[0] * grid[1], 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    size = grid[0] // cell[0], grid[1] // cell[1]
    draws = torch.Generator().manual_seed(5)
    merge, unmerge = matching(
        x, grid[1], grid[0], cell[1], cell[0], num_merged, no_rand=not random, generator=draws
    )
    offsets = torch.zeros(size, dtype=torch.long)
    if random:  # as the package draws them
        again = torch.Generator().manual_seed(5)
        offsets = torch.randint(cell[0] * cell[1], (*size, 1), generator=again)[..., 0]
    plan = merged(x, destinations(grid, cell, offsets), num_merged)
    ours, theirs = plan.reduce(x), merge(x)
    assert ours.shape == theirs.shape

    def in_order(tokens: Tensor) -> Tensor:
        return tokens.gather(1, tokens[..., :1].argsort(dim=1).expand_as(tokens))

    torch.testing.assert_close(in_order(ours), in_order(theirs), rtol=0.0, atol=2e-7)
    torch.testing.assert_close(plan.restore(ours, x), unmerge(theirs), rtol=0.0, atol=2e-7)


def plan_at(reducer: ToMeSD, t: float, batch: int = 1, block: int = 0) -> AssignPlan:
    x = torch.randn(1, NUM_TOKENS, 8, generator=torch.Generator().manual_seed(0))
    where = Where(site="attention", block=block, grid=GRID, time=torch.tensor(t))
    plan = reducer.plan(x.expand(batch, -1, -1), where)
    assert isinstance(plan, AssignPlan)
    return plan


def test_draws_depend_on_seed_block_and_time_alone() -> None:
    def draw(seed: int, block: int, t: float) -> Tensor:
        where = Where(site="attention", block=block, grid=GRID, time=torch.tensor(t))
        return ToMeSD(seed=seed)._draw(4096, where, torch.device("cpu"))

    first = draw(0, 0, 500.0)
    assert torch.equal(first, draw(0, 0, 500.0))
    for other in (draw(1, 0, 500.0), draw(0, 1, 500.0), draw(0, 0, 501.0)):
        # Two independent draws of 1 of 4 agree in 1/4 of 4096 cells; deviation 0.7%.
        assert 0.22 < float((first == other).double().mean()) < 0.28
    shares = torch.bincount(first, minlength=4) / 4096
    assert len(shares) == 4
    assert (shares - 0.25).abs().max() < 0.03
    # Both halves of a guided batch merge alike where they are alike.
    plan = plan_at(ToMeSD(), 500.0, batch=2)
    assert torch.equal(plan.group[0], plan.group[1])
    assert torch.equal(plan.group[:1], plan_at(ToMeSD(), 500.0).group)
    fixed = ToMeSD(random=False)
    assert torch.equal(plan_at(fixed, 1.0).group, plan_at(fixed, 2.0, block=3).group)


def test_16_bits_are_averaged_in_32() -> None:
    x = torch.randn(2, NUM_TOKENS, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    plan = merged(x, destinations(GRID, (2, 2), torch.zeros(4, 4, dtype=torch.long)), 40)
    assert plan.reduce(x).dtype == torch.bfloat16
    assert torch.equal(plan.reduce(x), plan.reduce(x.float()).bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.2}, r"must lie in \[1/4, 1\]"),
        ({"keep_ratio": 1.5}, r"must lie in \[1/4, 1\]"),
        ({"cell": (1, 1)}, "two tokens at least"),
        ({"sites": ("heads",)}, "sites must be some of"),
        ({"sites": ()}, "sites must be some of"),
    ],
)
def test_what_tomesd_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToMeSD(**options)


def test_a_grid_too_small_for_its_cells_is_refused() -> None:
    x = torch.randn(1, 16, 8)
    where = Where(site="attention", block=0, grid=(1, 16), time=torch.tensor(1.0))
    with pytest.raises(ValueError, match="8 of 16 tokens can't be merged into 0"):
        ToMeSD().plan(x, where)
    with pytest.raises(ValueError, match="13 of 16 tokens can't be merged into 4"):
        merged(x, torch.arange(4), 13)
    with pytest.raises(ValueError, match="the image's is not known"):
        ToMeSD().plan(x, Where(site="attention", block=0))


# --- on models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("site", ["attention", "feed_forward", "cross_attention", "block"])
def test_each_module_sees_merged_tokens_and_all_get_a_copy(name: str, site: Site) -> None:
    model = model_of(name)
    if site == "cross_attention" and name != "pixart-sigma":
        with pytest.raises(ValueError, match=r"has no (module at )?cross_attention"):
            attach_reducer(model, ToMeSD(sites=(site,)))
        return
    bare = run(model, name)
    reducer = ToMeSD(0.5, sites=(site,))
    plans: list[Plan | None] = []
    make = reducer.plan

    def noted(x: Tensor, where: Where) -> Plan | None:
        plans.append(make(x, where))
        return plans[-1]

    reducer.plan = noted  # type: ignore[method-assign]
    seen: list[int] = []
    block: Any = model_spec(model).blocks(model)[1]
    inside = {
        "attention": "attn1.to_q" if hasattr(block, "attn1") else "attn.to_q",
        "feed_forward": "ff.net.2",
        "cross_attention": "attn2.to_q",
        "block": "ff.net.2",
    }[site]
    layer = block.get_submodule(inside)
    layer.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    reduction = attach_reducer(model, reducer)
    output = run(model, name)
    assert seen == [NUM_TOKENS // 2]
    assert output.shape == bare.shape
    assert not torch.equal(output, bare)
    blocks = len(model_spec(model).blocks(model))
    dual = 2 if name == "sd3-dual" and site == "attention" else 0  # a second attention each
    assert len(plans) == blocks + dual
    assert len({id(plan) for plan in plans}) == blocks  # which goes by the first one's plan
    reduction.detach()
    assert torch.equal(run(model, name), bare)


@pytest.mark.parametrize("name", ["pixart-sigma", "dit"])
def test_attention_is_as_if_merged_by_hand(name: str) -> None:
    """The first block's attention, called with the means, each copied back."""
    model = model_of(name)
    attention = model.transformer_blocks[0].attn1
    calls: list[tuple[Tensor, Tensor]] = []
    reducer = ToMeSD(0.5)
    attach_reducer(model, reducer)
    taken = attention.register_forward_hook(lambda m, a, out: calls.append((a[0], out)))
    run(model, name)
    taken.remove()
    x, output = calls[0]
    time = families.arguments(name)["timestep"][0].float()
    where = Where(site="attention", block=0, grid=GRID, time=time)
    plan = ToMeSD(0.5).plan(x, where)
    assert isinstance(plan, AssignPlan)
    bare = model_of(name)
    with torch.no_grad():
        less = bare.transformer_blocks[0].attn1(plan.reduce(x))
    assert torch.equal(output, plan.restore(less, x))


def test_flops_are_those_of_merged_tokens_and_of_the_matching() -> None:
    model = model_of("pixart-sigma")
    dense = model_flops(model, NUM_TOKENS, families.TEXT).dense()
    reduction = attach_reducer(model, ToMeSD(0.5))
    width, k = 48, NUM_TOKENS // 2
    saved = 4 * 2 * width * width * (NUM_TOKENS - k)  # q, k, v and out
    saved += 2 * 2 * width * (NUM_TOKENS**2 - k**2)  # scores and values
    matching = 2 * 48 * 16 * width  # each of N - M sources with each of M destinations
    assert reduction.flops(*GRID, families.TEXT) == dense - BLOCKS * (saved - matching)
    reduction.detach()
    reduction = attach_reducer(model, ToMeSD(1.0))
    assert reduction.flops(*GRID, families.TEXT) == dense
    assert reduction.num_parameters == 0


def test_pictures_that_are_no_squares_are_merged_too() -> None:
    model = model_of("pixart-sigma")
    given_ = families.arguments("pixart-sigma")
    given_["hidden_states"] = torch.randn(2, 4, 12, 20)
    bare = families.run(model, given_)
    attach_reducer(model, ToMeSD(0.3))
    assert families.run(model, given_).shape == bare.shape


def test_models_that_cannot_be_merged_are_refused() -> None:
    for name in families.FAMILIES:
        model = families.FAMILIES[name].build()
        if type(model).__name__ in (
            "PixArtTransformer2DModel",
            "DiTTransformer2DModel",
            "SD3Transformer2DModel",
        ):
            attach_reducer(model, ToMeSD()).detach()
            continue
        with pytest.raises(ValueError, match="can't take a reducer that merges"):
            attach_reducer(model, ToMeSD())
    with pytest.raises(ValueError, match="can't be served"):
        attach_reducer(families.unsupported(), ToMeSD())


def test_a_reducer_and_an_adapter_refuse_each_other() -> None:
    model = tiny.sd3()
    selector = NormSelector()
    attached = attach(model, selector, Schedule.uniform(0.5, num_blocks=BLOCKS))
    with pytest.raises(ValueError, match="has an adapter or a selector on"):
        attach_reducer(model, ToMeSD())
    attached.detach()
    reduction = attach_reducer(model, ToMeSD())
    with pytest.raises(ValueError, match="has a reducer on"):
        attach(model, selector, Schedule.uniform(0.5, num_blocks=BLOCKS))
    assert attachment_of(model) is None
    with pytest.raises(ValueError, match="has a reducer on"):
        attach_reducer(model, ToMeSD())
    with pytest.raises(RuntimeError, match="cannot be deep-copied"):
        copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        pickle.dumps(model)
    reduction.detach()
    reduction.detach()  # once more does nothing
    with pytest.raises(ValueError, match="a schedule says how many"):
        attach_reducer(model, selector)
    assert shiva_dit.attach_reducer is attach_reducer
    assert shiva_dit.ToMeSD is ToMeSD


@pytest.mark.parametrize("name", SERVED)
def test_what_takes_adapters_off_takes_reducers_off(name: str) -> None:
    model = model_of(name)
    bare, marks = run(model, name), tiny.footprint(model)
    attach_reducer(model, ToMeSD(0.5))
    merged_ = run(model, name)
    assert not torch.equal(merged_, bare)
    with shiva_dit.disabled(model), shiva_dit.disabled(model):
        assert torch.equal(run(model, name), bare)
    assert torch.equal(run(model, name), merged_)
    with pytest.raises(ValueError, match=r"a ToMeSD is on.*flops\("):
        shiva_dit.summary(model)
    shiva_dit.remove(model)
    assert torch.equal(run(model, name), bare)
    assert tiny.footprint(model) == marks
    with pytest.raises(ValueError, match="no adapter is attached"), shiva_dit.disabled(model):
        pass


def test_calls_that_cannot_be_served_are_refused() -> None:
    model = model_of("pixart-sigma")
    bare = run(model, "pixart-sigma")
    reduction = attach_reducer(model, ToMeSD())
    arguments = families.arguments("pixart-sigma")
    with pytest.raises(ValueError, match="without attention_mask"):
        model(**arguments, attention_mask=torch.ones(2, NUM_TOKENS))
    with pytest.raises(RuntimeError, match="ran outside of a call of its model"):
        model.forward(**arguments)
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        model(**arguments)
    with torch.no_grad():
        model(**arguments)  # nothing is recomputed
    reduction.detach()
    model.disable_gradient_checkpointing()
    with pytest.raises(ValueError, match="whole blocks or around parts"):
        attach_reducer(model, ToMeSD(sites=("block", "attention")))
    model.transformer_blocks[0].set_chunk_feed_forward(16, 1)
    reduction = attach_reducer(model, ToMeSD(sites=("feed_forward",)))
    with pytest.raises(ValueError, match=r"not with the 8 x 8 tokens"):
        model(**arguments)
    reduction.detach()
    model.transformer_blocks[0].set_chunk_feed_forward(None, 0)
    assert torch.equal(run(model, "pixart-sigma"), bare)


# --- what else a plan can carry ----------------------------------------------------------------


class Pool(Reducer):
    """Means of 2 x 2 tokens, each copied back."""

    sites = ("attention",)

    def plan(self, x: Tensor, where: Where) -> Plan:
        assert where.grid is not None
        height, width = where.grid
        cells = torch.arange(height * width).view(height, width)
        cell = (cells // width // 2) * (width // 2) + cells % width // 2
        back = nn.functional.one_hot(cell.flatten()).float()
        return LinearPlan(back.T / 4, back)


class Loud(Reducer):
    """Of each sample the tokens whose norm is above the mean, each sample its own number."""

    sites = ("feed_forward",)

    def plan(self, x: Tensor, where: Where) -> Plan:
        norms = x.norm(dim=-1)
        return RaggedPlan(norms > norms.mean(dim=1, keepdim=True))


class Narrow(Plan):
    """The first half of the channels."""

    def reduce(self, x: Tensor) -> Tensor:
        keep = torch.arange(x.shape[-1], device=x.device) < x.shape[-1] // 2
        return x * keep

    def restore(self, y: Tensor, rest: Tensor) -> Tensor:
        return y


class Widths(Reducer):
    """Half of the heads and of the hidden channels."""

    sites = ("heads", "hidden")

    def plan(self, x: Tensor, where: Where) -> Plan:
        return Narrow()


class Keep(Reducer):
    """Updates by attention for a half of the tokens."""

    sites = ("attention",)

    def plan(self, x: Tensor, where: Where) -> Plan:
        return GatherPlan(torch.arange(0, x.shape[1], 2).expand(len(x), -1))


@pytest.mark.parametrize("kind", [Pool, Loud, Widths, Keep])
@pytest.mark.parametrize("name", SERVED)
def test_pooling_ragged_tokens_widths_and_updates_fit(name: str, kind: type[Reducer]) -> None:
    model = model_of(name)
    bare = run(model, name)
    reduction = attach_reducer(model, kind())
    output = run(model, name)
    assert torch.isfinite(output).all()
    assert not torch.equal(output, bare)
    reduction.detach()
    assert torch.equal(run(model, name), bare)


def test_ragged_rows_are_the_dense_ones_under_a_mask() -> None:
    """What a feed-forward gives token by token doesn't depend on which others are there."""
    layer = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    tiny.randomize(layer, seed=0)
    x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) > 0.4
    plan = RaggedPlan(kept)
    with torch.no_grad():
        ragged = plan.restore(layer(plan.reduce(x)), torch.zeros(()).expand(3, 20, 8))
        # Matrix products of other sizes: measured 6e-8.
        torch.testing.assert_close(ragged, layer(x) * kept[..., None], rtol=0.0, atol=1e-6)


def test_widths_are_those_of_a_model_with_zeroed_weights() -> None:
    """Channels without an input are columns that count for nothing."""
    model, zeroed = model_of("dit"), model_of("dit")
    for block in zeroed.transformer_blocks:
        for layer in (block.attn1.to_out[0], block.ff.net[2]):
            with torch.no_grad():
                layer.weight[:, layer.in_features // 2 :] = 0.0
    attach_reducer(model, Widths())
    # Sums with zeros in them, in the same order: measured equal.
    torch.testing.assert_close(run(model, "dit"), run(zeroed, "dit"), rtol=0.0, atol=1e-6)
