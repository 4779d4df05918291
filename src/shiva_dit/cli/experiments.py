"""Comparisons on the demo tasks, and estimators held against the truth."""

from __future__ import annotations

import argparse
from pathlib import Path

from shiva_dit.cli.options import Command, bounded, path, positive, size, use_threads


def add_commands(command: Command) -> None:
    """compare, merge, inspect."""
    add = command("compare", _compare, "train and judge many recipes side by side", goes_on=True)
    add("recipe", type=path, help="such as recipes/compare-estimators-digits.toml")
    add("--out", type=path, help="folder to fill or to go on in; runs/<what> by default")
    add("--workers", type=positive, default=2, help="recipes at a time")
    add("--retry-failed", action="store_true", help="run arms that diverged again")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")

    add = command("frontier", _frontier, "quality of many methods for their cost", goes_on=True)
    add("recipe", type=path, help="such as recipes/frontier-scenes.toml")
    add("--out", type=path, help="folder to fill or to go on in; runs/<what> by default")
    add("--threads", type=positive, default=1, help="threads; times depend on it")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")

    add = command("choose", _choose, "steps, keep ratio and cache for a model and a budget")
    add("--pipeline", help="folder or Hub id of a pipeline")
    add("--task", help="a demo task instead")
    add("--adapter", required=True, help='folder of its adapter; "shipped" for a demo task')
    add("--prompts", type=path, help="a text file, one prompt in a line")
    add("--budget", type=float, required=True, help="share of the unpruned model's time")
    add("--steps", type=positive, default=28, help="of the unpruned model")
    add("--guidance", type=float, default=1.0, help="guidance scale; 1 is none")
    add("--keep", type=float, nargs="+", default=[], help="keep ratios; those it was trained for")
    add("--sampler", default="euler_diffusers", help="euler, unipc or dpmpp; the pipeline's own")
    add("--count", type=positive, default=32, help="prompts used")
    add("--batch", type=positive, default=1, help="pictures per call")
    add("--size", type=size, help="of the pictures in pixels, such as 1024 or 1024x768")
    add("--device", default="cpu", help="where it runs, such as cuda")
    add("--threads", type=positive, help="threads; all cores by default")

    add = command("merge", _merge, "one record from several whose seeds ran apart")
    add("records", nargs="+", type=path, help="record.json of one comparison, seeds apart")
    add("--out", type=path, required=True, help="the record to write")

    add = command("inspect", _inspect, "hold estimators against the truth")
    add(
        "what",
        choices=["flips", "captions", "synthetic"],
        help="the flip test; whether tokens follow the caption; the paper's figure 6",
    )
    add("--task", default="digits", help="demo task; for models of your own: shiva_dit.inspection")
    add("--adapter", type=path, help="what selects; the shipped adapter by default")
    add("--random", type=float, metavar="KEEP", help="select by chance at this keep ratio instead")
    add("--out", type=path, help="folder for record and plot; runs/<what> by default")
    add("overrides", nargs="*", default=[], metavar="key=value", help="images, tokens, loss, seed")


def _compare(options: argparse.Namespace) -> int:
    from shiva_dit.config import load_recipe
    from shiva_dit.experiments.compare import Comparison, run_comparison
    from shiva_dit.report.comparison import comparison_rows
    from shiva_dit.report.layout import plain_rows

    comparison = load_recipe(Comparison, options.recipe, options.overrides)
    out = options.out or Path("runs") / comparison.what
    record = run_comparison(
        comparison,
        out,
        workers=bounded("--workers", options.workers),
        retry_failed=options.retry_failed,
    )
    print(f"\n{plain_rows(comparison_rows(record))}\n\nRecord: {out / 'record.json'}")
    return 0


def _frontier(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.config import load_recipe
    from shiva_dit.experiments.frontier.config import Frontier
    from shiva_dit.experiments.frontier.run import run_frontier
    from shiva_dit.experiments.frontier.sheet import draw_sheet
    from shiva_dit.experiments.plots import draw_front
    from shiva_dit.report.frontier import budget_rows
    from shiva_dit.report.layout import plain_rows

    frontier = load_recipe(Frontier, options.recipe, options.overrides)
    out = options.out or Path("runs") / frontier.what
    record = run_frontier(frontier, out)
    draw_front(record, out / "front.png")
    draw_sheet(frontier, record, out, out / "sheet.png")
    for guidance in frontier.guidance:
        print(f"\nGuidance {guidance:g}\n{plain_rows(budget_rows(record, guidance))}")
    print(f"\nRecord: {out / 'record.json'}\nPlot:   {out / 'front.png'}")
    print(f"Sheet:  {out / 'sheet.png'}")
    return 0


def _choose(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.config import from_dict
    from shiva_dit.demo.base import shipped_adapter
    from shiva_dit.demo.tasks import load_task
    from shiva_dit.experiments.frontier.choose import (
        Wish,
        choose,
        frontier_of,
        keep_ratios_of,
        said,
    )
    from shiva_dit.experiments.frontier.config import SHIPPED
    from shiva_dit.experiments.frontier.source import source_of

    names = ("adapter", "budget", "steps", "guidance", "sampler")
    if options.adapter == SHIPPED and options.task is not None:
        options.adapter = str(shipped_adapter(load_task(options.task)))
    keep = options.keep or keep_ratios_of(options.adapter)
    wish = from_dict(Wish, {n: getattr(options, n) for n in names} | {"keep_ratios": keep})
    frontier = frontier_of(
        wish,
        task=options.task,
        pipeline=options.pipeline,
        prompts=options.prompts,
        size=None if options.size is None else options.size[::-1],
        device=options.device,
        count=options.count,
    )
    found = choose(source_of(frontier), wish, options.count, batch=options.batch)
    print(f"\n{said(found, wish)}")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from shiva_dit.experiments.merging import merge_records
    from shiva_dit.ownership import check_folder
    from shiva_dit.provenance import read_as, read_json, write_json
    from shiva_dit.report.comparison import comparison_rows
    from shiva_dit.report.layout import plain_rows

    if options.out.exists():
        raise ValueError(f"{options.out} is there already: write another file.")
    check_folder(options.out.parent)
    records = [read_json(path) for path in options.records]
    with read_as("records of comparisons", *options.records):
        merged = merge_records(records)
    write_json(options.out, merged)
    print(f"{plain_rows(comparison_rows(merged))}\n\nRecord: {options.out}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from shiva_dit.ownership import check_folder

    out = options.out or Path("runs") / options.what
    check_folder(out)
    if options.what == "synthetic":
        from shiva_dit.experiments.synthetic import run_synthetic

        print(run_synthetic(out))
        return 0
    if options.what == "captions":
        from shiva_dit.experiments.caption_swap import run_caption_swap

        print(run_caption_swap(options.task, options.adapter, out))
        return 0
    from shiva_dit.config import from_dict, with_overrides
    from shiva_dit.experiments.flips import run_flips
    from shiva_dit.inspection import FlipConfig

    config = from_dict(FlipConfig, with_overrides({}, options.overrides))
    print(run_flips(options.task, options.adapter, options.random, config, out))
    return 0
