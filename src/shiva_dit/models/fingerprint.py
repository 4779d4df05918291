"""Whether a model is still what it was: where its weights lie, how LoRAs are mixed, who watches.

Looked at before every replay, so a look must be cheap: what was found by walking the model is kept,
and walked again only when something has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from shiva_dit.models.low_rank import PARTS


class Fingerprint:
    """Of some modules and all inside them.

    Args:
        roots: A model, and what the adapter brings.
        on_change: Called with all modules when something has changed, and at first.
    """

    def __init__(
        self, roots: Sequence[nn.Module], on_change: Callable[[list[nn.Module]], None]
    ) -> None:
        self.roots, self.on_change = roots, on_change
        self._held: list[nn.Module] = []
        self._own: list[dict[str, Any]] = []
        self._filled: list[dict[str, Any]] = []
        self._hooks: list[dict[int, Any]] = []
        self._tensors: list[Tensor] = []
        self._layers: list[Any] = []
        self._seen: tuple[Any, ...] = ()
        self._value: Hashable = None

    def value(self) -> Hashable:
        """Equal as long as nothing has changed that a captured forward depends on.

        Weights changed in place, which a replay reads anew, are no change.
        """
        if not self._held or self._glance() != self._seen:
            self._walk()
        return self._value

    def _glance(self) -> tuple[Any, ...]:
        # Lists of identities: looking at the things themselves would take longer than a replay.
        return (
            list(map(id, chain.from_iterable(found.values() for found in self._filled))),
            list(map(len, self._hooks)),
            [id(own.get("forward")) for own in self._own],
            [id(own.get("_compiled_call_impl")) for own in self._own],
            [tensor.data_ptr() for tensor in self._tensors],
            list(map(_mixture, self._layers)),
        )

    def _walk(self) -> None:
        modules = list(chain.from_iterable(root.modules() for root in self.roots))
        self.on_change(modules)
        self._held = modules  # so that no identity is given to something new
        self._own = [module.__dict__ for module in modules]
        weights = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self._filled = [*weights, *(m._modules for m in modules if m._modules)]
        self._hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        found = chain.from_iterable(d.values() for d in weights)
        self._tensors = [tensor for tensor in found if tensor is not None]
        self._layers = [m for m in modules if isinstance(m.__dict__.get("scaling"), dict)]
        self._seen = self._glance()
        places = tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._tensors)
        beside = tuple(own[PARTS][0][0].data_ptr() for own in self._own if PARTS in own)
        self._value = hash((places, beside, tuple(self._seen[3]), tuple(self._seen[5])))


def _mixture(layer: Any) -> Hashable:
    """How a layer mixes LoRAs."""
    return (
        tuple(layer.scaling.items()),
        tuple(layer.active_adapters),
        layer.disable_adapters,
        tuple(layer.merged_adapters),
    )
