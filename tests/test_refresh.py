"""Refresh: tokens that are left out get the last update that was computed for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import shiva_dit
from shiva_dit.experiments.frontier.executed import counted
from shiva_dit.methods.base import Where
from shiva_dit.methods.refresh import APART, Refresh
from shiva_dit.models.reducing import attach_reducer
from tests import families, tiny
from tests.test_published import model_of, normal, predictions

N, D = 6, 3


def where(step: int, memory: dict[Any, Any], *, block: int = 1, is_both: bool = False) -> Where:
    return Where(site="block", block=block, step=step, memory=memory, is_both=is_both)


def ran(refresh: Refresh, x: Tensor, y: Tensor, at: Where) -> Tensor:
    """What the block gives for all tokens where it gives y for those that it runs on."""
    how = refresh.around(x, at)
    assert how is not None
    assert how.finish is not None
    return how.finish(y)


def test_the_others_get_their_last_update() -> None:
    refresh, memory = Refresh(0.5, whole_steps=1), {}
    first, updates = normal(1, N, D), normal(1, N, D, seed=1)
    assert torch.equal(ran(refresh, first, first + updates, where(0, memory)), first + updates)
    moved = first.clone()
    moved[0, [1, 3, 4]] += 5.0  # three of six run
    moved[0, 0] += 0.1
    how = refresh.around(moved, where(1, memory))
    assert how is not None
    assert how.tokens is not None
    assert how.finish is not None
    assert sorted(map(tuple, how.tokens[0].tolist())) == sorted(
        map(tuple, moved[0, [1, 3, 4]].tolist())
    )
    assert how.keys is moved
    new = how.finish(how.tokens + 7.0)
    expected = moved + updates
    expected[0, [1, 3, 4]] = moved[0, [1, 3, 4]] + 7.0
    assert torch.allclose(new, expected)
    # What ran is remembered anew, the others from where they were seen last.
    last = memory[1]
    seen, remembered = first.clone(), updates.clone()
    seen[0, [1, 3, 4]], remembered[0, [1, 3, 4]] = moved[0, [1, 3, 4]], 7.0
    assert torch.allclose(last.seen, seen)
    assert torch.allclose(last.update, remembered, atol=1e-6)
    # Token 0 has moved by 0.1 since it was seen, all that ran by nothing: now it runs.
    again = Refresh(1 / N, whole_steps=1).around(moved, where(2, memory))
    assert again is not None
    assert again.tokens is not None
    assert torch.equal(again.tokens[0, 0], moved[0, 0])


def test_halves_run_the_same_tokens_and_their_difference_counts_most() -> None:
    refresh, memory = Refresh(1 / N, whole_steps=1), {}
    x = normal(2, N, D)
    ran(refresh, x, x, where(0, memory, is_both=True))
    moved = x.clone()
    moved[:, 2] += 1.0  # both alike, by far
    moved[0, 4] += 0.5  # one alone
    how = refresh.around(moved, where(1, memory, is_both=True))
    assert how is not None
    assert how.tokens is not None
    assert D * 0.25 * (1 + APART) > 2 * D
    assert torch.equal(how.tokens[:, 0], moved[:, 4])
    alone = refresh.around(moved, where(1, memory))
    assert alone is not None
    assert alone.tokens is not None
    assert torch.equal(alone.tokens[:, 0], moved[:, 2])


@pytest.mark.parametrize("kind", ["sd3", "sd3-dual"])
def test_where_nothing_moves_all_keys_give_the_model_itself(kind: str) -> None:
    model = model_of(kind)
    inputs = tiny.inputs()
    bare = tiny.run(model, inputs)
    for keys, is_alike in (("all", True), ("chosen", False)):
        attached = attach_reducer(model, Refresh(0.25, whole_steps=1, keys=keys))
        run = shiva_dit.steps(attached.model, 3)
        for step in range(3):
            with run.step(step):
                found = tiny.run(model, inputs)
            assert torch.allclose(found, bare, atol=1e-5) == (is_alike or step == 0)
        shiva_dit.remove(model)
        assert torch.equal(tiny.run(model, inputs), bare)


def test_the_first_steps_are_the_models_and_all_tokens_too() -> None:
    model = model_of("sd3")
    bare = list(predictions(model, "sd3", steps=4))
    for keep_ratio, alike in ((1.0, 4), (0.5, 2)):
        attached = attach_reducer(model, Refresh(keep_ratio))
        found = list(predictions(model, "sd3", attached, steps=4))
        assert [torch.equal(f, b) for f, b in zip(found, bare, strict=True)] == [
            step < alike for step in range(4)
        ]
        attached.detach()


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_that_take_turns_have_memories_of_their_own(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    model = model_of("sd3").to(dtype)
    attached = attach_reducer(model, Refresh(0.5))

    def run(seed: int) -> Any:
        return predictions(model, "sd3", attached, size=size, seed=seed, dtype=dtype)

    alone = [list(run(0)), list(run(1))]
    for both in zip(run(0), run(1), *alone, strict=True):
        one, other, its, others = both
        assert torch.equal(one, its)
        assert torch.equal(other, others)
        assert torch.isfinite(one).all()


def test_a_pipeline_says_its_steps_and_its_memory_goes_with_it() -> None:
    pipe = tiny.pipeline(tiny.sd3())
    bare = tiny.generate(pipe, 4.0)
    attached = shiva_dit.attach_reducer(pipe.transformer, Refresh(0.5, whole_steps=1))
    with counted(pipe.transformer) as counts:
        ours = tiny.generate(pipe, 4.0)
    assert not torch.equal(ours, bare)
    assert counts[0] > 1.1 * counts[1]
    assert len(set(counts[1:])) == 1
    assert not attached.runs._runs
    shiva_dit.remove(pipe)
    assert torch.equal(tiny.generate(pipe, 4.0), bare)


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Stable Diffusion 3 and 3\.5 alone"):
        attach_reducer(families.made("pixart-sigma"), Refresh(0.5))
    for bad, name in (({"keep_ratio": 0.0}, "keep_ratio"), ({"whole_steps": 0}, "whole_steps")):
        with pytest.raises(ValueError, match=name):
            Refresh(**{"keep_ratio": 0.5, **bad})
    model = model_of("sd3")
    attach_reducer(model, Refresh(0.5))
    with pytest.raises(ValueError, match="goes by the steps of a run"):
        tiny.run(model, tiny.inputs())
