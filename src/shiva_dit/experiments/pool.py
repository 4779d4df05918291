"""Contestants side by side, each in a process of one thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from shiva_dit.experiments.contest import Diverged, Job, Outcome, compete, start_worker


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[list[Outcome | Diverged]]:
    """Outcomes of each job, in the order of the jobs, as they come.

    Tiny models gain little from a second thread: two processes of one thread each get more done
    than one process of two.

    Args:
        jobs: What to run.
        workers: Processes at a time.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=start_worker, initargs=(context.RLock(),)
    ) as pool:
        yield from pool.map(compete, jobs)
