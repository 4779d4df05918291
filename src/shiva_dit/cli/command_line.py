"""The command line: a thin shell over the library."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from shiva_dit import __version__
from shiva_dit.cli import (
    benchmark,
    documents,
    experiments,
    export,
    pictures,
    publishing,
    quickstart,
    training,
)
from shiva_dit.cli.errors import FORESEEN, foreseen
from shiva_dit.cli.options import going_on
from shiva_dit.signals import Stopped, handled, stop


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `shiva-dit`; returns the exit status.

    The one boundary for what can go wrong: what is foreseen becomes one line and status 2, a signal
    128 + its number. Anything else is a bug, and keeps its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(words)
    # Its notices on optional image backends concern nobody here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with handled(stop):
            return options.run(options)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        print("\nshiva-dit: interrupted.", file=sys.stderr)
        if getattr(options, "goes_on", False):
            print(f"What is done is kept. {going_on(words)}", file=sys.stderr)
        return 128 + number
    except FORESEEN as error:
        line = foreseen(error)
        if line is None:
            raise
        print(f"shiva-dit: {' '.join(line.split())}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options in any order: argparse alone takes no `key=value` after an option."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if "=" not in word or word.startswith("-")]
    if rest and (wrong or not hasattr(options, "overrides")):
        sides = any(word.startswith(("--height", "--width")) for word in wrong)
        hint = " (pixels are set by --size WxH)" if sides and hasattr(options, "size") else ""
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}{hint}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shiva-dit", description=__doc__)
    parser.add_argument("--version", action="version", version=f"shiva-dit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str, goes_on: bool = False
    ) -> Callable[..., Any]:
        made = commands.add_parser(
            name,
            help=about,
            description=about,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        made.set_defaults(run=run, goes_on=goes_on)
        return made.add_argument

    groups = (
        quickstart,
        training,
        pictures,
        publishing,
        export,
        experiments,
        benchmark,
        documents,
    )
    for group in groups:
        group.add_commands(command)
    return parser
