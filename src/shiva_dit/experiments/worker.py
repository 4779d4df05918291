"""A process that runs contestants."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from shiva_dit.experiments.contest import compete
from shiva_dit.experiments.contestants import Diverged, Job, Outcome
from shiva_dit.signals import Stopped, stop


def start_worker(lock: Any) -> None:
    """Set up a process that runs contestants; the lock keeps progress bars apart.

    A terminal sends Ctrl-C to all processes: the one that gave out the work answers it, and ends
    these by SIGTERM, which takes their temporary files along. They end, too, when it is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # each process would repeat the libraries' notices


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def compete_in_worker(job: Job) -> list[Outcome | Diverged]:
    """As `compete`; a signal ends the process, which else would begin the next job.

    Between jobs it ends at once and says nothing: there is nothing to undo.
    """
    try:
        signal.signal(signal.SIGTERM, stop)
        return compete(job)
    except Stopped as stopped:
        os._exit(128 + stopped.number)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
