"""The model's own weights of a layer and the adapter's, one for the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shiva_dit.models.low_rank import LowRank
from shiva_dit.models.places import Fused, Place, fused_into
from shiva_dit.models.undo import Undo


@dataclass(frozen=True, slots=True)
class Whole:
    """A weight that was tuned as a whole."""

    tensor: Tensor

    def merged(self, weight: Tensor) -> Tensor:
        """In the place of the model's own, in its dtype and on its device."""
        return self.tensor.to(weight, copy=True)


@dataclass(slots=True)
class Merged:
    """Weights of one layer of the model, and what stands in their place."""

    places: list[Place]
    changes: list[LowRank] | list[Whole]
    """What becomes of the weight in each place."""
    own: list[Tensor] = field(default_factory=list)
    """The model's own while others are there; on the host."""
    base: list[Tensor] = field(default_factory=list)
    """The same without LoRAs of the user that were fused into them."""
    fused: Fused = ()
    """These LoRAs."""

    @property
    def layer(self) -> nn.Module:
        """The layer."""
        return self.places[0].module


def exchange_weights(entry: Merged, layers: list[Any], enabled: bool, undo: Undo) -> None:
    """A layer's weights for the others, with what the user has fused into them at present."""
    places, now = entry.places, fused_into(layers)
    before = [place.get() for place in places]
    kept = [values.detach().to("cpu") for values in before]  # no second model on the device
    device = before[0].device
    undo.add(lambda: _set(places, [values.to(device) for values in kept], now, layers))
    if enabled:
        entry.own, entry.fused = kept, now
        if now:
            _show(places, before, now, (), layers)
        base = [place.get() for place in places]
        entry.base = [values.to("cpu") for values in base] if now else kept
        tuned = [
            _merge(change, values, place)
            for change, values, place in zip(entry.changes, base, places, strict=True)
        ]
        _show(places, tuned, (), now, layers)
    else:
        own = [mine.to(values) for mine, values in zip(entry.own, before, strict=True)]
        fused = tuple((layer, names) for layer, names in entry.fused if layer in layers)
        _show(places, own, fused, now, layers)


def _merge(change: LowRank | Whole, values: Tensor, place: Place) -> Tensor:
    tuned = change.merged(values)
    if not torch.isfinite(tuned.float()).all():
        raise ValueError(
            f"the adapter's {place.path} holds values that {tuned.dtype} can't: run the model in "
            "bfloat16 or float32."
        )
    return tuned


def _show(
    places: list[Place], values: list[Tensor], has: Fused, now: Fused, layers: list[Any]
) -> None:
    """Put values in, with the user's LoRAs fused into them as they are `now`.

    Args:
        places: Where to.
        values: They have the LoRAs of `has` in them.
        has: PEFT's layers and names.
        now: The same.
        layers: All of PEFT's layers over this one.
    """
    if has == now:
        _set(places, values, now, layers)
        return
    _set(places, [each.clone() for each in values], has, layers)
    for layer, _ in has:
        layer.unmerge()
    for layer, names in now:
        layer.merge(adapter_names=list(names))


def _set(places: list[Place], values: list[Tensor], fused: Fused, layers: list[Any]) -> None:
    """Values, and PEFT's note of which LoRAs are in them."""
    for place, each in zip(places, values, strict=True):
        place.set(each)
    names = {id(layer): found for layer, found in fused}
    for layer in layers:
        layer.merged_adapters[:] = names.get(id(layer), ())


def what_changed(entry: Merged, layers: list[Any]) -> str | None:
    """What is no longer the tuned weight that was put in its place, or None.

    Up to the rounding of a LoRA that was fused and unfused, some 0.3 of the dtype's epsilon. With
    a LoRA of the user fused into it at present nothing can be said.
    """
    for place in entry.places:
        why = place.obstacle()
        if why is not None:
            return why
    if fused_into(layers):
        return None
    for place, change, base in zip(entry.places, entry.changes, entry.base, strict=False):
        found = place.get()
        expected = change.merged(base.to(found.device)).float()
        coarse = max(torch.finfo(dtype).eps for dtype in (found.dtype, base.dtype))
        off = torch.linalg.vector_norm(found.float() - expected)
        if not off <= max(0.5 * coarse, 1e-5) * torch.linalg.vector_norm(expected):
            return f"{place.path} was changed"
    return None
