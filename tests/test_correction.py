"""Whole steps: the unpruned model's predictions, and what the pruned one lacks later."""

from __future__ import annotations

import gc
import math
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from diffusers import ClassifierFreeGuidance, FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks import apply_first_block_cache, apply_mag_cache
from peft import LoraConfig
from torch import Tensor

import shiva_dit
from shiva_dit.experiments.frontier.executed import counted
from shiva_dit.methods.refresh import Refresh
from shiva_dit.methods.tomesd import ToMeSD
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.correction import CORRECTION, Correction, WholeSteps, correction_of
from shiva_dit.models.graphs import GRAPHS
from tests import families, running, tiny
from tests.test_graphs import Again
from tests.test_guidance import RUN, applied, denoise, modular
from tests.test_published import model_of

COUNTS = [[64, 5, 30, 17], [64, 33, 2, 48], [64, 63, 20, 9]]
TUNED = ("frozen", "full", "lora", "dora")


def corrected(kind: str = "frozen", *, merge: bool = True) -> tuple[Any, Any]:
    """A model with an adapter of that kind on, and one as it was."""
    bare = tiny.sd3()
    made = tiny.adapter(bare, tiny.from_counts(COUNTS), backbone=kind, lora_rank=tiny.LORA_RANK)
    if kind != "frozen":
        made.backbone_weights = tiny.tuned(kind)[0]
    return shiva_dit.apply(tiny.sd3(), made, merge=merge), bare


def predictions(model: Any, steps: int, run: Any = None) -> list[Tensor]:
    """What a model gives at t = 1, ..., of samples that differ from step to step."""
    found = []
    for step in range(steps):
        given = tiny.inputs(t=1.0 - step / steps, seed=step)
        if run is None:
            found.append(tiny.run(model, given))
            continue
        with run.step(step):
            found.append(tiny.run(model, given))
    return found


@pytest.mark.parametrize("half_life", [0.25, math.inf])
@pytest.mark.parametrize(
    ("kind", "merge"),
    [("frozen", True), ("full", True), ("lora", True), ("dora", True), ("lora", False)],
)
def test_what_lacks_at_a_whole_step_is_added_to_later_ones(
    kind: str, merge: bool, half_life: float
) -> None:
    model, bare = corrected(kind, merge=merge)
    steps, whole = 7, (1, 4)
    dense, pruned = predictions(bare, steps), predictions(model, steps)
    shiva_dit.correct(model, whole, half_life=half_life)
    before = tiny.footprint(model)
    found = predictions(model, steps, shiva_dit.steps(model, steps))
    assert tiny.footprint(model) == before
    lacks: Tensor = torch.zeros(())
    for step in range(steps):
        if step in whole:
            assert torch.equal(found[step], dense[step])
            lacks, since = dense[step] - pruned[step], 0
            continue
        left = 1.0 if step == 0 else 0.5 ** (since / steps / half_life)
        assert torch.allclose(found[step], pruned[step] + left * lacks, atol=1e-6)
        since = 0 if step == 0 else since + 1
    shiva_dit.correct(model, whole_steps=0)
    assert correction_of(model) is None
    assert all(map(torch.equal, predictions(model, steps), pruned))
    shiva_dit.remove(model)
    assert all(map(torch.equal, predictions(model, steps), dense))
    assert "_diffusers_hook" not in model.__dict__


def test_of_a_reducer_too() -> None:
    for reducer in (ToMeSD(0.5), Refresh(0.5, whole_steps=1)):
        model, bare = model_of("sd3"), model_of("sd3")
        attached = shiva_dit.attach_reducer(model, reducer)
        dense, less = predictions(bare, 4), predictions(model, 4, shiva_dit.steps(model, 4))
        shiva_dit.correct(model, (1,), half_life=math.inf)
        found = predictions(model, 4, shiva_dit.steps(model, 4))
        assert torch.equal(found[0], less[0])
        assert torch.equal(found[1], dense[1])
        lacks = dense[1] - less[1]
        assert torch.allclose(found[2], less[2] + lacks, atol=1e-5)
        assert torch.allclose(found[3], less[3] + lacks, atol=1e-5)
        attached.detach()
        assert all(map(torch.equal, predictions(model, 4), dense))


def pictures(name: str, pipe: Any) -> Tensor:
    """What a pipeline makes, twice the same."""
    torch.manual_seed(0)
    made = running.call(name, pipe)[0]
    return made if isinstance(made, Tensor) else torch.as_tensor(numpy.asarray(made))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_pipelines_where_all_steps_are_whole_are_the_unpruned_ones(name: str) -> None:
    pipe = running.build(name)
    bare = pictures(name, pipe)
    model = applied(pipe)
    pruned = pictures(name, pipe)
    if name == "SkyReelsV2DiffusionForcingPipeline":  # every frame has steps of its own
        shiva_dit.correct(pipe)
        with pytest.raises(ValueError, match="nothing says which one this call is"):
            pictures(name, pipe)
        return
    shiva_dit.correct(pipe, whole_steps=1000)
    assert torch.equal(pictures(name, pipe), bare)
    shiva_dit.correct(pipe, whole_steps=1)
    found = pictures(name, pipe)
    acts = not torch.equal(pruned, bare)  # some ask a tiny model for nothing that shows
    assert torch.equal(found, bare) != acts
    assert torch.equal(found, pruned) != acts
    assert nothing_is_left(model)


def nothing_is_left(model: Any) -> bool:
    """Whether a run's memory is gone."""
    attachment = attachment_of(model)
    assert attachment is not None
    runs = [run for _, run in attachment.runs._runs.values()]
    return not any(memory for run in runs for memory in run._memories.values())


def test_a_modular_pipeline_says_its_steps() -> None:
    pipe, scheduler = modular(ClassifierFreeGuidance(guidance_scale=5.0))
    model = applied(pipe)
    shiva_dit.correct(model, (1,))
    with counted(model) as counts:
        denoise(pipe, scheduler)
    assert min(counts[2:4]) > 1.8 * max(counts[:2] + counts[4:])  # two passes a step, in turn
    assert nothing_is_left(model)


def test_passes_in_turn_have_corrections_of_their_own() -> None:
    """Each pass's lack is its own, also where nobody says which pass a call is."""
    for said in (("cond", "uncond"), ("alone", "alone")):
        model, bare = corrected()
        shiva_dit.correct(model, (0,), half_life=math.inf)
        run, found, truth = shiva_dit.steps(model, 2), [], []
        for step in range(2):
            for number, which in enumerate(said):
                given = tiny.inputs(t=0.9, seed=number)
                with run.step(step), shiva_dit.guided(model, which):
                    found.append(tiny.run(model, given))
                truth.append(tiny.run(bare, given))
        assert all(map(torch.equal, found[:2], truth[:2]))
        # The same call again, of the same time: what lacked is all that lacks.
        assert torch.allclose(found[2], truth[2], atol=1e-6)
        assert torch.allclose(found[3], truth[3], atol=1e-6) or said[1] == "uncond"


def test_loras_of_the_user_are_in_whole_steps_as_well() -> None:
    model, bare = corrected("full")
    shiva_dit.correct(model, 9)
    for one in (model, bare):
        one.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
        tiny.fill_lora(one, "style", seed=5)
    for change in (lambda m: None, lambda m: m.fuse_lora(), lambda m: m.unfuse_lora()):
        change(model)
        change(bare)
        found = predictions(model, 3, shiva_dit.steps(model, 3))
        for one, other in zip(found, predictions(bare, 3), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_a_whole_step_costs_a_forward_more_and_only_where_it_serves() -> None:
    pipe = tiny.pipeline(corrected("full")[0])
    tiny.generate(pipe, 4.0)  # the first forward freezes what was learned
    with counted(pipe.transformer) as counts:
        tiny.generate(pipe, 4.0)
    pruned = list(counts)
    shiva_dit.correct(pipe, (1, 2))
    with counted(pipe.transformer) as counts:
        tiny.generate(pipe, 4.0)
    assert counts[0] == pruned[0]
    assert counts[1] < counts[2] + pruned[1] / 2  # the next one is whole: no correction of it
    shiva_dit.correct(pipe, (0,))
    with counted(pipe.transformer) as once:
        tiny.generate(pipe, 4.0)
    both = counts[1] + pruned[0]
    assert 0.999 * both < once[0] <= both  # what routers read of the text is computed once
    assert once[1:] == pruned[1:]


@pytest.mark.parametrize("first", ["correct", "graphs"])
def test_graphs_replay_both_evaluations(first: str) -> None:
    plain, model = corrected("full")[0], corrected("full")[0]
    attachment = attachment_of(model)
    assert attachment is not None
    shiva_dit.correct(plain, (1,))
    for what in ("correct", "graphs") if first == "correct" else ("graphs", "correct"):
        if what == "correct":
            shiva_dit.correct(model, (1,))
        else:
            attachment.use_graphs(Again(attachment), 16)
    assert model._diffusers_hook._hook_order == [GRAPHS, CORRECTION]
    for _ in range(4):
        expected = predictions(plain, 3, shiva_dit.steps(plain, 3))
        found = predictions(model, 3, shiva_dit.steps(model, 3))
        assert all(map(torch.equal, found, expected))
    runner = attachment.forwards.graphs
    assert runner is not None
    assert runner.replays >= 8


def test_what_goes_back_on_after_a_failure_is_corrected_as_before() -> None:
    model, _ = corrected()
    shiva_dit.correct(model, (1,))
    other = tiny.adapter(families.made("flux"))
    with pytest.raises(ValueError, match="adapter"):
        shiva_dit.apply(model, other)
    assert correction_of(model) is not None
    expected = predictions(model, 3, shiva_dit.steps(model, 3))
    with shiva_dit.disabled(model):
        assert all(map(torch.equal, predictions(model, 3), predictions(tiny.sd3(), 3)))
    found = predictions(model, 3, shiva_dit.steps(model, 3))
    assert all(map(torch.equal, found, expected))


def whole(model: Any) -> Tensor:
    """What a model gives at a whole step."""
    with shiva_dit.steps(model, 2).step(0):
        return tiny.run(model, tiny.inputs())


def test_offloading_that_was_there_first_keeps_it_on() -> None:
    bare = tiny.generate(tiny.pipeline(tiny.sd3()), 4.0)
    pipe = tiny.pipeline(tiny.sd3())
    pipe._exclude_from_cpu_offload = []
    pipe.enable_model_cpu_offload(device="cpu")
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer, tiny.from_counts(COUNTS)))
    shiva_dit.correct(pipe, 1000)
    for _ in range(2):
        assert torch.equal(tiny.generate(pipe, 4.0), bare)
    shiva_dit.remove(pipe)
    assert torch.equal(tiny.generate(pipe, 4.0), bare)


@pytest.mark.parametrize("what", ["adapter", "reducer"])
def test_a_forward_that_was_replaced_is_noticed(what: str) -> None:
    model, _ = corrected()
    if what == "reducer":
        model = model_of("sd3")
        shiva_dit.attach_reducer(model, ToMeSD(0.5))
    shiva_dit.correct(model, (0,))
    model.forward = partial(type(model).forward, model)
    with pytest.raises(RuntimeError, match="whole steps no longer act"):
        whole(model)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_own_weights_are_those_of_the_model_as_it_is_now(kind: str) -> None:
    model, bare = corrected(kind)
    shiva_dit.correct(model, 99)
    for one in (model, bare):
        one.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    changes = (
        lambda m: (tiny.fill_lora(m, "style", seed=5), m.fuse_lora(lora_scale=1.0)),
        lambda m: (m.unfuse_lora(), m.fuse_lora(lora_scale=0.25)),
        lambda m: (m.unfuse_lora(), tiny.fill_lora(m, "style", seed=6), m.fuse_lora()),
        lambda m: m.unfuse_lora(),
    )
    for change in changes:
        change(model)
        change(bare)
        assert torch.allclose(whole(model), tiny.run(bare, tiny.inputs()), atol=1e-5)
    model, bare = corrected(kind)
    shiva_dit.correct(model, 99)
    whole(model)
    for one in (model, bare):
        one.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(whole(model), tiny.run(bare, tiny.inputs()))


def test_own_weights_are_let_go_without_whole_steps() -> None:
    model, _ = corrected("full")
    attachment = attachment_of(model)
    assert attachment is not None
    assert attachment.backbone is not None
    held = attachment.backbone._own
    for _ in range(3):
        shiva_dit.correct(model, 1)
        with shiva_dit.steps(model, 3).step(1):
            tiny.run(model, tiny.inputs())
        assert held._copies
    gc.collect()
    hooks = [each for each in gc.get_objects() if isinstance(each, Correction)]
    assert sum(each.owner is attachment for each in hooks) == 1
    shiva_dit.correct(model, 0)
    assert not held._copies


def test_arguments_that_a_model_uses_up_serve_both_evaluations() -> None:
    model, bare = families.made("hunyuan-dit"), families.made("hunyuan-dit")
    shiva_dit.apply(model, tiny.adapter(model, families.schedule(model, COUNTS)))
    shiva_dit.correct(model, (0,))
    width = model.config.num_attention_heads * model.config.attention_head_dim
    given = families.arguments("hunyuan-dit", 2, 0.7)
    found = []
    for one in (model, bare):  # HunyuanDiT takes a ControlNet's from the end of the list
        control = [torch.full((2, 64, width), 0.1 * place) for place in range(2)]
        with torch.no_grad(), shiva_dit.steps(model, 3).step(0):
            found.append(one(**given, controlnet_block_samples=control)[0])
        assert not control
    assert torch.equal(found[0], found[1])


def test_a_run_may_be_used_again_and_a_step_tried_again() -> None:
    model, _ = corrected()
    for steps in ((1, 3), (2,)):
        shiva_dit.correct(model, steps, half_life=0.05)
        run = shiva_dit.steps(model, 4)
        first = predictions(model, 4, run)
        assert all(map(torch.equal, predictions(model, 4, run), first))
        for step in range(3):  # broken off
            with run.step(step):
                tiny.run(model, tiny.inputs(t=1.0 - step / 4, seed=step))
        assert all(map(torch.equal, predictions(model, 4, run), first))

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    shiva_dit.correct(model, (0,), half_life=math.inf)
    expected = predictions(model, 2, shiva_dit.steps(model, 2))
    run = shiva_dit.steps(model, 2)
    handle = model.transformer_blocks[2].register_forward_pre_hook(fails)
    for step in range(2):
        with run.step(step), pytest.raises(torch.OutOfMemoryError):
            tiny.run(model, tiny.inputs(t=1.0 - step / 2, seed=step))
        handle.remove()
        with run.step(step):
            again = tiny.run(model, tiny.inputs(t=1.0 - step / 2, seed=step))
        assert torch.equal(again, expected[step])
        handle = model.transformer_blocks[2].register_forward_pre_hook(fails)


@pytest.mark.parametrize("kind", TUNED)
def test_gradients_are_right_or_refused(kind: str) -> None:
    model, bare = corrected(kind)
    shiva_dit.correct(model, (0,))
    gradients = []
    for one in (bare, model):
        given = tiny.inputs()
        x = given["hidden_states"].requires_grad_()
        with shiva_dit.steps(model, 2).step(0):
            if one is model and kind != "frozen":
                with pytest.raises(ValueError, match=r"run it within torch\.no_grad"):
                    model(**given)
                continue
            one(**given).sample.square().sum().backward()
        gradients.append(x.grad)
    assert kind != "frozen" or torch.equal(gradients[0], gradients[1])


def test_what_it_is_not_for_is_refused() -> None:
    model, _ = corrected()
    with pytest.raises(ValueError, match="no adapter is attached"):
        shiva_dit.correct(tiny.sd3())
    for bad in (-1, True, (-1,), (True,), 0.5, "12"):
        with pytest.raises(ValueError, match="whole_steps"):
            shiva_dit.correct(model, bad)
    for step in (True, 3, -1):
        with pytest.raises(ValueError, match="step"), shiva_dit.steps(model, 3).step(step):
            pass
    for worse in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="half_life"):
            shiva_dit.correct(model, half_life=worse)
    shiva_dit.correct(model, (0,))
    with pytest.raises(ValueError, match=r"shiva_dit\.steps"):
        tiny.run(model, tiny.inputs())
    run = shiva_dit.steps(model, 3)
    with run.step(0):
        tiny.run(model, tiny.inputs())
    with run.step(1), pytest.raises(ValueError, match="the same samples in every step"):
        tiny.run(model, tiny.inputs(batch=3))
    for put_on in (
        partial(apply_first_block_cache, config=FirstBlockCacheConfig(threshold=0.1)),
        partial(apply_mag_cache, config=MagCacheConfig(num_inference_steps=3, calibrate=True)),
    ):
        model, _ = corrected()
        shiva_dit.correct(model, (1,))
        put_on(model)
        run = shiva_dit.steps(model, 3)
        with run.step(1), pytest.raises(ValueError, match=r"disable_cache\(\)"):
            tiny.run(model, tiny.inputs())


def test_places_of_whole_steps() -> None:
    for steps in range(1, 60):
        for count in range(1, 12):
            found = WholeSteps(count).of(steps)
            assert len(found) == min(count, steps)
            assert list(found) == sorted(set(found))
            assert found[0] >= 0
            assert found[-1] < steps
    assert WholeSteps((9, 2, 2)).of(8) == (2,)


def test_the_summary_counts_whole_steps_as_they_are_executed() -> None:
    pipe = tiny.pipeline(tiny.sd3())
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer, tiny.from_counts(COUNTS)))
    tiny.generate(pipe, 4.0)
    asked = {"num_inference_steps": 6, "text_tokens": tiny.TEXT_TOKENS}
    plain = shiva_dit.summary(pipe, **asked)
    assert plain.whole_steps == ()
    for steps, dense in (((1, 3), 2), ((1, 2, 5), 3)):
        shiva_dit.correct(pipe, steps)
        found = shiva_dit.summary(pipe, **asked)
        assert found.whole_steps == steps
        total = 6 * (found.flops_pruned - plain.flops_pruned)
        unread = 0 if dense == 2 else 2 * plain.flops_pruned
        assert total == pytest.approx(dense * found.flops_dense - unread, rel=0.2)
        assert "as well" in str(found)
    with counted(pipe.transformer) as counts:
        tiny.generate(pipe, 4.0, num_inference_steps=6)
    # Two images, two passes of guidance.
    assert sum(counts) == pytest.approx(4 * 6 * found.flops_pruned, rel=0.02)
    with pytest.raises(ValueError, match="pass num_inference_steps"):
        shiva_dit.summary(pipe)
