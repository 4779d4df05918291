"""Timing."""

from __future__ import annotations

import argparse
from pathlib import Path

from shiva_dit.cli.options import Command, path, positive, size, use_threads


def add_commands(command: Command) -> None:
    """Benchmark."""
    add = command("benchmark", _benchmark, "time a dense transformer against its pruned selves")
    add("model", help="such as sd35-medium, flux-dev, sd3-small; a wrong name lists all")
    add("--keep", type=float, nargs="*", default=[0.8, 0.6, 0.4], help="mean share of tokens kept")
    add("--adapter", help="folder or Hub id, timed with its schedule; else equal ratios")
    add("--size", type=size, metavar="WxH", help="pixels, such as 1024 or 832x480")
    add("--text-tokens", type=positive, help="those of the model's pipelines by default")
    add("--batch", type=positive, default=1, help="samples per forward")
    add("--steps", type=positive, default=28, help="steps of a sampling")
    add(
        "--forwards",
        type=positive,
        help="forwards timed together; by default what the schedules need",
    )
    add("--multiple", type=positive, help="tokens kept are a multiple of this")
    add("--segments", type=positive, help="at most so many different rows of a schedule")
    add("--select-every", type=positive, help="so many blocks in a row share their scores")
    add("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    add("--mode", choices=["eager", "compiled", "graphs"], default="compiled", help="of all arms")
    add("--scaling", type=positive, nargs="+", metavar="SIDE", help="time several sizes, in pixels")
    add("--train", choices=["full", "lora"], help="time training steps, which tune these weights")
    add(
        "--beside",
        choices=["compile", "int8", "mag_cache"],
        help="time every arm without and with this (int8: pip install torchao)",
    )
    add("--repeats", type=positive, default=15, help="rounds; each times every arm once")
    add("--device", default="cpu", help="such as cuda")
    add("--threads", type=positive, help="threads on a CPU; all cores by default")
    add("--out", type=path, default=Path("runs"), help="folder for the record")


def _benchmark(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.benchmark.config import BenchmarkConfig
    from shiva_dit.benchmark.pairs import run_pair
    from shiva_dit.benchmark.records import check_record_place, save_record
    from shiva_dit.benchmark.run import run_benchmark, run_scaling
    from shiva_dit.benchmark.steps import run_step_benchmark
    from shiva_dit.benchmark.tables import timing_note, timing_rows
    from shiva_dit.benchmark.timing import keep_memory
    from shiva_dit.demo.base import usable_device
    from shiva_dit.report.layout import plain_rows

    usable_device(options.device)
    memory_kept = keep_memory()
    config = BenchmarkConfig(
        model=options.model,
        keep=tuple(options.keep),
        adapter=options.adapter,
        size=options.size,
        text_tokens=options.text_tokens,
        batch=options.batch,
        steps=options.steps,
        forwards=options.forwards,
        multiple=options.multiple,
        segments=options.segments,
        select_every=options.select_every,
        dtype=options.dtype,
        mode="eager" if options.train else options.mode,
        train=options.train,
        beside=options.beside,
        repeats=options.repeats,
        device=options.device,
    )
    if options.scaling and (config.train or config.beside):
        raise ValueError("--scaling, --train and --beside: one of them at a time.")
    check_record_place(config, options.scaling or (), options.out)
    if options.scaling:
        record = run_scaling(config, options.scaling)
    elif config.train:
        record = run_step_benchmark(config)
    else:
        record = run_pair(config) if config.beside else run_benchmark(config)
    path = save_record({**record, "memory_kept": memory_kept}, options.out)
    print(f"{plain_rows(timing_rows(record))}\n\n{timing_note(record)}\n\nRecord: {path}")
    return 0
