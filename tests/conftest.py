"""Settings of all tests: no result may depend on the processor, its cores or how busy it is."""

import gc
import multiprocessing
import os

# Tests ask for equal bits of the same operation on the same shapes alone. On Intel processors MKL
# keeps even that only if told so: otherwise its last bits depend on where an array lies in memory.
# It is read at the first product; other processors and libraries need nothing of the kind.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch
from hypothesis import HealthCheck, settings

import tests.shapes  # noqa: F401  # before shiva_dit is imported
from tests.ranks import server

# Tiny models are about ten times faster on one thread than on many. Torch reads OMP_NUM_THREADS by
# itself: whoever sets it gets as many.
if not os.environ.get("OMP_NUM_THREADS"):
    torch.set_num_threads(1)

# No deadline, and no complaint that examples are drawn slowly: both depend on what else runs.
settings.register_profile(
    "shiva_dit", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shiva_dit")

# What a disk holds after the machine's own end no test can see, and to wait for it takes long.
# Tests that count steps at the file system (`faults.py`) count these as others.
os.fsync = lambda handle: None

THREADS = torch.get_num_threads()


def pytest_collection_finish() -> None:
    """What is imported stays: to search it for garbage again and again took a tenth of the time."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Commands set the number of threads of their process, which is that of the next test too."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def quick_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from a process that has imported what they need, once for all tests.

    They, and this process, look at few held-out images.
    """
    forks = server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forks)
    monkeypatch.setattr("shiva_dit.experiments.held_out.NUM_TIMES", 4)
    monkeypatch.setattr("shiva_dit.experiments.held_out.IMAGES_PER_TIME", 8)
