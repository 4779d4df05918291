"""The model's own weights of a layer and the adapter's, one for the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiva_dit.models.low_rank import LowRank
from shiva_dit.models.places import Fused, Place, fused_into, odd_fused, with_fused
from shiva_dit.models.rounding import PATHS, Path, is_rounding, paths_between, rounded
from shiva_dit.models.undo import Undo
from shiva_dit.models.written import digests


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
    seen: int = 0
    """Digest of what stood there when it was last found to be right."""
    paths: list[Path] | None = None
    """By which dtypes it may have gone since, with the whole model; None if it is what it was."""
    path: Path = ()
    """The way that its own weight has to go likewise."""

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
        stands = with_fused(tuned, now)
        entry.mark, entry.seen = digests([tuned, stands]) if now else digests([tuned]) * 2
        place.set(stands)
    else:
        place.set(own_weight(entry, layers))


def own_weight(entry: Merged, layers: list[Any]) -> Tensor:
    """The model's own weight while the other is there: in its dtype, on its device.

    With the LoRAs that the user has fused at present.
    """
    assert entry.own is not None
    assert entry.base is not None
    before, now = entry.place.get(), entry.fused_now(layers)
    had = tuple((layer, names) for layer, names in entry.fused if layer in layers)
    own = entry.own if now == had else with_fused(entry.base.to(before), now)
    return rounded(own, entry.path).to(before)


def what_changed(entry: Merged, layers: list[Any]) -> str | None:
    """What is no longer the tuned weight that was put in its place, or None.

    With the LoRAs in it that the user has fused at present, up to the rounding of fusing and
    unfusing, and of the whole model.
    """
    place, base = entry.place, entry.base
    why = place.obstacle()
    if why is not None or base is None:
        return why
    found, now = place.get(), entry.fused_now(layers)
    odd = odd_fused(now)
    if odd is not None:
        return f"{place.path} has a {odd} of yours fused into it"
    entry.paths = None
    if not now and digests([found]) == [entry.mark]:
        return None
    expected = with_fused(entry.change.merged(base.to(found.device)), now)
    entry.paths = [] if now else paths_between(expected, found)
    if entry.paths:
        return None
    coarse = max(torch.finfo(dtype).eps for dtype in (found.dtype, base.dtype))
    return None if is_rounding(found, expected, coarse) else f"{place.path} was changed"


def settle_paths(entries: Sequence[Merged]) -> None:
    """Which way the model was rounded, after `what_changed` of all: one for all, if one fits all.

    What the tuned weights don't show, such as a zero that is one in 16 bits, the others do.
    """
    shown = [set(entry.paths) for entry in entries if entry.paths]
    common = set.intersection(*shown) if shown else set()
    way = min(common, key=PATHS.index, default=())
    for entry in entries:
        if entry.paths:
            entry.path = way if common else entry.paths[0]
        else:
            kept = entry.paths is None and way in paths_between(
                entry.place.get(), entry.place.get()
            )
            entry.path = way if kept else ()


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """Within: tensors that are made may be trained through later, and no product is rounded.

    Whatever mode this runs in: inference mode, or autocast.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        yield
