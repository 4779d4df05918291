"""The quickstart."""

from __future__ import annotations

import argparse
from pathlib import Path

from shiva_dit.cli.options import Command, bounded, path, positive


def add_commands(command: Command) -> None:
    """Quickstart."""
    add = command(
        "quickstart", _quickstart, "train an adapter on real digits, watch it, compare it"
    )
    add("--keep", type=float, default=0.4, help="mean share of tokens kept")
    add("--seed", type=int, default=0, help="seed of training and sampling")
    add("--seeds", type=positive, default=1, help="repeat with so many seeds")
    add("--out", type=path, default=Path("quickstart"), help="folder to fill")
    add("--count", type=positive, default=300, help="images judged per method")
    add("--all-controls", action="store_true", help="all controls, about 3 times longer")
    add("--workers", type=positive, default=2, help="methods run at a time")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")


def _quickstart(options: argparse.Namespace) -> int:
    from shiva_dit.experiments.quickstart import run_quickstart
    from shiva_dit.experiments.served import Serving

    print(
        run_quickstart(
            keep_ratio=options.keep,
            seeds=range(options.seed, options.seed + options.seeds),
            all_controls=options.all_controls,
            count=options.count,
            workers=bounded("--workers", options.workers),
            out=options.out,
            serving=Serving(),
            overrides=options.overrides,
        )
    )
    return 0
