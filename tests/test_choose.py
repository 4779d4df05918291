"""Choosing a setting: what is affordable, what halving costs, and what it finds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.cli.command_line import main
from shiva_dit.experiments.frontier import choose as module
from shiva_dit.experiments.frontier.choose import (
    MARGIN,
    Candidate,
    Choice,
    Wish,
    candidates,
    choose,
    keep_ratios_of,
    said,
    snippet,
)
from shiva_dit.experiments.frontier.config import Arm, Point
from shiva_dit.experiments.frontier.source import Source
from tests import tiny

COUNT = 32


def worth(point: Point) -> float:
    """Of a setting in the made-up world, as standard deviation of its error: smaller is better."""
    kind = 0.5 - 0.09 * point.arm.whole_steps if point.arm.adapter else 1.0
    return kind * (1.0 + 0.3 * (point.arm.cache is not None)) / point.steps


def cost(point: Point) -> float:
    """Share of the time of 20 unpruned steps."""
    kind = 0.6 if point.arm.adapter else 1.0
    return (kind * (0.7 if point.arm.cache else 1.0) * point.steps + point.arm.whole_steps) / 20


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings whose times and errors are known; the second cache can't be had."""

    @contextmanager
    def arm_on(point: Point, source: Any) -> Iterator[tuple[None, Any]]:
        def run(count: int, start: int) -> Tensor:
            places = [torch.Generator().manual_seed(start + place) for place in range(count)]
            noise = torch.stack([torch.randn(1, 4, 4, generator=g) for g in places])
            is_truth = point.arm.name == "unpruned" and point.steps == 20
            return 0.0 * noise if is_truth else 0.1 * worth(point) * noise

        yield None, run

    def time(source: Any, found: list[Candidate], batch: int, repeats: int) -> None:
        for candidate in found:
            if candidate.point.arm.threshold == 0.15:
                candidate.failed = "no such cache"
            else:
                candidate.share = cost(candidate.point)

    monkeypatch.setattr(module, "arm_on", arm_on)
    monkeypatch.setattr(module, "_time", time)


class Nowhere(Source):
    """Never asked."""

    def pipe(self, *, own_weights: bool) -> Any:
        raise NotImplementedError

    def run(self, pipe: Any, point: Point, count: int, start: int) -> Tensor:
        raise NotImplementedError


def wish(**changes: Any) -> Wish:
    return Wish(**{"adapter": "mine", "budget": 0.4, "steps": 20, **changes})


def found(**changes: Any) -> Choice:
    return choose(Nowhere(), wish(**changes), COUNT)


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.4, 0.6])
def test_the_best_within_the_budget_is_found_at_a_fifth_of_the_grid(
    world: None, budget: float
) -> None:
    choice = found(budget=budget)
    affordable = [c for c in choice.candidates if c.share <= MARGIN * budget]
    best = min(affordable, key=lambda c: worth(c.point))
    assert choice.best is best
    assert choice.best.pictures == max(c.pictures for c in choice.candidates)
    assert choice.whole_grid == COUNT * len(affordable)
    assert choice.pictures <= choice.whole_grid / 5
    beyond = [c for c in choice.candidates if not c.share <= MARGIN * budget]
    assert not any(c.pictures for c in beyond)


def test_what_is_printed_says_front_choice_and_what_was_not_tried(world: None) -> None:
    choice = found()
    text = said(choice, wish())
    assert f"Within 0.4 of the unpruned model's time: {choice.best.name}" in text
    assert "Not tried: adapter + mag_cache 0.15: no such cache" in text
    front = [c for c in choice.candidates if c.name in text.split("\n\n")[0] and c.pictures]
    assert choice.best in front


def test_a_budget_that_nothing_meets_says_what_is_quickest(world: None) -> None:
    with pytest.raises(ValueError, match=r"nothing is within 0\.01 .* takes 0\.08"):
        found(budget=0.01)


def test_keep_ratios_are_tried_one_by_one() -> None:
    names = {c.point.arm.name: c.point.arm.run_at for c in candidates(wish(keep_ratios=(0.3, 0.6)))}
    assert names["adapter at 0.3"] == 0.3
    assert names["adapter at 0.6 + mag_cache 0.06"] == 0.6
    assert names["adapter at 0.6, 2 whole"] == 0.6
    assert names["unpruned"] is None
    assert [c.point.steps for c in candidates(wish())][:6] == [20, 15, 10, 8, 6, 4]


def test_ratios_of_an_adapter_for_a_range_are_tried_by_themselves(tmp_path: Path) -> None:
    for trained, ratios in ((None, ()), ((0.3, 0.8), (0.3, 0.467, 0.633))):
        adapter = tiny.adapter(tiny.sd3(), target_range=trained)
        adapter.save_pretrained(tmp_path)
        assert keep_ratios_of(str(tmp_path)) == ratios
    joined = [tiny.adapter(tiny.sd3(), keep_ratio=ratio) for ratio in (0.4, 0.8, 0.3)]
    ShivaAdapter.of_budgets(*joined).save_pretrained(tmp_path)
    assert keep_ratios_of(str(tmp_path)) == (0.3, 0.4, 0.8)


def test_the_snippet_is_code_that_does_it() -> None:
    arm = Arm(name="x", adapter="me/mine", run_at=0.4, cache="mag_cache", threshold=0.06)
    point = Point(key="x", arm=arm, steps=8, guidance=4.0, seed=0)
    code = snippet(Candidate(point=point, mag_ratios=[1.0, 0.98]))
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    assert names == {"shiva_dit.apply", "apply_mag_cache", "MagCacheConfig", "pipe"}
    assert 'shiva_dit.apply(pipe, "me/mine", keep_ratio=0.4)' in code
    assert "pipe(prompt, num_inference_steps=8, guidance_scale=4)" in code
    whole = Point(
        key="x",
        arm=Arm(name="x", adapter="me/mine", whole_steps=2),
        steps=8,
        guidance=4.0,
        seed=0,
    )
    assert "\nshiva_dit.correct(pipe, 2)\n" in snippet(Candidate(point=whole))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"budget": 0.0}, "budget"), ({"budget": 1.5}, "budget"), ({"guidance": 0.0}, "guidance")],
)
def test_wishes_that_make_no_sense_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"{problem} must"):
        wish(**changes)


def test_choosing_for_the_digits_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SHARES", (1.0, 0.5))
    monkeypatch.setattr(module, "CACHES", module.CACHES[:1])
    words = ["choose", "--task", "digits", "--adapter", "shipped", "--budget", "0.9"]
    words += ["--steps", "4", "--sampler", "unipc", "--count", "4", "--threads", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Within 0.9 of the unpruned model's time:" in out
    assert "image = pipe(prompt, num_inference_steps=" in out
    assert '"shipped"' not in out
