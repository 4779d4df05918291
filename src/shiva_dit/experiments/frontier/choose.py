"""Which setting for one's own model, machine and budget: successive halving over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.benchmark.timing import interleaved
from shiva_dit.config import check_types
from shiva_dit.experiments.frontier.caches import mag_ratios
from shiva_dit.experiments.frontier.config import Arm, CacheKind, Frontier, Point
from shiva_dit.experiments.frontier.put import arm_on, reason, refusals
from shiva_dit.experiments.frontier.quality import on_front
from shiva_dit.experiments.frontier.source import Source
from shiva_dit.experiments.scoring import Sampler
from shiva_dit.metrics import LARGEST_PSNR, decibels, squared_errors

ETA = 4
"""Of so many candidates one goes on, to so many times the prompts."""
CACHES: tuple[tuple[CacheKind, float], ...] = (("mag_cache", 0.06), ("mag_cache", 0.15))
"""What is tried beside no cache."""
SHARES = (1.0, 0.75, 0.5, 0.4, 0.3, 0.2)
"""Of the steps that the user names."""
WHOLE_STEPS = (1, 2)
"""Likewise, of an adapter."""
MARGIN = 1.03
"""Times vary: so much more than the budget still counts as within it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is asked for."""

    adapter: str
    """Folder, or "shipped" for a demo task's own."""
    budget: float
    """Share of the time of the unpruned model, in (0, 1]."""
    steps: int = 28
    """Sampler steps of the unpruned model."""
    guidance: float = 1.0
    """Scale; 1 is none."""
    sampler: Sampler = "euler_diffusers"
    """How steps are made; by default as the pipeline's own scheduler does."""
    keep_ratios: tuple[float, ...] = ()
    """Mean keep ratios to try; the adapter's own by default."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 < self.budget <= 1.0:
            raise ValueError(
                f"budget must lie in (0, 1], the unpruned model's time, got {self.budget}."
            )
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.guidance < 1.0:
            raise ValueError(f"guidance must be at least 1, got {self.guidance}.")


@dataclass(kw_only=True, slots=True)
class Candidate:
    """A setting, and what is known of it."""

    point: Point
    share: float = math.nan
    """Of the unpruned model's time."""
    psnr: float = math.nan
    """dB to the unpruned model's pictures, over `pictures`."""
    pictures: int = 0
    failed: str | None = None
    """Why it can't be had."""
    mag_ratios: list[float] | None = None
    """What MagCache was calibrated to."""
    errors: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.point.arm.name}, {self.point.steps} steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was found."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    """All that were tried, the unpruned model at its own steps first."""
    pictures: int
    """Made for it, without those that times were taken of."""
    whole_grid: int
    """That trying all affordable ones on all prompts would have made."""


def keep_ratios_of(adapter: str) -> tuple[float, ...]:
    """Those to try of an adapter for a range: its lowest, and two within, or those it is joined of.

    Args:
        adapter: Folder or Hub id.

    Returns:
        None where it was trained for one alone: its own is tried.
    """
    found = ShivaAdapter.from_pretrained(adapter)
    if found.budgets:
        return tuple(sorted(one.config.keep_ratio for one in (found, *found.budgets)))
    low, high = found.trained_for
    return () if low == high else tuple(round(low + (high - low) * i / 3, 3) for i in range(3))


def candidates(wish: Wish) -> list[Candidate]:
    """All settings, the unpruned model at the steps asked for first."""
    steps = sorted({max(1, round(share * wish.steps)) for share in SHARES}, reverse=True)
    ways: list[dict[str, Any]] = [{"name": "unpruned"}]
    for ratio in wish.keep_ratios or (None,):
        said = "adapter" if ratio is None else f"adapter at {ratio:g}"
        ways.append({"name": said, "adapter": wish.adapter, "run_at": ratio})
    arms = [*ways]
    for way in ways[1:]:
        for number in WHOLE_STEPS:
            arms.append({**way, "name": f"{way['name']}, {number} whole", "whole_steps": number})
    for way in ways:
        for kind, threshold in CACHES:
            name = f"{way['name']} + {kind} {threshold:g}"
            arms.append({**way, "name": name, "cache": kind, "threshold": threshold})
    return [
        Candidate(
            point=Point(
                key=arm["name"],
                arm=Arm(sampler=wish.sampler, steps=(number,), **arm),
                steps=number,
                guidance=wish.guidance,
                seed=wish.seed,
            )
        )
        for arm in arms
        for number in steps
    ]


def choose(source: Source, wish: Wish, count: int, *, batch: int = 1, repeats: int = 3) -> Choice:
    """The best setting within a budget.

    Times are taken of all settings, in turn. Those within the budget make pictures of a sixteenth
    of the prompts; the best quarter of them makes those of a quarter, and of these the best quarter
    those of all, until one is left: less than a fifth of the whole grid.

    Args:
        source: Whose pictures.
        wish: What is asked for.
        count: Prompts.
        batch: Pictures per call.
        repeats: Rounds of timing.

    Raises:
        ValueError: If nothing is within the budget.
    """
    found = candidates(wish)
    with torch.no_grad():
        _time(source, found, batch, repeats)
        affordable = [c for c in found if c.share <= MARGIN * wish.budget]
        if not affordable:
            least = min((c for c in found if not math.isnan(c.share)), key=lambda c: c.share)
            raise ValueError(
                f"nothing is within {wish.budget:g} of the unpruned model's time: the quickest, "
                f"{least.name}, takes {least.share:.2f}."
            )
        made = _halve(source, affordable, found[0].point, count, batch)
    best = max(affordable, key=lambda candidate: (candidate.pictures, candidate.psnr))
    return Choice(
        best=best, candidates=tuple(found), pictures=made, whole_grid=len(affordable) * count
    )


def _time(source: Source, found: Sequence[Candidate], batch: int, repeats: int) -> None:
    calls: dict[str, Callable[[], object]] = {}
    pipe: Any = None
    with ExitStack() as stack:
        for candidate in tqdm(found, desc="putting on", unit="setting"):
            try:
                pipe, run = stack.enter_context(arm_on(candidate.point, source))
                call = partial(run, batch, 0)
                call()
            except refusals(candidate.point.arm) as error:
                candidate.failed = reason(error)
                continue
            candidate.mag_ratios = mag_ratios(pipe.transformer)
            calls[candidate.name] = call
        device = next(pipe.transformer.parameters()).device
        samples = interleaved(calls, repeats=repeats, device=device)
    whole = samples[found[0].name]
    for candidate in found:
        if candidate.failed is None:
            candidate.share = samples[candidate.name].share_of(whole)


def _halve(
    source: Source, affordable: list[Candidate], whole: Point, count: int, batch: int
) -> int:
    """Give all candidates their errors on as many prompts as they earn; returns pictures made."""
    truth = torch.empty(0)
    made, running = 0, affordable
    for rung in (ETA**2, ETA, 1):
        wanted = max(1, count // rung)
        with arm_on(whole, source) as (_, run):
            truth = torch.cat([truth, *_pictures(run, len(truth), wanted, batch)])
        for candidate in tqdm(running, desc=f"{wanted} prompts", unit="setting"):
            before = candidate.pictures
            with arm_on(candidate.point, source) as (_, run):
                images = torch.cat(_pictures(run, before, wanted, batch) or [torch.empty(0)])
            if len(images):
                errors = squared_errors(images, truth[before:wanted])
                candidate.errors = torch.cat([candidate.errors.double(), errors])
            candidate.pictures = wanted
            made += wanted - before
            candidate.psnr = decibels(candidate.errors)
        ranked = sorted(running, key=lambda candidate: -candidate.psnr)
        running = ranked[: math.ceil(len(ranked) / ETA)]
        if len(running) == 1:
            break
    return made


def _pictures(run: Any, start: int, end: int, batch: int) -> list[torch.Tensor]:
    return [run(min(batch, end - place), place) for place in range(start, end, batch)]


def said(choice: Choice, wish: Wish) -> str:
    """The front, and the setting to use, to print."""
    tried = [c for c in choice.candidates if c.pictures]
    marks = on_front([c.share for c in tried], [c.psnr for c in tried])
    lines = ["time   PSNR, dB  prompts  setting"]
    ranked = sorted(zip(tried, marks, strict=True), key=lambda pair: pair[0].share)
    lines += [
        f"{c.share:.3f}  {_shown(c.psnr)}  {c.pictures:7}  {c.name}" for c, mark in ranked if mark
    ]
    failed = {c.point.arm.name: c.failed for c in choice.candidates if c.failed is not None}
    lines += [f"Not tried: {name}: {why}" for name, why in failed.items()]
    best = choice.best
    lines.append(
        f"\nWithin {wish.budget:g} of the unpruned model's time: {best.name} "
        f"({best.share:.2f}, {_shown(best.psnr).strip()} dB), found with {choice.pictures} "
        f"pictures instead of {choice.whole_grid}.\n"
    )
    return "\n".join([*lines, snippet(best)])


def _shown(psnr: float) -> str:
    return "   equal" if psnr >= LARGEST_PSNR else f"{psnr:8.1f}"


def snippet(candidate: Candidate) -> str:
    """Code that uses a setting."""
    arm, lines = candidate.point.arm, []
    if candidate.mag_ratios is not None:
        lines.append("from diffusers.hooks import MagCacheConfig, apply_mag_cache")
    if arm.adapter is not None:
        ratio = "" if arm.run_at is None else f", keep_ratio={arm.run_at:g}"
        lines += ["import shiva_dit", "", f'shiva_dit.apply(pipe, "{arm.adapter}"{ratio})']
    if arm.whole_steps:
        lines.append(f"shiva_dit.correct(pipe, {arm.whole_steps})")
    if candidate.mag_ratios is not None:
        ratios = ", ".join(f"{ratio:.4f}" for ratio in candidate.mag_ratios)
        lines += [
            "apply_mag_cache(",
            "    pipe.transformer,",
            "    MagCacheConfig(",
            f"        threshold={arm.threshold:g},",
            f"        num_inference_steps={candidate.point.steps},",
            f"        mag_ratios=[{ratios}],",
            "    ),",
            ")",
        ]
    call = (
        f"num_inference_steps={candidate.point.steps}, guidance_scale={candidate.point.guidance:g}"
    )
    return "\n".join([*lines, f"image = pipe(prompt, {call}).images[0]"])


def frontier_of(wish: Wish, **source: Any) -> Frontier:
    """What `source_of` reads: the model and its prompts.

    Args:
        wish: What is asked for.
        **source: Of a `Frontier`: task, or pipeline and prompts; count, size, device.
    """
    return Frontier(
        what="choose",
        about="",
        guidance=(wish.guidance,),
        arms={"unpruned": {"name": "unpruned"}},
        **source,
    )
