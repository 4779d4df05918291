"""The model's own weights of a layer and the adapter's, one for the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiva_dit.models.low_rank import LowRank
from shiva_dit.models.places import Fused, Place, fused_into, odd_fused, with_fused
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
    """A weight of the model, and what stands in its place."""

    place: Place
    change: LowRank | Whole
    own: Tensor | None = None
    """The model's own while the other is there; on the host."""
    base: Tensor | None = None
    """The same without LoRAs of the user that were fused into it."""
    fused: Fused = ()
    """These LoRAs."""
    mark: int = 0
    """Digest of what was put in its place, without any LoRA of the user."""

    @property
    def layer(self) -> nn.Module:
        """The layer."""
        return self.place.module

    def fused_now(self, layers: list[Any]) -> Fused:
        """What the user has fused into this weight at present: PEFT's layers over it, and names."""
        return fused_into(layers) if self.place.name == "weight" else ()


def exchange_weight(entry: Merged, layers: list[Any], enabled: bool, undo: Undo) -> None:
    """One weight for the other, with the LoRAs in it that the user has fused at present."""
    place, now = entry.place, entry.fused_now(layers)
    before = place.get()
    kept, device = before.detach().to("cpu"), before.device  # no second model on the device
    undo.add(lambda: place.set(kept.to(device)))
    if enabled:
        base = with_fused(before, now, sign=-1)
        tuned = entry.change.merged(base)
        if not torch.isfinite(tuned.float()).all():
            raise ValueError(
                f"the adapter's {place.path} has values that aren't finite as {tuned.dtype}: run "
                "the model in bfloat16 or float32, and see that the adapter is whole."
            )
        entry.own, entry.fused = kept, now
        entry.base = base.to("cpu") if now else kept
        entry.mark = _digest(tuned)
        place.set(with_fused(tuned, now))
    else:
        assert entry.own is not None
        assert entry.base is not None
        had = tuple((layer, names) for layer, names in entry.fused if layer in layers)
        own = entry.own if now == had else with_fused(entry.base.to(before), now)
        place.set(own.to(before))


def what_changed(entry: Merged, layers: list[Any]) -> str | None:
    """What is no longer the tuned weight that was put in its place, or None.

    With the LoRAs in it that the user has fused at present, up to the rounding of fusing and
    unfusing: some 0.3 of the dtype's epsilon.
    """
    place, base = entry.place, entry.base
    why = place.obstacle()
    if why is not None or base is None:
        return why
    found, now = place.get(), entry.fused_now(layers)
    odd = odd_fused(now)
    if odd is not None:
        return f"{place.path} has a {odd} of yours fused into it"
    if not now and _digest(found) == entry.mark:
        return None
    expected = with_fused(entry.change.merged(base.to(found.device)), now).float()
    coarse = max(torch.finfo(dtype).eps for dtype in (found.dtype, base.dtype))
    off = torch.linalg.vector_norm(found.float() - expected)
    near = bool(off <= max(0.5 * coarse, 1e-5) * torch.linalg.vector_norm(expected))
    return None if near else f"{place.path} was changed"


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Of as many bytes."""


def _digest(values: Tensor) -> int:
    """Of the values' bits, wherever they are."""
    bits = values.contiguous().view(INTEGERS[values.dtype.itemsize])
    return int(torch.hash_tensor(bits).view(torch.int64))
