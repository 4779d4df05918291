"""What is installed, and what documents say of records."""

from __future__ import annotations

import argparse

from shiva_dit.cli.options import Command, path


def add_commands(command: Command) -> None:
    """doctor, report."""
    command("doctor", _doctor, "say what is installed, and what it is enough for")

    add = command("report", _report, "write tables and plots of documents from records")
    add("documents", nargs="+", type=path, help="Markdown files")


def _doctor(options: argparse.Namespace) -> int:
    del options
    from shiva_dit.doctor import diagnosis

    text, is_whole = diagnosis()
    print(text)
    return 0 if is_whole else 1


def _report(options: argparse.Namespace) -> int:
    from shiva_dit.experiments.plots import draw_plots
    from shiva_dit.report.documents import write_tables

    for document in options.documents:
        plots = draw_plots(write_tables(document), document.parent)
        print(f"{document}: tables and {len(plots)} plots are up to date")
    return 0
