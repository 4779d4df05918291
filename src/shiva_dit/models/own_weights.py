"""The model's own weights in the place of an adapter's, within a forward: for its whole steps.

Unlike what `TunedBackbone.enable` does, this happens several times in a run: copies stay on the
device, and nothing is judged but what they were made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from shiva_dit.models.low_rank import Beside
from shiva_dit.models.weights import Merged, exactly, own_weight

Over = Mapping[int, list[Any]]
"""By id of a layer, PEFT's layers over it."""


class OwnWeights:
    """Copies of a model's own weights, where an adapter's stand.

    Args:
        model: The transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forget()

    def forget(self) -> None:
        """Let go of the copies."""
        self._made_for: list[Any] = []
        self._copies: list[Tensor] = []

    @contextmanager
    def in_place(
        self,
        merged: Sequence[Merged],
        beside: Sequence[Beside],
        over: Over,
        check: Callable[[Over], object],
    ) -> Iterator[None]:
        """Within: they stand in their places, and nothing is added beside layers.

        Args:
            merged: Where an adapter's weights are.
            beside: What lies beside layers.
            over: Layers of the user's LoRAs.
            check: Raises where the model's own weights can't be told any more.
        """
        with exactly(self.model):
            self._make(merged, over, check)
            stood = [entry.place.get() for entry in merged]
        held: list[Any] = []
        try:
            held += [each.hold() for each in beside]
            with exactly(self.model):
                for entry, own in zip(merged, self._copies, strict=True):
                    entry.place.set(own)
            yield
        finally:
            with exactly(self.model):
                for entry, tuned in zip(merged, stood, strict=True):
                    entry.place.set(tuned)
            for each, parts in zip(beside, held, strict=False):
                each.give_back(parts)

    def _make(self, merged: Sequence[Merged], over: Over, check: Callable[[Over], object]) -> None:
        """Make the copies, where there are none for the model as it is now."""
        layers = [over.get(id(entry.layer), []) for entry in merged]
        now: list[Any] = []
        for entry, each in zip(merged, layers, strict=True):
            stands = entry.place.get()
            now.append((stands.dtype, stands.device, entry.fused_now(each), entry.seen))
        if now != self._made_for:
            check(over)
            self._copies = [
                own_weight(entry, each) for entry, each in zip(merged, layers, strict=True)
            ]
            self._made_for = now
