"""Several processes that train one adapter together (`accelerate launch`, `torchrun`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information
from torch import Tensor

T = TypeVar("T")
AT_ONCE = 2**24
"""Elements that are summed in one message."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of a run; alone by default."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def mine(self, jobs: int) -> range:
        """Which of so many jobs are this process's."""
        return range(self.rank, jobs, self.count)

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes into each tensor, bit for bit the same on all of them."""
        if self.count == 1:
            return
        chunk: list[Tensor] = []
        for place, tensor in enumerate(tensors):
            chunk.append(tensor)
            after = tensors[place + 1] if place + 1 < len(tensors) else None
            size = sum(map(Tensor.numel, chunk))
            if after is None or after.dtype != tensor.dtype or size + after.numel() > AT_ONCE:
                flat = torch.cat([one.flatten() for one in chunk])
                dist.all_reduce(flat)
                sizes = [one.numel() for one in chunk]
                for one, found in zip(chunk, flat.split(sizes), strict=True):
                    one.copy_(found.view_as(one))
                chunk = []

    def any(self, says: bool, device: torch.device) -> bool:
        """Whether one of the processes says so: then all know it."""
        if self.count == 1:
            return says
        found = torch.tensor([float(says)], device=device)
        self.sum([found])
        return bool(found)

    def wait(self) -> None:
        """Until all have come this far."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, work: Callable[[], T]) -> T:
        """What the first process makes, on all; a failure ends them all, and it alone says why.

        Raises:
            Exception: Whatever the work raises, in the first process.
            SystemExit: In the others, then.
        """
        if self.count == 1:
            return work()
        found: list[tuple[T] | None] = [None]
        if self.is_first:
            try:
                found = [(work(),)]
            finally:
                dist.broadcast_object_list(found)
        else:
            dist.broadcast_object_list(found)
        if found[0] is None:
            raise SystemExit(2)
        return found[0][0]


ALONE = Processes()


def check_parts(processes: int, parts: int, *, shard: bool) -> None:
    """Raise unless so many processes can share the parts of a batch.

    Raises:
        ValueError: Says what to set.
    """
    if processes > parts:
        raise ValueError(
            f"each process needs a part of a batch: micro_batches must be at least {processes}, "
            f"their number, got {parts}."
        )
    if shard and parts % processes:
        raise ValueError(
            f"processes that share weights run alike: with shard, micro_batches must be a multiple "
            f"of {processes}, their number, got {parts}."
        )


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """Within: this process and its launcher's others are one group, each on a device of its own.

    Args:
        device: Where training runs; "cuda" becomes the process's own card.

    Returns:
        The processes, and this one's device. Started by no launcher it is alone.

    Raises:
        ValueError: If MPI started them for other devices than CPUs, which accelerate doesn't join.
    """
    if get_cpu_distributed_information().world_size == 1:
        yield ALONE, device
        return
    if device != "cpu" and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "processes that MPI started train together on CPUs alone: start those of --device "
            f"{device} by torchrun."
        )
    state = PartialState(cpu=device == "cpu")
    own = str(state.device) if device in ("cuda", "xpu", "npu") else device
    try:
        yield Processes(state.process_index, state.num_processes), own
    finally:
        state.destroy_process_group()


def one_of_several_asked(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` was asked for several processes, and this is all that it started.

    It does so wherever it isn't told `--multi_gpu`, as with `--cpu`: then it names where they would
    meet, and gives this one no number among them.
    """
    launched = {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= environment.keys()
    return launched and get_cpu_distributed_information().world_size == 1
