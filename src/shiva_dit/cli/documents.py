"""What is installed, and what documents say of records."""

from __future__ import annotations

import argparse

from shiva_dit.cli.options import Command, path, positive


def add_commands(command: Command) -> None:
    """doctor, report, fetch, page."""
    command("doctor", _doctor, "say what is installed, and what it is enough for")

    add = command("report", _report, "write tables and plots of documents from records")
    add("documents", nargs="+", type=path, help="Markdown files")

    add = command("fetch", _fetch, "get the pictures of a demo task that don't ship")
    add("task", choices=["emoji"], help="emoji: 1,855 drawn pictures with names (MIT)")
    add("--out", type=path, help="folder to fill; by default where the task looks for them")
    add("--packages", type=path, help="folder with the packages' files, instead of npm")

    add = command("page", _page, "a training, comparison, frontier or pictures on one HTML page")
    add("folder", type=path, help="that train, compare, frontier or generate filled")
    add("--dense", type=path, help="the unpruned model's pictures, beside generated ones")
    add("--out", type=path, help="the page; page.html in the folder by default")
    add("--pictures", type=positive, default=6, help="of each arm")


def _fetch(options: argparse.Namespace) -> int:
    from shiva_dit.demo.emoji_pictures import fetch, place

    out = options.out or place()
    print(f"{fetch(out, options.packages)} pictures are in {out}.")
    return 0


def _page(options: argparse.Namespace) -> int:
    from shiva_dit.experiments.page.content import written
    from shiva_dit.experiments.page.folders import page_of
    from shiva_dit.provenance import write_atomically

    out = options.out or options.folder / "page.html"
    text = written(page_of(options.folder, options.dense, count=options.pictures))
    write_atomically(out, lambda file: file.write_text(text, encoding="utf-8"))
    print(out)
    return 0


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
