"""One forward at a time on a model, switches between forwards, and turns left behind by Ctrl-C."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shiva_dit
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.turns import deferred, turns_of
from tests import tiny

SCHEDULE = Schedule.uniform(0.4, num_blocks=4, num_bins=8)
WAIT = 60.0  # seconds until a test that hangs gives up


def adapted(kind: str = "frozen") -> tuple[Any, shiva_dit.ShivaAdapter]:
    model = tiny.sd3()
    made = tiny.adapter(model, SCHEDULE, backbone=kind, lora_rank=tiny.LORA_RANK)
    made.backbone_weights, _ = tiny.tuned(kind)
    shiva_dit.apply(model, made)
    return model, made


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


class Held:
    """A forward in another thread that stands still in the second block until it is let go."""

    def __init__(self, model: nn.Module) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.output: Tensor | None = None
        self._hook = model.transformer_blocks[1].register_forward_pre_hook(self._stand)  # type: ignore[union-attr, operator]
        self._thread = in_thread(lambda: setattr(self, "output", tiny.run(model, tiny.inputs())))
        assert self.inside.wait(WAIT)

    def _stand(self, *_: Any) -> None:
        self.inside.set()
        assert self.go.wait(WAIT)

    def finish(self) -> Tensor:
        self.go.set()
        self._thread.join(WAIT)
        self._hook.remove()
        assert self.output is not None
        return self.output


def disable(model: Any, made: shiva_dit.ShivaAdapter) -> None:
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.enable(False)  # what `disabled` does on entering


SWITCHES: dict[str, Callable[[Any, Any], None]] = {
    "remove": lambda model, made: shiva_dit.remove(model),
    "apply": lambda model, made: shiva_dit.apply(model, made, keep_ratio=0.7),
    "disabled": disable,
}


@pytest.mark.parametrize("kind", ["frozen", "lora", "dora", "full"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_waits_for_the_running_forward(switch: str, kind: str) -> None:
    model, made = adapted(kind)
    expected = tiny.run(model, tiny.inputs())
    held, done = Held(model), threading.Event()

    def act() -> None:
        SWITCHES[switch](model, made)
        done.set()

    switching = in_thread(act)
    # It can't be done before the forward is; that it has not begun is what its output shows.
    assert not done.is_set()
    assert torch.equal(held.finish(), expected)
    switching.join(WAIT)
    assert done.is_set()
    assert not torch.equal(tiny.run(model, tiny.inputs()), expected)


def test_apply_waits_for_a_forward_of_the_bare_model() -> None:
    model = tiny.sd3()
    made, bare = tiny.adapter(model, SCHEDULE), tiny.run(model, tiny.inputs())
    held = Held(model)
    applying = in_thread(lambda: shiva_dit.apply(model, made))
    assert attachment_of(model) is None
    assert torch.equal(held.finish(), bare)
    applying.join(WAIT)
    assert attachment_of(model) is not None


def test_a_forward_within_a_forward_is_refused_and_the_outer_one_is_right() -> None:
    model, _ = adapted()
    expected = tiny.run(model, tiny.inputs())
    errors: list[str] = []

    def inner(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="inside a forward of the same model") as error:
            tiny.run(model, tiny.inputs(t=0.1, seed=5))
        errors.append(str(error.value))

    hook = model.transformer_blocks[2].register_forward_pre_hook(inner)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    hook.remove()
    assert len(errors) == 1
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_from_inside_a_forward_is_refused(switch: str) -> None:
    model, made = adapted("full")
    expected = tiny.run(model, tiny.inputs())

    def act(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="from inside a forward"):
            SWITCHES[switch](model, made)

    hook = model.transformer_blocks[2].register_forward_pre_hook(act)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    hook.remove()
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


@pytest.fixture
def ctrl_c() -> Any:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *_: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_forward_locks_nobody_out(ctrl_c: Callable[..., None]) -> None:
    model, _ = adapted()
    expected = tiny.run(model, tiny.inputs())
    hook = model.transformer_blocks[1].register_forward_pre_hook(ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(model, tiny.inputs())
    hook.remove()
    found: list[Tensor] = []
    for _ in range(2):
        in_thread(lambda: found.append(tiny.run(model, tiny.inputs()))).join(WAIT)
        found.append(tiny.run(model, tiny.inputs()))
    assert len(found) == 4
    assert all(torch.equal(each, expected) for each in found)


def test_an_interrupted_forward_does_not_keep_a_switch_waiting(ctrl_c: Callable[..., None]) -> None:
    model, _ = adapted("full")
    bare = tiny.run(tiny.sd3(), tiny.inputs())
    hook = model.transformer_blocks[1].register_forward_pre_hook(ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(model, tiny.inputs())
    hook.remove()
    in_thread(lambda: shiva_dit.remove(model)).join(WAIT)
    assert attachment_of(model) is None
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


def test_ctrl_c_waits_until_a_switch_is_done(ctrl_c: Callable[..., None]) -> None:
    steps: list[str] = []
    turns = turns_of(tiny.sd3())

    def switch() -> None:
        with turns.switch():
            with turns.switch():
                ctrl_c()
                steps.append("inner")
            steps.append("outer")

    with pytest.raises(KeyboardInterrupt):
        switch()
    assert steps == ["inner", "outer"]
    with deferred():
        steps.append("free again")
    assert steps[-1] == "free again"


def test_a_waiting_switch_can_be_interrupted(ctrl_c: Callable[..., None]) -> None:
    model, _ = adapted("full")
    expected = tiny.run(model, tiny.inputs())
    held = Held(model)
    timer = threading.Timer(0.2, ctrl_c)  # it would wait for ever otherwise
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        shiva_dit.remove(model)
    assert torch.equal(held.finish(), expected)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


def test_no_garbage_is_collected_while_threads_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection amid the listing can wait for ever in Python 3.11 (it hung a test, once)."""
    seen: list[bool] = []
    frames = sys._current_frames
    monkeypatch.setattr(sys, "_current_frames", lambda: seen.append(gc.isenabled()) or frames())
    model = tiny.sd3()
    shiva_dit.apply(model, tiny.adapter(model))
    shiva_dit.remove(model)
    assert seen
    assert not any(seen)
    assert gc.isenabled()
