"""Regional compile: few graphs for any depth and any number of k, and the results of eager."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import shiva_dit
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import attachment_of
from tests import families, tiny
from tests.matrix import sampled
from tests.test_clean_frames import with_times
from tests.test_references import with_references

NUM_BINS = 12
TIMES = [(b + 0.5) / NUM_BINS for b in reversed(range(NUM_BINS))]
# Dense (the first block), pruned, and pruned without a text stream (the last block); where the
# first half has a second attention, pruned with it too.
GRAPHS = {"plain": 3, "dual": 4}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def near(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether compiled results are those of eager: a graph may round otherwise.

    Measured equal to the bit with aot_eager, and at most 1.3e-7 off with inductor.
    """
    pairs = zip(found, expected, strict=True)
    return all((a - b).norm() <= 1e-6 * b.norm() for a, b in pairs)


def many_rows(num_layers: int) -> Schedule:
    """Twelve different rows. The first to run keeps equally much in all blocks, which is what
    could pass for a constant; in the others every block keeps another number.
    """
    draw = random.Random(0)
    rows = [[64, *draw.sample(range(2, 64), num_layers - 1)] for _ in range(NUM_BINS - 1)]
    return tiny.from_counts([*rows, [64] + [40] * (num_layers - 1)])


class Compiled:
    """A tiny model with an adapter, its eager results, and its compiled blocks."""

    def __init__(
        self, kind: str, num_layers: int, schedule: Schedule, backend: Any, **options: Any
    ) -> None:
        self.model = tiny.sd3(kind, num_layers)
        self.before = tiny.footprint(self.model)
        # Seeds for which the scores at the borders differ by 1e-5 of the largest at least, so that
        # rounding moves no token (measured, in all cases of the fast tests and inductor's).
        self.cases = [tiny.inputs(t=t, seed=seed) for seed in (4, 22) for t in TIMES]
        shiva_dit.apply(self.model, tiny.adapter(self.model, **options), schedule=schedule)
        attachment = attachment_of(self.model)
        assert attachment is not None
        assert len(set(attachment.counts.table(tiny.NUM_TOKENS).counts)) == NUM_BINS
        self.eager = [tiny.run(self.model, case) for case in self.cases]
        shiva_dit.compile(self.model, backend=backend)

    def results(self) -> list[Tensor]:
        """The whole schedule on two inputs. After the first forward recompiling is an error."""
        tiny.run(self.model, self.cases[0])
        with dynamo.patch(error_on_recompile=True):
            return [tiny.run(self.model, case) for case in self.cases]


@pytest.mark.parametrize(
    ("kind", "num_layers", "rejected"),
    [
        ("plain", 6, "identity"),  # the pipeline below has four
        ("dual", 4, "low_rank"),
        pytest.param("dual", 4, "identity", marks=pytest.mark.slow),
        pytest.param("plain", 4, "low_rank", marks=pytest.mark.slow),
        pytest.param("dual", 8, "identity", marks=pytest.mark.slow),
        # As many as SD3.5-Medium, 12 routers.
        pytest.param("dual", 24, "low_rank", marks=pytest.mark.slow),
    ],
)
def test_a_whole_schedule_takes_few_graphs_at_any_depth_and_equals_eager(
    kind: str, num_layers: int, rejected: Any
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = Compiled(kind, num_layers, many_rows(num_layers), counter, rejected=rejected)
    found = compiled.results()
    assert near(found, compiled.eager)
    assert counter.frame_count == GRAPHS[kind]
    shiva_dit.remove(compiled.model)
    assert tiny.footprint(compiled.model) == compiled.before


@pytest.mark.slow
def test_many_steps_several_prompts_and_another_resolution() -> None:
    """The second resolution costs one more set of graphs, in which N is symbolic: a third none."""
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny.sd3("dual")
    shiva_dit.apply(model, tiny.adapter(model), schedule=many_rows(4))
    shiva_dit.compile(model, backend=counter)

    def sample(side: int) -> None:
        for seed in range(2):
            for step in range(25):
                given = tiny.inputs(t=1 - (step + 0.5) / 25, seed=seed)
                given["hidden_states"] = given["hidden_states"][..., :side, :side].contiguous()
                tiny.run(model, given)

    sample(16)
    assert counter.frame_count <= GRAPHS["dual"] + 1  # a count of 1 token has a graph of its own
    first = counter.frame_count
    sample(12)
    assert counter.frame_count <= first + GRAPHS["dual"] + 1
    with dynamo.patch(error_on_recompile=True):
        sample(14)


@pytest.mark.parametrize("kind", ["plain", pytest.param("dual", marks=pytest.mark.slow)])
def test_sharing_scores_costs_two_graphs_more_at_most(kind: str) -> None:
    """Blocks that leave scores and blocks that take them: six graphs where there are two kinds."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = Compiled(kind, 5, many_rows(5), counter, select_every=2)
    found = compiled.results()
    assert near(found, compiled.eager)
    assert counter.frame_count <= GRAPHS[kind] + 2


# A row of counts, and how many graphs more it takes at most than those before.
EDGES = [
    ([64, 20, 30, 40], GRAPHS["plain"]),
    ([64, 21, 31, 41], 0),
    ([64, 64, 64, 20], 0),  # the others dense: as the first
    ([64, 1, 30, 17], 1),  # torch takes a size of 1 for a constant
    ([64, 1, 1, 1], 1),  # so too in the last block
    ([64, 20, 30, 64], 1),  # the last block dense: another graph than the first's
]


def test_edges_cost_one_more_graph_at_most_per_kind_of_block() -> None:
    schedule = tiny.from_counts([row for row, _ in EDGES])
    model = tiny.sd3()
    cases = [tiny.inputs(t=(place + 0.5) / len(EDGES)) for place in range(len(EDGES))]
    shiva_dit.apply(model, tiny.adapter(model), schedule=schedule)
    attachment = attachment_of(model)
    assert attachment is not None
    assert [list(attachment.counts.row(64, case["timestep"])) for case in cases] == [
        row for row, _ in EDGES
    ]
    eager = [tiny.run(model, case) for case in cases]
    counter = CompileCounterWithBackend("eager")
    shiva_dit.compile(model, backend=counter)
    graphs = 0
    for case, expected, (_, more) in zip(cases, eager, EDGES, strict=True):
        assert near([tiny.run(model, case)], [expected])
        graphs += more
        assert counter.frame_count == graphs
    with dynamo.patch(error_on_recompile=True):
        assert near([tiny.run(model, case) for case in cases], eager)


def test_a_pipeline_runs_compiled_and_leaves_the_graphs_again() -> None:
    model = tiny.sd3()
    pipe = tiny.pipeline(model)
    dense = tiny.generate(pipe, 5.0)
    shiva_dit.apply(pipe, tiny.adapter(model), schedule=many_rows(4))
    eager = tiny.generate(pipe, 5.0)
    counter = CompileCounterWithBackend("eager")
    assert shiva_dit.compile(pipe, backend=counter) is pipe
    assert near([tiny.generate(pipe, 5.0)], [eager])
    assert counter.frame_count == GRAPHS["plain"]
    with shiva_dit.disabled(pipe):
        assert near([tiny.generate(pipe, 5.0)], [dense])
    # One more: the last block dense. The dense one with text was there already.
    assert counter.frame_count == GRAPHS["plain"] + 1
    with dynamo.patch(error_on_recompile=True):
        assert near([tiny.generate(pipe, 5.0)], [eager])
    shiva_dit.remove(pipe)
    assert torch.equal(tiny.generate(pipe, 5.0), dense)
    assert counter.frame_count == GRAPHS["plain"] + 1  # eager


def test_budgets_by_role_take_no_graph_more() -> None:
    """Every k of each role is a symbolic size: the target's rows differ, the references' stays."""
    model = families.made("flux")
    schedule = tiny.from_counts([[64, 40, 20, 20], [64, 30, 31, 10], [64, 41, 12, 50]])
    made = tiny.adapter(model, schedule, reference_keep_ratio=0.5)
    shiva_dit.apply(model, made)
    cases = [with_references("flux", t=t) for t in (0.9, 0.5, 0.1, 0.5)]
    for case in cases[:2]:
        case["hidden_states"] = -case["hidden_states"]
    eager = [families.run(model, case) for case in cases]
    assert not torch.equal(eager[1], eager[3])
    counter = CompileCounterWithBackend("eager")
    shiva_dit.compile(model, backend=counter)
    families.run(model, cases[0])
    # Double blocks dense and pruned, and single ones; the text of the first has other strides.
    assert counter.frame_count == 4
    with dynamo.patch(error_on_recompile=True):
        assert near([families.run(model, case) for case in cases], eager)


@pytest.mark.parametrize("keep", [1.0, 0.0])
def test_clean_frames_take_no_graph_more(keep: float) -> None:
    """Dropped ones are groups of no tokens, in two spans here: one graph all the same."""
    model = families.made("wan")
    schedule = tiny.from_counts([[64, 40, 20, 20], [64, 30, 30, 10]])
    made = tiny.adapter(model, schedule, reference_keep_ratio=keep)
    shiva_dit.apply(model, made)
    cases = [with_times("wan", (0, 2), t=t) for t in (0.9, 0.5, 0.1, 0.5)]
    with torch.no_grad():
        expected = [families.run(model, given) for given in cases]
        counter = CompileCounterWithBackend("eager")
        shiva_dit.compile(model, backend=counter)
        found = [families.run(model, given) for given in cases[:2]]
        assert counter.frame_count == 2  # dense, and pruned
        with dynamo.patch(error_on_recompile=True):
            found += [families.run(model, given) for given in cases[2:]]
    assert near(found, expected)


def test_whole_steps_take_one_graph_more() -> None:
    """Tuned weights and the model's own take turns, without a graph for each."""
    model = tiny.sd3()
    adapter = tiny.adapter(model, many_rows(4), backbone="full")
    adapter.backbone_weights = tiny.tuned("full")[0]
    pipe = shiva_dit.apply(tiny.pipeline(model), adapter)
    shiva_dit.correct(pipe, (1, 3))
    eager = tiny.generate(pipe, 5.0)
    counter = CompileCounterWithBackend("eager")
    shiva_dit.compile(pipe, backend=counter)
    assert near([tiny.generate(pipe, 5.0)], [eager])
    assert counter.frame_count == GRAPHS["plain"] + 1  # the last block dense
    with dynamo.patch(error_on_recompile=True):
        assert near([tiny.generate(pipe, 5.0)], [eager])


def test_full_graphs_are_the_default() -> None:
    model = tiny.sd3()

    def breaks(*_: Any) -> None:
        torch._dynamo.graph_break()

    model.transformer_blocks[1].ff.register_forward_hook(breaks)
    shiva_dit.apply(model, tiny.adapter(model), schedule=many_rows(4))
    shiva_dit.compile(model, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        tiny.run(model, tiny.inputs())


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    compiled = Compiled("plain", 4, many_rows(4), "inductor")
    assert near(compiled.results(), compiled.eager)


@pytest.mark.slow
@sampled("name", always=lambda name: name in ("flux", "qwen-image", "wan"))
def test_every_family_compiles_without_breaks_and_recompiles(name: str) -> None:
    model = families.made(name)
    counts = [[64, 40, 40, 40], [64, 33, 12, 48], [64, 63, 20, 9]]
    cases = [families.arguments(name, t=t) for t in (1 / 6, 0.5, 5 / 6)]
    shiva_dit.apply(model, tiny.adapter(model, families.schedule(model, counts)))
    with torch.no_grad():
        eager = [families.run(model, case) for case in cases]
        shiva_dit.compile(model, backend="aot_eager")
        families.run(model, cases[0])
        with dynamo.patch(error_on_recompile=True):
            compiled = [families.run(model, case) for case in cases]
    for ours, theirs in zip(compiled, eager, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()


@pytest.mark.slow
def test_a_pass_that_is_led_compiles_once() -> None:
    """The unconditional pass takes its tokens over: one graph more per kind of block."""
    model = families.made("flux")
    counts = [[64, 40, 40, 40], [64, 33, 12, 48], [64, 63, 20, 9]]
    cases = [families.arguments("flux", t=t) for t in (1 / 6, 0.5, 5 / 6)]

    def guided(case: dict[str, Any]) -> list[Tensor]:
        found = []
        for name in ("cond", "uncond"):
            with model.cache_context(name):
                found.append(families.run(model, case))
        return found

    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts(counts)))
    with torch.no_grad():
        eager = [guided(case) for case in cases]
        shiva_dit.compile(model, backend="aot_eager")
        guided(cases[0])
        with dynamo.patch(error_on_recompile=True):
            compiled = [guided(case) for case in cases]
    for ours, theirs in zip(compiled, eager, strict=True):
        for found, expected in zip(ours, theirs, strict=True):
            assert (found - expected).norm() <= 2e-5 * expected.norm()


def test_a_compiled_transformer_in_a_pipeline_is_guided_by_it() -> None:
    model = tiny.sd3(num_layers=3)
    pipe = tiny.pipeline(model)
    shiva_dit.apply(pipe, tiny.adapter(model, tiny.from_counts([[64, 5, 17]])))
    expected = tiny.generate(pipe, 5.0)
    pipe.transformer = torch.compile(model, backend="eager")
    found = tiny.generate(pipe, 5.0)
    # The same operators in pieces, so up to the order of sums; seen: none.
    assert (found - expected).norm() <= 2e-5 * expected.norm()
    shiva_dit.remove(pipe)
    assert attachment_of(model) is None
