"""A LoRA or DoRA on one linear layer: in its weight, or beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiva_dit.models.neighbours import below_offloading, reaches
from shiva_dit.models.places import PLAIN, linear_bias, linear_weight

LORA_PREFIX = "transformer."


@dataclass(frozen=True, slots=True)
class LowRank:
    """What LoRA (and DoRA) do to one linear layer."""

    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r)."""
    magnitude: Tensor | None
    """Norms of the rows, (out,), for DoRA."""

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with this in it, computed in float32 or wider."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        total = wide + self.b.to(wide) @ self.a.to(wide)
        factor = self.factor(total)
        return (total if factor is None else factor[:, None] * total).to(weight.dtype)

    def factor(self, total: Tensor) -> Tensor | None:
        """DoRA's factor of each row, of the weights with the low rank in them."""
        if self.magnitude is None:
            return None
        return self.magnitude.to(total) / torch.linalg.vector_norm(total, dim=1)


def low_ranks(weights: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """LoRA's and DoRA's parts by the path of their layer.

    Args:
        weights: As PEFT and diffusers name them, "transformer.PATH.lora_A.weight" and so on.

    Raises:
        ValueError: If a part is missing or unknown, or two don't fit each other.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        path, dot, kind = name.removeprefix(LORA_PREFIX).partition(".lora_")
        kind = kind.removesuffix(".weight")
        if not dot or kind not in ("A", "B", "magnitude_vector"):
            raise ValueError(f"the LoRA weights don't fit this model: {name} is no part of a LoRA.")
        parts.setdefault(path, {})[kind] = value
    found = {}
    has_magnitudes = any("magnitude_vector" in part for part in parts.values())
    for path, part in parts.items():
        missing = {"A", "B", *(["magnitude_vector"] if has_magnitudes else [])} - part.keys()
        if missing:
            raise ValueError(
                f"the LoRA weights don't fit this model: {path} has no lora_{missing.pop()}."
            )
        a, b, magnitude = part["A"], part["B"], part.get("magnitude_vector")
        rows = () if magnitude is None else tuple(magnitude.shape)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or rows not in ((), b.shape[:1]):
            raise ValueError(
                f"the LoRA weights don't fit this model: {path} has parts of shapes "
                f"{tuple(a.shape)}, {tuple(b.shape)}{f' and {rows}' if rows else ''}."
            )
        copies = (None if each is None else each.clone() for each in (a, b, magnitude))
        found[path] = LowRank(*copies)  # type: ignore[arg-type]
    return found


class Beside:
    """A LoRA beside a linear layer, or a DoRA, which scales what the layer gives as well.

    What it is made of is an attribute of the layer, and one function stands in the place of all
    such layers' forwards: compiled blocks then share a graph. (Dynamo looks at no torch hooks when
    it looks for a graph that fits, and would run one without this, or with another's.)

    Args:
        layer: The layer; its weight is read once, for DoRA's norms.
        change: The LoRA or DoRA.
        path: The layer's in the model.
    """

    def __init__(self, layer: nn.Module, change: LowRank, path: str) -> None:
        self.layer, self.change, self.path = layer, change, path
        self.own: Parts = (change.a, change.b, None, None)
        self.seen: int | None = None
        """Digest of a weight, changed since, whose norms were found to be the same."""
        factor = self._factor()
        if factor is not None:
            # f (W x + B A x) + b from W x + b: f times that, and what is then missing of b.
            bias = linear_bias(layer)
            if not torch.isfinite(factor).all():
                raise ValueError(
                    f"the adapter's DoRA of {path} meets rows of the model's weight that it can't "
                    "scale (zeros): is it the model that it was trained on?"
                )
            shift = None if bias is None else (1 - factor) * bias.to(factor)
            self.own = (change.a, change.b, factor, shift)

    def _factor(self) -> Tensor | None:
        """DoRA's factor of each row, of the layer's weight as it is now."""
        if self.change.magnitude is None:
            return None
        a, b = self.change.a, self.change.b
        weight = linear_weight(self.layer, a.shape[1])
        return self.change.factor(weight + b.to(weight) @ a.to(weight))

    def fits(self) -> bool:
        """Whether DoRA's factors are still those of the layer's weight, up to its rounding."""
        now, then = self._factor(), self.own[2]
        if now is None or then is None:
            return True
        weight = self.layer._parameters.get("weight")
        eps = 0.0 if weight is None else torch.finfo(weight.dtype).eps
        return torch.allclose(now, then.to(now), rtol=max(eps / 4, 2e-3), atol=0.0)

    @property
    def scales(self) -> bool:
        """Whether what the layer gives is multiplied."""
        return self.own[2] is not None

    def flops(self, rows: int) -> int:
        """FLOPs for so many tokens."""
        return 2 * rows * (self.own[0].numel() + self.own[1].numel())

    def put_on(self) -> None:
        """Let it act."""
        self.take_off()  # where that broke off after all
        with below_offloading(self.layer):
            entries = self.layer.__dict__
            parts = self.own
            weight = self.layer._parameters.get("weight")
            if weight is not None and weight.dtype in PLAIN and not weight.is_meta:
                parts = _cast(self.own, weight)
            entries[PARTS] = (parts, self.own)
            if not reaches(entries.get("forward"), forward_with_low_rank):
                if "forward" in entries:
                    entries[BEFORE] = entries["forward"]
                entries["forward"] = MethodType(forward_with_low_rank, self.layer)

    def take_off(self) -> None:
        """Leave the layer as it was; a wrapper that lies above then passes through."""
        with below_offloading(self.layer):
            entries = self.layer.__dict__
            if getattr(entries.get("forward"), "__func__", None) is forward_with_low_rank:
                del entries["forward"]
                before = entries.pop(BEFORE, None)
                if before is not None:
                    entries["forward"] = before
            entries.pop(PARTS, None)

    def hold(self) -> Any:
        """Let it not act for a while, its forward staying where it is; what `give_back` takes."""
        return self.layer.__dict__.pop(PARTS, None)

    def give_back(self, parts: Any) -> None:
        """Let it act again."""
        if parts is not None:
            self.layer.__dict__[PARTS] = parts


Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A (r, in), B (out, r); for DoRA the factor of each row and what that leaves out of the bias."""
PARTS, BEFORE = "_shiva_dit_low_rank", "_shiva_dit_forward"


def forward_with_low_rank(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of a linear layer's forward: what that gives, with a LoRA or DoRA in it."""
    entries: Any = layer
    before = entries._shiva_dit_forward if hasattr(layer, BEFORE) else None
    output: Tensor = (
        type(layer).forward(layer, *args, **kwargs) if before is None else before(*args, **kwargs)
    )
    if not hasattr(layer, PARTS):  # taken off below a wrapper that stays
        return output
    parts, own = entries._shiva_dit_low_rank
    x = args[0] if args else next(iter(kwargs.values()))
    if parts[0].dtype != x.dtype or parts[0].device != x.device:
        parts = _cast(own, x)
        entries._shiva_dit_low_rank = (parts, own)
    a, b, factor, shift = parts
    total = output + F.linear(F.linear(x, a), b).to(output.dtype)
    if factor is not None:
        total = factor.to(output.dtype) * total
    return total if shift is None else total + shift.to(output.dtype)


def _cast(parts: Parts, like: Tensor) -> Parts:
    if torch.is_inference_mode_enabled():  # what is kept may be trained through later
        with torch.inference_mode(False):
            return _cast(parts, torch.empty((), dtype=like.dtype, device=like.device))
    a, b, factor, shift = parts
    return (
        a.to(like),
        b.to(like),
        None if factor is None else factor.to(like),
        None if shift is None else shift.to(like),
    )
