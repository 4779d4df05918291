"""Times that need not be read from the device, and what happens where they are wrong."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

import shiva_dit
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.clock import Clock, ListedTimes, SchedulerTimes
from shiva_dit.models.families import model_spec
from tests import tiny
from tests.test_pipelines import Flux

ROWS = [[64, 5, 30, 17], [64, 33, 1, 48], [64, 63, 20, 9], [64, 8, 50, 40]]


def watched(target: Any, **options: Any) -> tuple[Clock, list[int]]:
    """An adapter on a model or pipeline, its clock not reading on a CPU either, and what the
    second block keeps in each forward."""
    model = getattr(target, "transformer", target)
    blocks = len(model_spec(model).blocks(model))
    rows = [[64, *(row[1:] * 9)[: blocks - 1]] for row in ROWS]
    shiva_dit.apply(target, tiny.adapter(model, tiny.from_counts(rows)), **options)
    attachment = attachment_of(model)
    assert attachment is not None
    assert attachment.counts.clock is not None
    attachment.counts.clock.on_cpu = True
    kept: list[int] = []
    attachment.forwards.observer = lambda block, chosen: (
        kept.append(chosen.shape[1]) if block == 1 else None
    )
    return attachment.counts.clock, kept


def read(target: Any, call: Any, **options: Any) -> tuple[Any, list[int]]:
    """The same with every time read."""
    clock, kept = watched(target, **options)
    clock.on_cpu = False
    return call(), kept


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_pipelines_scheduler_tells_all_steps_but_a_runs_first(guidance: float) -> None:
    pipe = tiny.pipeline(tiny.sd3())

    def call() -> Any:
        return tiny.generate(pipe, guidance, num_inference_steps=6)

    expected, kept_before = read(pipe, call)
    clock, kept = watched(pipe)
    assert torch.equal(call(), expected)
    assert kept == kept_before
    assert len(set(kept)) == 4  # rows differ: a wrong time would show
    assert clock.reads == 1
    call()
    assert clock.reads == 2


def test_passes_in_turn_and_other_units() -> None:
    """Flux: times in [0, 1], two calls per step."""
    made = Flux()
    expected, kept_before = read(made.pipe, lambda: made(True))
    clock, kept = watched(made.pipe)
    assert torch.equal(made(True), expected)
    assert kept == kept_before
    assert clock.reads == 1  # the second call of the first step is at the same time


def test_a_replaced_scheduler_is_seen() -> None:
    """Heun calls twice per step, at times that its list repeats."""
    pipe = tiny.pipeline(tiny.sd3())
    clock, _ = watched(pipe)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    tiny.generate(pipe, 1.0)
    assert clock.reads == 1
    clock, kept = watched(pipe)
    tiny.generate(pipe, 1.0)
    assert kept == read(pipe, lambda: tiny.generate(pipe, 1.0))[1]


def test_a_scheduler_of_other_times_is_not_believed() -> None:
    """Its list is in other units: every call is read."""
    pipe = tiny.pipeline(tiny.sd3())
    clock, kept = watched(pipe)
    pipe.scheduler.register_to_config(num_train_timesteps=300)
    tiny.generate(pipe, 1.0)
    assert clock.reads == 4
    assert kept == read(pipe, lambda: tiny.generate(pipe, 1.0))[1]


def test_an_interrupted_run_leaves_nothing_behind() -> None:
    pipe = tiny.pipeline(tiny.sd3())
    _, kept = watched(pipe)

    def stop(pipe: Any, step: int, t: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return arguments

    with pytest.raises(KeyboardInterrupt):
        tiny.generate(pipe, 1.0, callback_on_step_end=stop)
    kept.clear()
    tiny.generate(pipe, 1.0)
    assert kept == read(pipe, lambda: tiny.generate(pipe, 1.0))[1]


def test_listed_steps_need_no_reading() -> None:
    model = tiny.sd3()
    steps = [990.0, 600.0, 300.0, 20.0]

    def call() -> list[Any]:
        return [tiny.run(model, tiny.inputs(t=step / 1000)) for step in 2 * steps]

    expected, kept_before = read(model, call, timesteps=steps)
    clock, kept = watched(model, timesteps=steps)
    found = call()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kept == kept_before
    assert clock.reads == 0


def test_calls_at_other_times_than_listed_are_an_error() -> None:
    """Found by a comparison on the device, looked at when the next call comes."""
    model = tiny.sd3()
    watched(model, timesteps=[900.0, 500.0])
    tiny.run(model, tiny.inputs(t=0.9))
    tiny.run(model, tiny.inputs(t=0.3))
    with pytest.raises(RuntimeError, match=r"t = 0.500 and was 0.200 away"):
        tiny.run(model, tiny.inputs(t=0.9))
    # 16 bits round times by up to 0.004.
    watched(model, timesteps=[500.0])
    tiny.run(model, tiny.inputs(t=0.504))
    tiny.run(model, tiny.inputs(t=0.5))


def test_a_call_apart_from_the_run_is_an_error_while_it_lasts() -> None:
    pipe = tiny.pipeline(tiny.sd3())
    watched(pipe)

    def apart(pipe: Any, step: int, t: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        tiny.run(pipe.transformer, tiny.inputs(t=0.01))
        return arguments

    with pytest.raises(
        RuntimeError, match=r"not those of the calls.*in between.*disabled\(model\)"
    ):
        tiny.generate(pipe, 1.0, callback_on_step_end=apart)


def test_calls_in_between_are_made_as_the_error_says() -> None:
    pipe = tiny.pipeline(tiny.sd3())
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer))
    expected = tiny.generate(pipe, 1.0)
    dense: list[torch.Tensor] = []

    def apart(pipe: Any, step: int, t: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        with shiva_dit.disabled(pipe.transformer):
            dense.append(tiny.run(pipe.transformer, tiny.inputs(t=0.01)))
        return arguments

    watched(pipe)
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer))
    attachment = attachment_of(pipe.transformer)
    assert attachment is not None
    assert attachment.counts.clock is not None
    attachment.counts.clock.on_cpu = True
    assert torch.equal(tiny.generate(pipe, 1.0, callback_on_step_end=apart), expected)
    bare = tiny.run(tiny.sd3(), tiny.inputs(t=0.01))
    assert all(torch.equal(each, bare) for each in dense)


def test_on_a_cpu_times_are_read() -> None:
    """There it costs nothing, and nothing can go wrong."""
    pipe = tiny.pipeline(tiny.sd3())
    clock, _ = watched(pipe)
    clock.on_cpu = False
    tiny.generate(pipe, 1.0)
    assert clock.reads == 4


def test_no_steps_are_refused_and_no_scheduler_is_no_clock() -> None:
    model = tiny.sd3()
    with pytest.raises(ValueError, match="at least one step"):
        shiva_dit.apply(model, tiny.adapter(model), timesteps=[])
    for wrong in (float("nan"), 1100.0, -1.0):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got|a finite number"):
            shiva_dit.apply(model, tiny.adapter(model), timesteps=[500.0, wrong])
    shiva_dit.apply(model, tiny.adapter(model))
    attachment = attachment_of(model)
    assert attachment is not None
    assert attachment.counts.clock is None
    assert ListedTimes([0.5]).next() == 0.5
    assert SchedulerTimes(tiny.pipeline(model), model).next() is None
