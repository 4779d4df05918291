"""The benchmark: one dense model against its pruned selves, in one process, and its record."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.api import state
from shiva_dit.api.apply import apply
from shiva_dit.benchmark.config import DTYPES, BenchmarkConfig
from shiva_dit.benchmark.operators import time_operators
from shiva_dit.benchmark.parts import time_parts
from shiva_dit.benchmark.records import record_what
from shiva_dit.benchmark.timing import Samples, interleaved, peak_mib
from shiva_dit.benchmark.workloads import Grid, Workload, workload
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_flops
from shiva_dit.provenance import provenance

DENSE, FORCED, ADAPTER = "dense", "all tokens, selected", "adapter"


def run_benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Time a dense model against its pruned selves.

    All arms are one model in one process: the adapter is switched off for the dense one, so that
    weights, attention kernel and compile mode are the same. The arms take turns.

    Args:
        config: What is timed.

    Returns:
        A plain record: per arm all times in ms per forward, speed-up, the speed-up that FLOPs alone
        would give, efficiency (their quotient), memory, and what the selection's parts take.

    Raises:
        ValueError: If the model is unknown, the size no whole tokens, the adapter another model's,
            or the config one of `run_pair` or `run_step_benchmark`.
    """
    if config.beside is not None or config.train is not None:
        raise ValueError("`beside` is timed by run_pair, `train` by run_step_benchmark.")
    with made_bench(config) as bench, torch.no_grad():
        return bench.run()


@contextmanager
def made_bench(
    config: BenchmarkConfig, change: Callable[[Any], None] | None = None
) -> Iterator[Bench]:
    """Within: the model with its adapter and all arms.

    Args:
        config: What is timed.
        change: What else is done to the model, before the adapter is put on.
    """
    load = workload(config.model)
    grid = load.grid(config.size)
    device = torch.device(config.device)
    model = load.build(grid, DTYPES[config.dtype], device)
    if change is not None:
        change(model)
    adapter = _adapter(config, model, device)
    apply(
        model,
        adapter,
        multiple=config.multiple,
        segments=config.segments,
        select_every=config.select_every,
    )
    attachment = attachment_of(model)
    assert attachment is not None
    try:
        yield Bench(config, load, grid, attachment)
    finally:
        state.remove(model)


def _adapter(config: BenchmarkConfig, model: Any, device: torch.device) -> ShivaAdapter:
    if config.adapter is not None:
        return ShivaAdapter.from_pretrained(config.adapter).to(device)
    torch.manual_seed(1)
    return ShivaAdapter(ShivaConfig.for_model(model)).to(device)


class Bench:
    """One model with its arms."""

    def __init__(
        self, config: BenchmarkConfig, load: Workload, grid: Grid, attachment: Attachment
    ) -> None:
        self.config, self.attachment = config, attachment
        self.model: Any = attachment.model
        self.device = torch.device(config.device)
        self.num_tokens = load.num_tokens(grid)
        self.text_tokens = load.text_tokens if config.text_tokens is None else config.text_tokens
        self.inputs = load.inputs(
            self.model, config.batch, grid, self.text_tokens, DTYPES[config.dtype]
        )
        self.schedules = self._schedules()
        self.times = self._times()

    def _schedules(self) -> dict[str, Schedule]:
        adapter: ShivaAdapter = self.attachment.adapter
        config = adapter.config
        uniform = partial(
            Schedule.uniform, num_blocks=config.num_blocks, full_blocks=config.full_blocks
        )
        found = {FORCED: uniform(1.0)}
        for keep in self.config.keep:
            if self.config.adapter is None:
                found[f"keep {keep:g}"] = uniform(keep)
            else:
                # For even steps, as the forwards that are timed are.
                found[f"keep {keep:g}"] = adapter.policy.schedule(keep, config.num_bins)
        if self.config.adapter is not None:
            found[ADAPTER] = adapter.schedule
        return found

    @contextmanager
    def arm(self, name: str) -> Iterator[None]:
        """Within: the model runs as this arm."""
        attachment = self.attachment
        if name == DENSE:
            with state.disabled(self.model):
                yield
            return
        attachment.counts.use(self.schedules[name])
        attachment.forwards.always_select = name == FORCED
        try:
            yield
        finally:
            attachment.forwards.always_select = False

    def forwards(self, steps: list[float]) -> None:
        """One forward at each of these times."""
        spec = self.attachment.spec
        for t in steps:
            timestep = spec.timestep_at(torch.full((self.config.batch,), t, device=self.device))
            self.model(**self.inputs, **spec.times(timestep), return_dict=False)

    def calls(self) -> dict[str, Callable[[], None]]:
        """A call per arm, of as many forwards as `times`; compiles as the config says."""
        if self.config.mode != "eager":
            state.compile(self.model)
        if self.config.mode == "graphs":
            state.cuda_graphs(self.model)

        def call(name: str) -> None:
            with self.arm(name):
                self.forwards(self.times)

        return {name: partial(call, name) for name in (DENSE, *self.schedules)}

    def run(self) -> dict[str, Any]:
        """Warm up, time, and put together."""
        config, calls = self.config, self.calls()
        names, steps = list(calls), self.times
        samples = timed(calls, config, forwards=len(steps))
        peaks = {name: peak_mib(call, self.device) for name, call in calls.items()}
        rows = [self._row(name, samples[name], samples[DENSE], peaks[name]) for name in names]
        for row in rows:
            row["operators_ms"] = self._operators(row["arm"])
            if row["arm"] not in (DENSE, FORCED):
                row["parts_ms"] = self._parts(row["arm"])
        return {
            "what": f"speed-{config.model}",
            "config": asdict(config),
            "model": dict(self.model.config),
            "image_tokens": self.num_tokens,
            "text_tokens": self.text_tokens,
            "forwards_per_time": len(steps),
            "pruned_blocks": len(self.schedules[FORCED].prunable_blocks),
            "blocks": self.schedules[FORCED].num_blocks,
            "break_even": self._break_even(rows[1]["speed_up"]),
            "rows": rows,
            "provenance": provenance(),
        }

    def _break_even(self, forced: float) -> float | None:
        """The equal keep ratio below which pruning pays, if any does.

        The selection is taken to cost what it costs with all tokens kept, and the blocks' time to
        go with their FLOPs.
        """
        overhead = max(1.0 / forced - 1.0, 0.0)
        dense = model_flops(self.model, self.num_tokens, self.text_tokens)
        full = self.schedules[FORCED].full_blocks
        for k in range(self.num_tokens, 0, -max(1, self.num_tokens // 200)):
            counts = [self.num_tokens if block in full else k for block in range(len(dense.blocks))]
            if dense.pruned(counts) / dense.dense() + overhead < 1.0:
                return k / self.num_tokens
        return None

    def _times(self) -> list[float]:
        """Times of the forwards that are timed together, noisiest first.

        All of a sampling's steps; on a CPU, where one forward is long enough to be timed, no more
        than meet each row of the tables.
        """
        count = self.config.forwards
        if count is None:
            bins = max(self._table(name).num_bins for name in self.schedules)
            count = bins if self.device.type == "cpu" else max(bins, self.config.steps)
        return [(place + 0.5) / count for place in reversed(range(count))]

    def _row(
        self, name: str, samples: Samples, dense: Samples, peak: float | None
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "arm": name,
            **asdict(samples),
            "memory_peak_mib": peak,
            "images_per_second": self.config.batch / (samples.median_ms / 1000) / self.config.steps,
            "speed_up": dense.over(samples),
            "speed_up_cpu": dense.cpu_over(samples),
            # Steps that the dense model does in the time of so many pruned ones.
            "dense_steps_at_equal_time": self.config.steps * samples.over(dense),
        }
        flops = model_flops(self.model, self.num_tokens, self.text_tokens).dense()
        row["flops"], row["keep_ratio"], row["ideal_speed_up"] = flops, 1.0, 1.0
        if name not in (DENSE, FORCED):
            table = self._table(name)
            counts = [table.row(t) for t in self.times]
            each = [
                pruned_flops(self.attachment, self.num_tokens, self.text_tokens, c) for c in counts
            ]
            row["flops"] = round(sum(each) / len(each))
            row["keep_ratio"] = table.mean_keep_ratio_at(self.times)
            row["distinct_rows"] = len(set(counts))
            row["ideal_speed_up"] = flops / row["flops"]
        row["efficiency"] = row["speed_up"] / row["ideal_speed_up"]
        return row

    def _table(self, name: str) -> Any:
        config = self.config
        return self.schedules[name].for_tokens(
            self.num_tokens, multiple=config.multiple, segments=config.segments
        )

    def _operators(self, name: str) -> dict[str, float]:
        """Where an arm's time goes, by forwards spread over t: a profile of many takes long."""
        some = self.times[:: math.ceil(len(self.times) / 4)]
        with self.arm(name):
            watched = min(3, self.config.repeats)
            return time_operators(partial(self.forwards, some), len(some), repeats=watched)

    def _parts(self, name: str) -> dict[str, float]:
        """What the parts of the selection take in one forward, each by itself, in ms."""
        table = self._table(name)
        kept = [k for t in self.times for k in table.row(t) if k < self.num_tokens]
        blocks = len(kept) / len(self.times)
        with self.arm(name):
            found = time_parts(
                self.attachment,
                partial(self.forwards, self.times[:1]),
                k=round(sum(kept) / len(kept)),
                repeats=self.config.repeats,
                compiled=self.config.mode != "eager",
            )
        made = {part: blocks * ms for part, ms in found.items()}
        every = self.attachment.counts.select_every
        made["router"] *= math.ceil(blocks / every) / blocks
        return made


def timed(
    calls: Mapping[str, Callable[[], None]], config: BenchmarkConfig, *, forwards: int
) -> dict[str, Samples]:
    """Warm up, then time in turn: per forward, of which each call makes some."""
    # The second round meets every symbolic size once more; graphs are captured in it.
    for _ in range(3 if config.mode == "graphs" else 2):
        for call in tqdm(calls.values(), "warm up", leave=False, disable=not sys.stderr.isatty()):
            call()
    gc.collect()
    samples = interleaved(calls, repeats=config.repeats, device=torch.device(config.device))
    for found in samples.values():
        found.latency_ms = [value / forwards for value in found.latency_ms]
        if found.cpu_ms is not None:
            found.cpu_ms = [value / forwards for value in found.cpu_ms]
    return samples


def run_scaling(config: BenchmarkConfig, sides: Sequence[int]) -> dict[str, Any]:
    """The benchmark at several sizes: what a forward costs, and what pruning is worth, by N.

    Args:
        config: What is timed; its own size doesn't count.
        sides: Width and height of squares, in pixels.
    """
    if not sides:
        raise ValueError("a scaling needs at least one size.")
    records = [run_benchmark(replace(config, size=(side, side))) for side in sides]
    return {
        "what": record_what(config, sides),
        "config": asdict(config),
        "sizes": records,
        "provenance": provenance(),
    }
