"""Processes of one run as a launcher starts them, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 300
"""Seconds that a run may take."""
PATIENCE = 10
"""Seconds in which the others end by themselves once one has failed."""


def server() -> Any:
    """What forks processes that have imported what all tests' workers need, once for all tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.workers"])
    return context


def launched(count: int, work: Callable[[], Any], *words: str, fails: bool = False) -> str:
    """What so many processes printed.

    Args:
        count: How many.
        work: What each does, a function of a module; it may return an exit status.
        words: Its command line, without the program.
        fails: Whether one of them is to fail; then the others are ended, as launchers do.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder, str(rank)) for rank in range(count)]
        ranks = []
        for rank, text in enumerate(texts):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(server().Process(target=_rank, args=(work, words, own, text)))
            ranks[-1].start()
        _watch(ranks)
        said = "".join(text.read_text(encoding="utf-8") for text in texts)
    assert any(rank.exitcode for rank in ranks) == fails, said
    return said


def _rank(
    work: Callable[[], Any], words: tuple[str, ...], environment: dict[str, str], text: Path
) -> None:
    os.environ.update(environment)
    with text.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [sys.argv[0], *words]
    sys.exit(work())


def _watch(ranks: list[Any]) -> None:
    """Wait for all, or for one that fails and then, for a while, for the others.

    Raises:
        TimeoutError: If none fails, and not all end.
    """
    until = time.monotonic() + LIMIT
    has_failed = False
    while any(rank.exitcode is None for rank in ranks) and time.monotonic() < until:
        if not has_failed and any(rank.exitcode for rank in ranks):
            has_failed = True
            until = time.monotonic() + PATIENCE
        time.sleep(0.02)
    hangs = not has_failed and any(rank.exitcode is None for rank in ranks)
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
        rank.join()
    if hangs:
        raise TimeoutError(f"not all of {len(ranks)} processes ended within {LIMIT} s")
