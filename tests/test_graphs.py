"""Replayed forwards: what is captured when, and that nothing is replayed that has changed.

Off a GPU a stand-in captures: it keeps a call with the states of the blocks at that time, and runs
it again on the very tensors that it was captured with, as a graph would.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from logging import LogRecord
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from torch import Tensor
from torch.utils._pytree import tree_leaves

import shiva_dit
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.block_state import BlockState
from shiva_dit.models.graphs import GRAPHS, GraphRunner
from tests import families, tiny
from tests.matrix import sampled
from tests.test_pipelines import Flux, PixArt

ROWS = [[64, 5, 30, 17], [64, 33, 1, 48], [64, 63, 20, 9]]
TIMES = (0.9, 0.5, 0.1)


class Again:
    """Captures by keeping the call; replays by running it on the tensors that it holds."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.captured = 0

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        slots = [hook.slot for hook in self.attachment.hooks]
        states = _copies([slot.state for slot in slots])
        self.captured += 1
        output = call()
        held = tree_leaves(output)
        # A graph has computed nothing yet when it is captured.
        for leaf in held:
            if isinstance(leaf, Tensor):
                leaf.zero_()

        def again() -> None:
            running = [slot.state for slot in slots]
            for slot, state in zip(slots, _copies(states), strict=True):
                slot.state = state
            new = call()
            for slot, state in zip(slots, running, strict=True):
                slot.state = state
            for leaf, value in zip(held, tree_leaves(new), strict=True):
                if isinstance(leaf, Tensor):
                    leaf.copy_(value)

        return again, output


def _copies(states: list[BlockState]) -> list[BlockState]:
    """Copies that follow each other as the originals do."""
    made = [replace(state) for state in states]
    for state in made:
        if state.follows is not None:
            state.follows = made[next(i for i, s in enumerate(states) if s is state.follows)]
    return made


def with_graphs(target: Any, limit: int = 64, **options: Any) -> tuple[GraphRunner, Again]:
    """An adapter on a model or pipeline, which runs by graphs."""
    model = getattr(target, "transformer", target)
    rows = options.pop("rows", ROWS)
    shiva_dit.apply(target, tiny.adapter(model, tiny.from_counts(rows), **options))
    attachment = attachment_of(model)
    assert attachment is not None
    recorder = Again(attachment)
    attachment.use_graphs(recorder, limit)
    assert attachment.forwards.graphs is not None
    return attachment.forwards.graphs, recorder


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"rejected": "low_rank"}, {"select_every": 2}], ids=lambda o: "".join(o)
)
def test_replays_equal_forwards_to_the_bit(kind: str, options: dict[str, Any]) -> None:
    """One graph per row; each comes from its second forward on, and reads what it is given."""
    model = tiny.sd3(kind)
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts(ROWS), **options))
    cases = [tiny.inputs(t=t, seed=seed) for seed in range(4) for t in TIMES]
    expected = [tiny.run(model, case) for case in cases]
    graphs, recorder = with_graphs(model, **options)
    found = [tiny.run(model, case) for case in cases]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recorder.captured == len(graphs.graphs) == 3
    assert graphs.replays == 9  # three of four seeds


def test_what_is_returned_is_not_written_over() -> None:
    model = tiny.sd3()
    with_graphs(model)
    for seed in range(3):
        tiny.run(model, tiny.inputs(seed=seed))
    first = tiny.run(model, tiny.inputs(seed=1))
    kept = first.clone()
    tiny.run(model, tiny.inputs(seed=2))
    assert torch.equal(first, kept)


def test_other_shapes_and_values_have_graphs_of_their_own() -> None:
    model = tiny.sd3()
    graphs, recorder = with_graphs(model, rows=[ROWS[0]])
    for batch in (1, 2, 1, 2, 1, 2):
        tiny.run(model, tiny.inputs(batch=batch))
    assert (recorder.captured, graphs.replays) == (2, 4)
    with torch.no_grad():
        for _ in range(3):
            skipped = model(**tiny.inputs(), skip_layers=[2]).sample
    assert (recorder.captured, graphs.replays) == (3, 6)
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts([ROWS[0]])))
    with torch.no_grad():
        assert torch.equal(skipped, model(**tiny.inputs(), skip_layers=[2]).sample)


def test_weights_changed_in_place_are_read_and_others_are_captured_anew() -> None:
    model = tiny.sd3()
    _, recorder = with_graphs(model, rows=[ROWS[0]])

    def latest() -> Tensor:
        for _ in range(3):
            found = tiny.run(model, tiny.inputs())
        return found

    before = latest()
    weight = model.proj_out.weight
    with torch.no_grad():
        weight.mul_(2.0)
    changed = latest()
    assert recorder.captured == 1
    assert not torch.equal(changed, before)
    weight.data = weight.data / 2.0  # lies elsewhere
    assert torch.equal(latest(), before)
    assert recorder.captured == 2


def test_a_lora_that_is_loaded_scaled_or_taken_off_is_seen() -> None:
    model = tiny.sd3()
    _, recorder = with_graphs(model, rows=[ROWS[0]])

    def latest() -> Tensor:
        for _ in range(3):
            found = tiny.run(model, tiny.inputs())
        return found

    bare = latest()
    targets = ["to_q", "to_v"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), "style")
    tiny.fill_lora(model, "style", seed=5)
    styled = latest()
    model.set_adapters(["style"], [0.5])
    half = latest()
    model.disable_adapters()
    off = latest()
    assert recorder.captured == 4
    assert not torch.equal(styled, bare)
    assert not torch.equal(half, styled)
    assert torch.equal(off, bare)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_pipeline_draws_the_same(guidance: float) -> None:
    pipe = tiny.pipeline(tiny.sd3())
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer, tiny.from_counts(ROWS)))
    expected = tiny.generate(pipe, guidance, num_inference_steps=8)
    graphs, recorder = with_graphs(pipe)
    first = tiny.generate(pipe, guidance, num_inference_steps=8)
    assert torch.equal(first, expected)
    assert torch.equal(tiny.generate(pipe, guidance, num_inference_steps=8), expected)
    assert recorder.captured == 3
    assert graphs.replays == 16 - 3
    # Guidance switched on or off is another batch, and other rows of states.
    other = 4.0 if guidance == 1.0 else 1.0
    changed = [tiny.generate(pipe, other) for _ in range(2)]
    shiva_dit.remove(pipe)
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer, tiny.from_counts(ROWS)))
    assert torch.equal(changed[1], tiny.generate(pipe, other))


@pytest.mark.parametrize("kind", [Flux, PixArt])
def test_passes_in_turn_and_models_without_a_shared_embedder(kind: Any) -> None:
    """The unconditional pass keeps the tokens of this step's conditional one, not of the captured;
    DiT's and PixArt's conditions are computed within the graph.
    """
    made = kind()
    made.pipe.set_progress_bar_config(disable=True)
    model = made.pipe.transformer
    shiva_dit.apply(made.pipe, tiny.adapter(model), keep_ratio=0.4)
    expected = [made(True) for _ in range(2)]
    shiva_dit.apply(made.pipe, tiny.adapter(model), keep_ratio=0.4)
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.use_graphs(Again(attachment), 64)
    found = [made(True) for _ in range(2)]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert attachment.forwards.graphs is not None
    assert attachment.forwards.graphs.replays > 0


@sampled("name")
@torch.no_grad()
def test_every_family_replays(name: str) -> None:
    model = families.made(name)
    counts = [[64, 40, 40, 40], [64, 33, 12, 48], [64, 63, 20, 9]]
    cases = [families.arguments(name, t=t) for t in (1 / 6, 0.5, 5 / 6)]
    adapter = tiny.adapter(model, families.schedule(model, counts))
    shiva_dit.apply(model, adapter)
    expected = [families.run(model, case) for case in cases]
    shiva_dit.apply(model, adapter)
    attachment = attachment_of(model)
    assert attachment is not None
    recorder = Again(attachment)
    attachment.use_graphs(recorder, 64)
    for _ in range(3):
        found = [families.run(model, case) for case in cases]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recorder.captured == 3


def test_beyond_the_limit_forwards_run_as_usual() -> None:
    model = tiny.sd3()
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts(ROWS)))
    cases = [tiny.inputs(t=t) for t in TIMES]
    expected = [tiny.run(model, case) for case in cases]
    graphs, recorder = with_graphs(model, limit=2)
    for _ in range(3):
        found = [tiny.run(model, case) for case in cases]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recorder.captured == len(graphs.graphs) == 2
    # Graphs of weights that are gone make room.
    model.proj_out.weight.data = model.proj_out.weight.data.clone()
    for _ in range(3):
        found = [tiny.run(model, case) for case in cases]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (recorder.captured, len(graphs.graphs)) == (4, 2)


ROW_OF = [[64, 63 - b // 2, 60 - (b + 1) // 2, 33 + b // 4] for b in range(64)]
"""As a learned schedule has them: another row in every time bin."""
DEFAULT_LIMIT = inspect.signature(shiva_dit.cuda_graphs).parameters["limit"].default


def image(model: Any, graphs: GraphRunner, steps: int, **text: int) -> tuple[list[Tensor], int]:
    """Outputs of the forwards of one image with guidance in turn, and how many were replays."""
    before, found = graphs.replays, []
    for step in range(steps):
        for name in ("cond", "uncond"):
            with model.cache_context(name), torch.no_grad():
                case = families.arguments("flux", t=1 - step / steps - 0.001)
                tokens = text.get(name, families.TEXT)
                case["encoder_hidden_states"] = case["encoder_hidden_states"][:, :tokens]
                case["txt_ids"] = case["txt_ids"][:tokens]
                found.append(families.run(model, case))
    return found, graphs.replays - before


def learned(limit: int, rows: int = 64) -> tuple[Any, GraphRunner, Again]:
    """A model with guidance in turn and many rows of token counts, which runs by graphs."""
    model = families.made("flux")
    adapter = tiny.adapter(model, families.schedule(model, ROW_OF[:rows]))
    shiva_dit.apply(model, adapter, multiple=1)
    attachment = attachment_of(model)
    assert attachment is not None
    recorder = Again(attachment)
    attachment.use_graphs(recorder, limit)
    assert attachment.forwards.graphs is not None
    return model, attachment.forwards.graphs, recorder


def said_of_graphs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [said for said in map(LogRecord.getMessage, caplog.records) if "graphs" in said]


@pytest.mark.slow
@pytest.mark.parametrize("text", [{}, {"uncond": 5}], ids=["equal texts", "other texts"])
def test_all_forwards_from_the_second_image_on_are_replays(
    text: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Fifty steps, guidance in turn, a learned schedule, the default limit."""
    model, graphs, recorder = learned(DEFAULT_LIMIT)
    counts = [image(model, graphs, 50, **text)[1] for _ in range(3)]
    assert counts == [0, 100, 100]
    assert recorder.captured == len(graphs.graphs) == 100
    assert not said_of_graphs(caplog)


def test_both_passes_of_a_step_count_as_one_against_the_limit() -> None:
    model, graphs, recorder = learned(limit=12)
    assert [image(model, graphs, 12)[1] for _ in range(3)] == [0, 24, 24]
    assert recorder.captured == len(graphs.graphs) == 24


def test_more_forwards_than_the_limit_keep_a_stable_set_and_say_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, graphs, recorder = learned(limit=5)
    plain = image(model, graphs, 12)[0]
    for _ in range(3):
        found, replayed = image(model, graphs, 12)
        assert replayed == 10
        assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    assert recorder.captured == 10
    (said,) = said_of_graphs(caplog)
    assert "24 different forwards come in turn, and 14 of them run without" in said
    assert "segments=8" in said


def test_forwards_that_no_longer_come_make_room(caplog: pytest.LogCaptureFixture) -> None:
    """A change of the number of steps, or of the weights: new graphs take the places of the old."""
    model, graphs, recorder = learned(limit=8)
    assert [image(model, graphs, 8)[1] for _ in range(2)] == [0, 16]
    assert [image(model, graphs, 8, cond=5, uncond=5)[1] for _ in range(3)] == [0, 16, 16]
    model.proj_out.weight.data = model.proj_out.weight.data.clone()
    assert [image(model, graphs, 8)[1] for _ in range(3)] == [0, 16, 16]
    assert len(graphs.graphs) == 16
    assert recorder.captured == 48
    assert len(graphs._inputs) == 1  # those of shapes that are gone are gone
    assert not said_of_graphs(caplog)


def test_shapes_in_turn_within_the_limit_keep_their_graphs() -> None:
    model, graphs, recorder = learned(limit=16)
    for _ in range(3):
        image(model, graphs, 8)
        image(model, graphs, 8, cond=5, uncond=5)
    assert (recorder.captured, graphs.replays) == (32, 64)


def test_what_came_once_is_not_remembered_for_ever() -> None:
    model, graphs, recorder = learned(limit=1)
    with torch.no_grad():
        for seed in range(40):
            families.run(model, families.arguments("flux", batch=1, t=seed / 40))
            assert len(graphs.known) <= 16
        families.run(model, families.arguments("flux", batch=1, t=39 / 40))
    assert (recorder.captured, graphs.replays) == (1, 1)  # what came last is


def test_dense_forwards_are_captured_too() -> None:
    """So that a comparison within `disabled` compares like with like."""
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    graphs, recorder = with_graphs(model)
    with shiva_dit.disabled(model):
        found = [tiny.run(model, tiny.inputs()) for _ in range(3)]
    assert all(torch.equal(one, bare) for one in found)
    assert (recorder.captured, graphs.replays) == (1, 2)


def test_training_and_watchers_see_real_forwards(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.sd3()
    graphs, recorder = with_graphs(model, rows=[ROWS[0]])
    attachment = attachment_of(model)
    assert attachment is not None
    for _ in range(3):
        model(**tiny.inputs())  # with gradients
    assert recorder.captured == 0
    seen: list[int] = []
    attachment.forwards.observer = lambda block, chosen: seen.append(block)
    for _ in range(3):
        tiny.run(model, tiny.inputs())
    assert seen == [1, 2, 3] * 3
    attachment.forwards.observer = None
    for _ in range(3):
        tiny.run(model, tiny.inputs())
    assert recorder.captured == 1
    outputs: list[Any] = []
    handle = model.transformer_blocks[1].register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    for _ in range(3):
        tiny.run(model, tiny.inputs())
    assert len(outputs) == 3
    assert [record.getMessage().split(": ")[2][:11] for record in caplog.records] == ["torch hooks"]
    handle.remove()
    replays = graphs.replays
    tiny.run(model, tiny.inputs())
    assert graphs.replays == replays + 1


def test_modes_of_torch_have_graphs_of_their_own() -> None:
    model = tiny.sd3()
    _, recorder = with_graphs(model, rows=[ROWS[0]])
    expected = tiny.run(model, tiny.inputs())
    for _ in range(3):
        with torch.inference_mode():
            found = model(**tiny.inputs()).sample
    assert torch.equal(found, expected)
    for _ in range(3):
        found = tiny.run(model, tiny.inputs())
    assert torch.equal(found, expected)
    assert recorder.captured == 2


def test_what_works_in_each_forward_is_refused() -> None:
    pipe = tiny.pipeline(tiny.sd3())
    model = pipe.transformer
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="'layerwise_casting' don't go together"):
        with_graphs(pipe)
    other = families.made("flux")
    with_graphs(other, rows=[[64, 40, 40, 40]])
    other.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="CUDA graphs and the hook"):
        run_again(other)


def run_again(model: Any) -> None:
    with torch.no_grad():
        families.run(model, families.arguments("flux"))


def test_removing_leaves_no_trace_and_a_limit_is_needed() -> None:
    model = tiny.sd3()
    before = tiny.footprint(model)
    with_graphs(model)
    tiny.run(model, tiny.inputs())
    shiva_dit.remove(model)
    assert tiny.footprint(model) == before
    registry = model.__dict__.get("_diffusers_hook")
    assert registry is None or GRAPHS not in registry.hooks
    with pytest.raises(ValueError, match="limit must be at least 1"):
        with_graphs(model, limit=0)
    with pytest.raises(ValueError, match="need the model on a CUDA device, it is on cpu"):
        shiva_dit.cuda_graphs(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_those_of_plain_forwards_on_a_gpu(guidance: float, compiled: bool) -> None:
    pipe = tiny.pipeline(tiny.sd3()).to("cuda")
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer, tiny.from_counts(ROWS)).to("cuda"))
    if compiled:
        shiva_dit.compile(pipe)
    expected = [tiny.generate(pipe, guidance, num_inference_steps=n) for n in (8, 5)]
    shiva_dit.cuda_graphs(pipe)
    for _ in range(2):
        found = [tiny.generate(pipe, guidance, num_inference_steps=n) for n in (8, 5)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    attachment = attachment_of(pipe.transformer)
    assert attachment is not None
    assert attachment.forwards.graphs is not None
    assert attachment.forwards.graphs.replays > 0
