"""The command line: a thin shell over the library."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `shiva-dit`; returns the exit status."""
    options = _parser().parse_args(arguments)
    # Its notices on optional image backends concern nobody here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return options.run(options)
    except (ValueError, FloatingPointError) as error:
        print(f"shiva-dit: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shiva-dit", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quickstart = commands.add_parser(
        "quickstart", help="train an adapter on real digits, watch it, compare it, in minutes"
    )
    quickstart.add_argument("--keep", type=float, default=0.4, help="mean share of tokens kept")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of training and sampling")
    quickstart.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds")
    quickstart.add_argument("--out", type=Path, default=Path("quickstart"), help="folder to fill")
    quickstart.add_argument("--count", type=int, default=300, help="images judged per method")
    quickstart.add_argument("--all-controls", action="store_true", help="all controls, ~3x longer")
    quickstart.add_argument("--workers", type=int, default=2, help="methods run at a time")
    quickstart.add_argument("overrides", nargs="*", metavar="key=value", help="for the recipe")
    quickstart.set_defaults(run=_quickstart)

    train = commands.add_parser("train", help="train an adapter by a recipe")
    train.add_argument("recipe", type=Path, help="a TOML file, such as recipes/digits.toml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument("--threads", type=int, default=None, help="threads; all cores by default")
    train.set_defaults(run=_train)

    base = commands.add_parser("train-base", help="train the digits backbone and judge")
    base.add_argument("--recipe", type=Path, default=None, help="recipes/digits-base.toml")
    base.add_argument("--out", type=Path, required=True, help="folder for weights and record")
    base.add_argument("--threads", type=int, default=1, help="threads; results depend on it")
    base.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    base.set_defaults(run=_train_base)

    report = commands.add_parser("report", help="write the tables of documents from records")
    report.add_argument("documents", nargs="+", type=Path, help="Markdown files")
    report.set_defaults(run=_report)
    return parser


def _use_threads(count: int | None) -> None:
    import torch

    if count is not None:
        torch.set_num_threads(count)


def _quickstart(options: argparse.Namespace) -> int:
    from shiva_dit.demo.quickstart import run_quickstart

    print(
        run_quickstart(
            keep_ratio=options.keep,
            seeds=range(options.seed, options.seed + options.seeds),
            all_controls=options.all_controls,
            count=options.count,
            workers=options.workers,
            out=options.out,
            overrides=options.overrides,
        )
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    _use_threads(options.threads)
    from shiva_dit.config import load_recipe
    from shiva_dit.demo.tasks import load_task
    from shiva_dit.training.recipe import TrainConfig
    from shiva_dit.training.run import train
    from shiva_dit.training.trainer import TrainingInterrupted

    recipe = load_recipe(TrainConfig, options.recipe, options.overrides)
    model, data = load_task(recipe.task)
    again = " ".join(["shiva-dit train", str(options.recipe), *options.overrides, "--resume"])
    try:
        print(train(recipe, model, data, resume=options.resume))
    except TrainingInterrupted as stop:
        print(f"\nInterrupted; saved in {stop.checkpoint}. Go on with:\n  {again}", file=sys.stderr)
        return 130
    return 0


def _train_base(options: argparse.Namespace) -> int:
    _use_threads(options.threads)
    from shiva_dit.config import from_dict, load_recipe, with_overrides
    from shiva_dit.demo.base import BaseTraining, train_base
    from shiva_dit.demo.digits import DigitsTask

    if options.recipe is None:
        config = from_dict(BaseTraining, with_overrides({}, options.overrides))
    else:
        config = load_recipe(BaseTraining, options.recipe, options.overrides)
    record = train_base(DigitsTask(), config, options.out)
    print(
        f"{options.out}: judge right on {record['judge_accuracy_on_held_out']:.1%} of unseen reals"
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    from shiva_dit.report import render

    for document in options.documents:
        text = document.read_text(encoding="utf-8")
        document.write_text(render(text, document.parent), encoding="utf-8")
        print(f"{document}: tables are up to date")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
