"""Putting on, switching and taking off happen whole or not at all, whatever fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn
from torch.nn.modules.module import RemovableHandle

import shiva_dit
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.low_rank import Beside, LowRank
from shiva_dit.models.places import Place
from shiva_dit.models.undo import Undo
from shiva_dit.models.weights import Whole
from tests import tiny

KINDS = ["frozen", "lora", "dora", "full"]
FAILURES = [KeyboardInterrupt, torch.OutOfMemoryError, OSError]
STEPS: list[tuple[Any, str]] = [
    (HookRegistry, "register_hook"),
    (HookRegistry, "remove_hook"),
    (nn.Module, "register_forward_hook"),
    (nn.Module, "register_forward_pre_hook"),
    (Place, "set"),
    (Place, "get"),
    (LowRank, "merged"),
    (Whole, "merged"),
    (Beside, "__init__"),
    (Tensor, "to"),
]
"""What putting on, switching and taking off is made of."""


class Failing:
    """Every step counts; the n-th raises, before or after it is done."""

    def __init__(self, at: int, failure: type[BaseException], after: bool) -> None:
        self.at, self.failure, self.after = at, failure, after
        self.count, self.raised = 0, False

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            number = self.count
            if number == self.at and not self.after:
                self.raised = True
                raise self.failure("simulated")
            result = real(*args, **kwargs)
            if number == self.at:
                self.raised = True
                raise self.failure("simulated")
            return result

        return step


@contextmanager
def failing(at: int, failure: type[BaseException], after: bool) -> Iterator[Failing]:
    made = Failing(at, failure, after)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, made.wrap(getattr(owner, name)))
        yield made


def state(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: nn.Module, expected: list[Tensor]) -> bool:
    pairs = zip(model.parameters(), expected, strict=True)
    return all(torch.equal(parameter, each) for parameter, each in pairs)


def bare() -> Any:
    """Of two blocks: each of its layers takes several steps."""
    return tiny.sd3(num_layers=2)


def made_for(kind: str) -> shiva_dit.ShivaAdapter:
    made = tiny.adapter(
        bare(), tiny.from_counts([[64, 20]]), backbone=kind, lora_rank=tiny.LORA_RANK
    )
    made.backbone_weights, _ = tiny.tuned(kind, num_layers=2)
    return made


def some(count: int) -> list[int]:
    """All of the first steps and of the last, and some in between."""
    some = {*range(1, 8), *range(8, count, max(1, count // 12)), count - 1, count}
    return sorted(at for at in some if 1 <= at <= count)


def steps_of(act: Callable[[], object]) -> int:
    with failing(0, OSError, after=False) as counter:
        act()
    return counter.count


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("earlier", [False, True])
def test_apply(kind: str, merge: bool, earlier: bool) -> None:
    if kind == "full" and not merge:
        return
    made, other = made_for(kind), made_for("full")

    def fresh() -> Any:
        model = bare()
        if earlier:
            shiva_dit.apply(model, other)
        return model

    def act(model: Any) -> None:
        shiva_dit.apply(model, made, merge=merge)

    model = fresh()
    before, weights, output = tiny.footprint(model), state(model), tiny.run(model, tiny.inputs())
    complete = fresh()
    count = steps_of(lambda: act(complete))
    expected = tiny.run(complete, tiny.inputs())
    for place, at in enumerate(some(count)):
        with (
            failing(at, FAILURES[place % 3], after=bool(place % 2)) as step,
            pytest.raises((KeyboardInterrupt, RuntimeError, OSError)),
        ):
            act(model)
        assert step.raised
        assert (attachment_of(model) is not None) == earlier
        if not earlier:
            assert tiny.footprint(model) == before
        assert same(model, weights)
        assert torch.equal(tiny.run(model, tiny.inputs()), output)
    act(model)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_remove(kind: str, merge: bool) -> None:
    """Whole, or not at all: hooks come off whole even if one failed."""
    if kind == "full" and not merge:
        return
    made, model = made_for(kind), bare()
    before, weights, dense = tiny.footprint(model), state(model), tiny.run(model, tiny.inputs())
    shiva_dit.apply(model, made, merge=merge)
    on, output = state(model), tiny.run(model, tiny.inputs())
    counted: Any = shiva_dit.apply(bare(), made, merge=merge)
    count = steps_of(lambda: shiva_dit.remove(counted))
    for place, at in enumerate(some(count)):
        with (
            failing(at, FAILURES[place % 3], after=bool(place % 2)) as step,
            pytest.raises((KeyboardInterrupt, RuntimeError, OSError)),
        ):
            shiva_dit.remove(model)
        assert step.raised
        if attachment_of(model) is None:
            assert tiny.footprint(model) == before
            assert same(model, weights)
            assert torch.equal(tiny.run(model, tiny.inputs()), dense)
            shiva_dit.apply(model, made, merge=merge)
        assert same(model, on)
        assert torch.equal(tiny.run(model, tiny.inputs()), output)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_switching(kind: str, enabled: bool) -> None:
    """On entering `disabled`, and on leaving it."""
    model: Any = shiva_dit.apply(bare(), made_for(kind))
    attachment: Any = attachment_of(model)
    model.double()  # so that every exchange allocates
    for each in (enabled, not enabled, enabled, not enabled):  # merged anew, in float64
        attachment.enable(each)
    wide = {name: value.double() for name, value in tiny.inputs().items()}
    before, output = state(model), tiny.run(model, wide)
    count = steps_of(lambda: attachment.enable(enabled))
    after = tiny.run(model, wide)
    attachment.enable(not enabled)
    for place, at in enumerate(some(count)):
        with (
            failing(at, FAILURES[place % 3], after=bool(place % 2)) as step,
            pytest.raises((KeyboardInterrupt, RuntimeError, OSError)),
        ):
            attachment.enable(enabled)
        assert step.raised
        assert same(model, before)
        assert torch.equal(tiny.run(model, wide), output)
    attachment.enable(enabled)
    assert torch.equal(tiny.run(model, wide), after)


def test_a_second_failure_does_not_keep_the_rest_from_being_undone() -> None:
    undo, done, tries = Undo(), [], []

    def fails() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt

    undo.add(lambda: done.append("first"))
    undo.add(fails)
    undo.add(lambda: done.append("last"))
    with pytest.raises(KeyboardInterrupt):
        undo.run()
    assert done == ["last", "first"]
    assert len(tries) == 2  # tried again when the others were back
    undo.run()
    assert done == ["last", "first"]


def test_handles_can_be_removed_twice() -> None:
    """What the steps rely on: torch forgets a hook that is not there without a word."""
    layer = nn.Linear(1, 1)
    handle: RemovableHandle = layer.register_forward_hook(lambda *_: None)
    handle.remove()
    handle.remove()
    assert not layer._forward_hooks
