"""How many bytes of tensors are alive, and were at most; of real tensors or of fake ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within: what operators make is counted until it is freed.

    Storages are counted, so views cost nothing. What an operator needs within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes made within and alive."""
        self.most = 0
        """The largest value of `now`."""
        self._known: dict[int, Any] = {}

    def __enter__(self) -> LiveBytes:
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {id(s) for s in _storages(tree_leaves((args, kwargs)))}
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return _some_value(args[0])
        made = func(*args, **(kwargs or {}))
        for storage in _storages(tree_leaves(made)):
            if id(storage) not in given and id(storage) not in self._known:
                self._add(storage)
        return made

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each counted once."""
    return sum({id(s): s.nbytes() for s in _storages(tensors)}.values())


def bytes_alive() -> int:
    """Bytes of all tensors with values that this process holds at present."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return held_bytes(each for each in found if not _is_fake(each))


def _storages(leaves: Iterable[Any]) -> Iterator[Any]:
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if is_traceable_wrapper_subclass(leaf):
                names, _ = leaf.__tensor_flatten__()
                yield from _storages(getattr(leaf, name) for name in names)
            else:
                yield leaf.untyped_storage()


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _some_value(tensor: Tensor) -> Any:
    return (tensor.dtype.is_floating_point and 0.5) or 1
