"""Tensors that may have been written since they were looked at.

Counts of writes and addresses tell it without reading anything; a sample of the values tells what
these don't, such as `parameter.data.copy_()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from weakref import ref

import torch
from torch import Tensor

_VERSION = attrgetter("_version")
SAMPLED = 1024
"""Values in a tensor's sample: some of every row of a weight that has fewer rows."""


class Written:
    """Counts of writes in place, where values lie, and a sample of them.

    Args:
        tensors: Whose values matter. None of them is kept from being freed elsewhere: what
            `tensor.data = other` lets go of goes.
        is_moving: Whether something brings the values to another place at each forward, so that
            only the counts can say anything.
    """

    def __init__(self, tensors: Sequence[Tensor], *, is_moving: bool = False) -> None:
        self._tensors = list(tensors)
        self._sample = self._sampled()
        self._numbers = [i for i, tensor in enumerate(tensors) if counts_writes(tensor)]
        self._counted = [tensors[i] for i in self._numbers]
        self._versions = list(map(_VERSION, self._counted))
        self._placed = [] if is_moving else list(tensors)
        self._addresses = list(map(Tensor.data_ptr, self._placed))
        # What is freed may leave its address to the next: a storage that died has been replaced.
        self._freed: list[object] = []
        self._storages = [ref(t.untyped_storage(), self._freed.append) for t in self._placed]

    def any(self) -> bool:
        """Whether there are some; a matter of microseconds for hundreds."""
        return (
            bool(self._freed)
            or list(map(_VERSION, self._counted)) != self._versions
            or list(map(Tensor.data_ptr, self._placed)) != self._addresses
        )

    def changed(self, *, reads: bool) -> list[int]:
        """Places of those that may have been written.

        Args:
            reads: Whether to look at the sample even if nothing else tells of a write; that waits
                for the device, once.
        """
        written = self.any()
        if (reads or written) and self._is_other():
            return list(range(len(self._tensors)))
        return self.which() if written else []

    @torch.no_grad()
    def _sampled(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in self._tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(_sample(tensor))
        return {key: _bits(torch.cat(samples)) for key, samples in alike.items()}

    def _is_other(self) -> bool:
        now, then = self._sampled(), self._sample
        return now.keys() != then.keys() or not all(torch.equal(now[k], then[k]) for k in now)

    def which(self) -> list[int]:
        """Their places among the tensors."""
        counts = zip(self._numbers, self._counted, self._versions, strict=True)
        written = {i for i, tensor, version in counts if tensor._version != version}
        lies = zip(self._placed, self._addresses, self._storages, strict=True)
        for i, (tensor, address, storage) in enumerate(lies):
            if tensor.data_ptr() != address or storage() is None:
                written.add(i)
        return sorted(written)


def _sample(tensor: Tensor) -> Tensor:
    """Values spread over a tensor, in an odd distance, which hits every column too."""
    many = tensor.numel()
    step = max(1, many // SAMPLED) | 1
    values = tensor if tensor.is_contiguous() else tensor.contiguous()
    return values.as_strided((-(-many // step),), (step,), values.storage_offset())


def counts_writes(tensor: Tensor) -> bool:
    """Whether writes are counted; those into a tensor that inference mode made are not."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Of as many bytes."""
CACHED, AT_ONCE = 2**17, 2**24
"""Words of 8 bytes that are mixed at once: on a processor as many as its cache holds; elsewhere so
many that the memory for it is bounded."""
ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""Without small factors or a pattern in their bits."""


def digests(tensors: Sequence[Tensor]) -> list[int]:
    """Of the values' bits, wherever they are: computed there, and read at once for each device."""
    found = [_digest(tensor) for tensor in tensors]
    read: dict[torch.device, list[int]] = {}
    for device in {each.device for each in found}:
        read[device] = torch.stack([d for d in found if d.device == device]).tolist()
    return [read[each.device].pop(0) for each in found]


def _bits(values: Tensor) -> Tensor:
    return values.view(INTEGERS[values.dtype.itemsize])


def _digest(values: Tensor) -> Tensor:
    """A sum of integers, whose order doesn't matter, of each word mixed with its place.

    (`torch.hash_tensor` is the exclusive or of all words: blind to rows that change places, and to
    a change of all signs.)
    """
    words = _bits(values.detach().contiguous()).flatten()
    if words.nbytes % 8:
        words = words.long()
    elif words.data_ptr() % 8:
        words = words.clone()
    words = words.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    many = CACHED if words.device.type == "cpu" else AT_ONCE
    for begin in range(0, len(words), many):
        part = words[begin : begin + many]
        mixed = torch.arange(begin, begin + len(part), device=part.device).mul_(ODD[0])
        mixed.bitwise_xor_(part).mul_(ODD[1])
        mixed ^= mixed >> 31
        total += mixed.mul_(ODD[2]).sum()
    return total
