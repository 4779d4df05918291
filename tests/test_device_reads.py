"""No code of ours reads a value from the device in a forward, but once at a run's first step."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import shiva_dit
from shiva_dit.models.attach import attachment_of
from tests import families, running, tiny
from tests.matrix import sampled

OURS = str(Path(shiva_dit.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
READS = {
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "cpu",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "tolist",
    "unique",
    "unique_consecutive",
    "unique_dim",
}
"""What waits for a device to say what is in a tensor, as Python calls it and as it is run."""
COUNTS = [[64, 5, 30, 17], [64, 33, 2, 48], [64, 63, 20, 9]]


def reader() -> str | None:
    """The innermost function outside of torch, if it is ours."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, __file__, "<")):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(OURS):
        return None
    return frame.f_code.co_qualname


class Called(TorchFunctionMode):
    """Notes reads by their Python names: on a CPU some of them run no operator."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS and (ours := reader()):
            self.found.append(f"{func.__name__} in {ours}")
        return func(*args, **(kwargs or {}))


class Run(TorchDispatchMode):
    """Notes reads that other functions end in, such as choosing by a mask."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS and (ours := reader()):
            self.found.append(f"{name} in {ours}")
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[list[str]]:
    """Within: reads of a tensor's values by code of ours."""
    found: list[str] = []
    with Run(found), Called(found):
        yield found


def attached(name: str, rows: int) -> Any:
    model = families.made(name)
    schedule = families.schedule(model, COUNTS[:rows])
    shiva_dit.apply(model, tiny.adapter(model, schedule))
    return model


def test_reads_of_ours_are_counted() -> None:
    """A schedule of several bins on a bare model: the time must be read."""
    model = attached("sd3", 3)
    with reads() as found:
        tiny.run(model, tiny.inputs())
    assert found
    assert all("Counts." in read for read in found)


@sampled("name")
def test_a_forward_reads_nothing(name: str) -> None:
    """With one row of counts no time is needed, and nothing else ever is."""
    model, given = attached(name, 1), families.arguments(name)
    if name == "ideogram4":  # what its rows are is read once for all steps
        with torch.no_grad():
            families.run(model, given)
    with torch.no_grad(), reads() as found:
        families.run(model, given)
        with shiva_dit.guided(model, passes="both"):
            families.run(model, given)
    assert found == []


@sampled("name", running.ONE_OF_EACH)
def test_a_pipeline_reads_once_in_a_run(name: str) -> None:
    """By its scheduler's clock, as on a device: at the first step, whatever guides it."""
    pipe = running.build(name)
    model = pipe.transformer
    shiva_dit.apply(pipe, tiny.adapter(model, families.schedule(model, COUNTS)))
    attachment = attachment_of(model)
    assert attachment is not None
    clock = attachment.counts.clock
    assert clock is not None
    clock.on_cpu = True
    with reads() as found:
        running.call(name, pipe)
    # Of what has arrived; and the table of the run's steps is made of the host's own numbers.
    host = "Clock._check", "ratios_from_logits", "anchor_shift", "listed_times"
    found = [read for read in found if not any(name in read for name in host)]
    assert found
    assert all(re.search(r" (Counts|SchedulerTimes|Clock)\.", read) for read in found), found
    assert clock.reads == 1


def test_times_of_a_pipeline_that_are_equal_by_token_are_not_read() -> None:
    pipe = running.build("WanPipeline")
    pipe.register_to_config(expand_timesteps=True)
    model = pipe.transformer
    shiva_dit.apply(pipe, tiny.adapter(model, families.schedule(model, COUNTS[:1])))
    with reads() as found:
        running.call("WanPipeline", pipe)
    assert found == []
