"""What a look measures: the error on held-out samples, pictures, and the tokens kept in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.keep_table import KeepTable
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.gating import GatedForward
from shiva_dit.models.sampling import Sampler
from shiva_dit.models.spec import grid_of
from shiva_dit.training.data import Batch, reseed
from shiva_dit.training.guided import guided
from shiva_dit.training.looks.drawn import strip
from shiva_dit.training.looks.material import Shown
from shiva_dit.training.objective import squared_error
from shiva_dit.training.paths import FlowMatching
from shiva_dit.training.processes import Processes
from shiva_dit.training.student import Student

NOISE, PICTURES = 0, 1
"""What noise is for: it is always the same."""
EVEN_STEPS = 20
"""Sampler steps of pictures by default."""
PARTS = 3
"""Of a sampling, whose kept tokens are shown; one a step where there are fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What one model made of prompts."""

    latents: Float[Tensor, "B ..."]
    kept: Float[Tensor, "B parts h w"] | None = None
    """Share of the pruned blocks that kept a token in each third of the steps, noise first; None
    of the unpruned model, and where tokens are not a grid."""


class Measure:
    """A student and its teacher, called as they will be when they sample.

    Args:
        student: In training.
        sampler: How the pipeline takes its steps.
        empty: Conditioning of "no caption".
        guidance: Lowest and highest scale; None without.
        at_once: Samples of a forward.
    """

    def __init__(
        self,
        student: Student,
        sampler: Sampler,
        empty: dict[str, Tensor],
        guidance: tuple[float, float] | None,
        at_once: int,
    ) -> None:
        self.student, self.sampler, self.empty = student, sampler, empty
        self.guidance, self.at_once = guidance, at_once
        self._table: tuple[Schedule, int, KeepTable] | None = None  # it takes a while to make

    @torch.no_grad()
    def errors(
        self,
        schedule: Schedule,
        held_out: Sequence[Batch],
        num_times: int,
        processes: Processes,
    ) -> Float[Tensor, " errors"]:
        """This process's part of the mean squared errors to the unpruned model.

        Args:
            schedule: What the student keeps.
            held_out: Samples of one shape each.
            num_times: Times of each, spread as the sampler's steps are.
            processes: Each measures a share, by as many forwards.

        Returns:
            Of the prediction, and of the guided one (0 where there is none); their sums over all
            processes are the means over all samples and times.
        """
        strata = (torch.arange(num_times) + 0.5) / num_times
        times = _at_quantiles(schedule, strata).tolist()
        parts = [part for batch in held_out for part in batch.split(self.at_once)]
        total = sum(len(batch.latents) for batch in held_out)
        jobs = [(n, i) for n in range(len(parts)) for i in range(num_times)]
        starts = [sum(len(p.latents) for p in parts[:n]) for n in range(len(parts))]
        sums = torch.zeros(2, dtype=torch.float64)
        for turn in range(-(-len(jobs) // processes.count)):
            number = turn * processes.count + processes.rank
            # The last turn may have fewer jobs than processes: sharded models run on all of them.
            part, at = jobs[min(number, len(jobs) - 1)]
            rows = range(starts[part], starts[part] + len(parts[part].latents))
            found = self._error(schedule, parts[part], rows, total, times[at], at)
            if number < len(jobs):
                sums += len(rows) * torch.tensor(found, dtype=torch.float64)
        return sums / (total * num_times)

    def _error(
        self, schedule: Schedule, batch: Batch, rows: range, total: int, t: float, at: int
    ) -> tuple[float, float]:
        """Errors of samples with these numbers among all, at the time with this number."""
        noise = torch.stack([_noise(batch.latents[0], NOISE, row, at) for row in rows])
        scales = None
        if self.guidance is not None:
            low, high = self.guidance
            shares = [(row + 0.5) / total for row in rows]
            scales = torch.tensor([low + (high - low) * share for share in shares])
        student, device = self.student, self.student.device
        batch, noise = batch.to(device), noise.to(device)
        scales = None if scales is None else scales.to(device)
        ts = torch.full((len(rows),), t, device=device)
        noisy = student.path.noisy(batch.latents, noise, ts)
        arguments = student.calls.guided(noisy, ts, batch, scales, self.empty)
        theirs = self._called(student.teacher, batch, arguments, student.as_teacher())
        ours = self._called(student.model, batch, arguments, self._pruned(schedule, batch, t))
        ours, theirs = (student.roles.learned(each, batch) for each in (ours, theirs))
        pair = 0.0
        if scales is not None and student.calls.both_ways:
            pair = squared_error(guided(ours, scales), guided(theirs, scales)).item()
        return squared_error(ours, theirs).item(), pair

    @torch.no_grad()
    def pictures(
        self, schedule: Schedule | None, shown: Shown, steps: int, guidance: float, start: int
    ) -> Pictures:
        """What the unpruned model (no schedule) or the student makes of prompts.

        Args:
            schedule: What the student keeps.
            shown: The prompts.
            steps: Of the sampler.
            guidance: Scale; unused where the recipe has none.
            start: Number of the first prompt, which decides its noise.
        """
        found = []
        for part in shown.batch.split(self.at_once):
            found.append(self._sampled(schedule, part, steps, guidance, start))
            start += len(part.latents)
        kept = [one.kept for one in found if one.kept is not None]
        latents = torch.cat([one.latents for one in found])
        return Pictures(latents=latents, kept=torch.cat(kept) if kept else None)

    def _sampled(
        self, schedule: Schedule | None, batch: Batch, steps: int, guidance: float, start: int
    ) -> Pictures:
        student, device, count = self.student, self.student.device, len(batch.latents)
        noise = [_noise(batch.latents[0], PICTURES, start + i, 0) for i in range(count)]
        x, batch = torch.stack(noise).to(device), batch.to(device)
        scales = None
        if self.guidance is not None:
            scales = torch.full((count,), guidance, device=device)
        todo = list(self.steps(batch, steps))
        kept = _Kept(student, batch, len(todo)) if schedule is not None else None
        for t, step in todo:
            ts = torch.full((count,), t, device=device)
            arguments = student.calls.guided(x, ts, batch, scales, self.empty)
            if schedule is None or kept is None:
                out = self._called(student.teacher, batch, arguments, student.as_teacher())
            else:
                with kept.recorded():
                    pruned = self._pruned(schedule, batch, t)
                    out = self._called(student.model, batch, arguments, pruned)
            if scales is not None and student.calls.both_ways:
                out = guided(out, scales)
            out = out.float()
            if out.shape[1] != x.shape[1]:  # with the variance's channels
                out = out.chunk(2, dim=1)[0]
            x = step(out, x)
        clean = student.roles.clean
        x = x if clean is None else clean.held(x, batch)
        made = batch.pictured(x.cpu())
        return Pictures(latents=made, kept=None if kept is None else kept.shares())

    def steps(
        self, batch: Batch, steps: int
    ) -> Iterator[tuple[float, Callable[[Tensor, Tensor], Tensor]]]:
        """Times of a sampling, and what each makes of prediction and state."""
        path = self.student.path
        if not isinstance(path, FlowMatching):
            solver, times = path.solver(steps)
            for timestep, t in zip(solver.timesteps, times.tolist(), strict=False):
                yield t, lambda out, x, at=timestep: solver.step(out, at, x, return_dict=False)[0]
            return
        times = [1.0 - place / steps for place in range(steps)]
        if self.sampler.scheduler is not None:
            tokens = self.student.spec.tokens(self.student.model, batch.latents)
            asked = self.sampler.times(self.student.spec, tokens, steps)
            times = sorted({*asked}, reverse=True)
        for t, after in zip(times, [*times[1:], 0.0], strict=True):
            yield t, lambda out, x, by=after - t: x + by * out

    def _pruned(self, schedule: Schedule, batch: Batch, t: float) -> AbstractContextManager[None]:
        """Within: the student keeps what the schedule says, without what training adds."""
        student = self.student
        tokens, _ = student.roles.of(batch)
        known = self._table
        if known is None or known[0] is not schedule or known[1] != tokens:
            known = self._table = schedule, tokens, schedule.for_tokens(tokens)
        forward = GatedForward(
            counts=known[2].row(t),
            gates=lambda block: None,
            which=student.calls.passes,
        )
        return student.attachment.forwards.gated(forward)

    def _called(
        self,
        model: Any,
        batch: Batch,
        arguments: dict[str, Any],
        within: AbstractContextManager[None],
    ) -> Tensor:
        with within, self.student.autocast():
            output = model(**arguments)
        spec = self.student.spec
        tokens = spec.tokens_of(model, arguments) - batch.num_references
        return self.student.path.prediction(output, tokens)


class _Kept:
    """Counts which tokens are kept, by thirds of a sampling."""

    def __init__(self, student: Student, batch: Batch, steps: int) -> None:
        self.student, self.count, self.steps = student, len(batch.latents), steps
        self.tokens = student.spec.tokens(student.model, batch.latents)
        self.grid: tuple[int, ...] | None = None  # rows and columns, of videos frames before
        if batch.picture is not None:
            high, wide = batch.picture(batch.latents).shape[2:]
            side = math.isqrt(high * wide // self.tokens)
            self.grid = high // side, wide // side
        elif batch.latents.ndim == 4:
            self.grid = grid_of(student.model, batch.latents)
        elif batch.latents.ndim == 5:
            self.grid = self._grid_of_video(batch.latents)
        self.blocks = student.adapter.schedule.prunable_blocks
        parts = min(PARTS, steps)
        self.sums = torch.zeros(parts, self.count, self.tokens)
        self.forwards = [0] * parts

    def recorded(self) -> AbstractContextManager[None]:
        """Within: the next step's forward."""
        if self.grid is None:
            return nullcontext()
        return self._recorded(sum(self.forwards) * len(self.forwards) // self.steps)

    @contextmanager
    def _recorded(self, part: int) -> Iterator[None]:
        pruned: set[int] = set()

        def observe(block: int, chosen: Tensor) -> None:
            pruned.add(block)
            own = chosen[-self.count :].cpu()  # those with captions
            own = own[own < self.tokens].view(self.count, -1)  # references lie behind
            self.sums[part].scatter_add_(1, own, torch.ones(own.shape))

        forwards = self.student.attachment.forwards
        forwards.observer = observe
        try:
            yield
        finally:
            forwards.observer = None
        self.forwards[part] += 1
        self.sums[part] += len({*self.blocks} - pruned)

    def _grid_of_video(self, latents: Float[Tensor, "B ..."]) -> tuple[int, ...]:
        """Of tokens that are each of one frame."""
        frames, high, wide = latents.movedim(self.student.spec.frame_axis, 1).select(2, 0).shape[1:]
        side = math.isqrt(high * wide * frames // self.tokens)
        return (frames, high // side, wide // side) if side else (0,)

    def shares(self) -> Float[Tensor, "B parts h w"] | None:
        """Of the prunable blocks, in each part; of videos frames side by side."""
        if self.grid is None or math.prod(self.grid) != self.tokens:
            return None
        made = torch.tensor(self.forwards) * len(self.blocks)
        shares = self.sums / made.view(-1, 1, 1)
        return strip(shares.transpose(0, 1).reshape(self.count, len(made), *self.grid), 2)


def _at_quantiles(schedule: Schedule, strata: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Times that the steps of the schedule's law lie at."""
    law = schedule.law
    if not law.times:
        return law.at(strata)
    cuts = torch.tensor(law.times)
    places = strata * (len(cuts) - 1)
    low = places.long().clamp(max=len(cuts) - 2)
    return torch.lerp(cuts[low], cuts[low + 1], places - low)


def _noise(like: Tensor, *places: int) -> Tensor:
    """Noise of one sample, by these numbers alone."""
    generator = torch.Generator()
    reseed(generator, *places)
    return torch.randn(like.shape, generator=generator)
