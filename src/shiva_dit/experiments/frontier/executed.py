"""FLOPs as they are executed: of whatever is on a model, and whatever it skips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from shiva_dit.models.skeleton import CPU_ATTENTION, attention_flops


def _on_cpu(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    del out_val
    return attention_flops(*(each.shape for each in args[:3]), **kwargs)


FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, CPU_ATTENTION: _on_cpu}
"""FLOPs of each operator, by its arguments and what it gave."""


class _Counting(TorchDispatchMode):
    """Sums up FLOPs.

    torch's own counter walks the tree of modules to tell them apart, and never comes back where a
    cache hangs the model into itself while it runs (cache-dit 1.5.3).
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operator; composite ones are counted by what they are made of."""
        del types
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Within: the FLOPs of each of a model's forwards are appended to the list."""
    counts: list[int] = []
    running: list[_Counting] = []

    def begin(*_: object) -> None:
        running.append(_Counting())
        running[-1].__enter__()

    def end(*_: object) -> None:
        counter = running.pop()
        counter.__exit__(None, None, None)
        counts.append(counter.total)

    handles = [
        model.register_forward_pre_hook(begin, prepend=True),
        model.register_forward_hook(end, always_call=True),
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
