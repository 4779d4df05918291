"""Contestants side by side, each in a process of one thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from shiva_dit.experiments.contestants import Diverged, Job, Outcome
from shiva_dit.experiments.worker import compete_in_worker, start_worker
from shiva_dit.signals import undisturbed


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[list[Outcome | Diverged]]:
    """Outcomes of each job, in the order of the jobs, as they come.

    Tiny models gain little from a second thread: two processes of one thread each get more done
    than one process of two.

    Args:
        jobs: What to run.
        workers: Processes at a time.

    Raises:
        ValueError: If one of them was killed.
        Exception: What a job raised; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        max(1, min(workers, len(jobs))),
        context,
        initializer=start_worker,
        initargs=(context.RLock(),),
    ) as pool:
        # No future is cancelled: on Python 3.11 a broken pool hangs where one was.
        futures = [pool.submit(compete_in_worker, job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed, most likely for want of memory: use fewer --workers."
            ) from error
        except BaseException:
            # Else the pool would wait for the runs in hand, and begin those in the queue.
            with undisturbed():
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
            raise
