"""Tuned weights of an adapter on a model: merged where a layer is plain, beside it elsewhere.

No layer is wrapped or replaced. LoRAs of the user may come, go, be fused and unfused: they lie on
top.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiva_dit.core.flops import JointBlockShape, ModelFlops, SharedBlockShape
from shiva_dit.models.neighbours import below_offloading, reaches
from shiva_dit.models.places import (
    PLAIN,
    Fused,
    Place,
    are_streamed,
    fused_into,
    layer_at,
    linear_bias,
    linear_weight,
    links,
    own_parameters,
    projections_are_fused,
    refuse_projections,
    wrappers,
)
from shiva_dit.models.undo import Undo
from shiva_dit.models.watch import Watch

LORA_PREFIX = "transformer."
ADVICE = (
    "quantise, shard or fuse first and apply afterwards; or, for a LoRA or DoRA, apply with "
    "merge=False, which leaves the model's weights alone."
)


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


class Beside:
    """A LoRA beside a linear layer, or a DoRA, which scales what the layer gives as well.

    What it is made of is an attribute of the layer, and one function stands in the place of all
    such layers' forwards: compiled blocks then share a graph. (Dynamo looks at no torch hooks when
    it looks for a graph that fits, and would take one layer's for another's.)

    Args:
        layer: The layer; its weight is read once, for DoRA's norms.
        change: The LoRA or DoRA.
        path: The layer's in the model.
    """

    def __init__(self, layer: nn.Module, change: LowRank, path: str) -> None:
        self.layer, self.path = layer, path
        self.own: Parts = (change.a, change.b, None, None)
        if change.magnitude is not None:
            # f (W x + B A x) + b from W x + b: f times that, and what is then missing of b.
            weight, bias = linear_weight(layer, change.a.shape[1]), linear_bias(layer)
            factor = change.factor(weight + change.b.to(weight) @ change.a.to(weight))
            assert factor is not None
            shift = None if bias is None else (1 - factor) * bias.to(factor)
            self.own = (change.a, change.b, factor, shift)

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
            entries[PARTS], entries[BEFORE] = (parts, self.own), entries.get("forward")
            entries["forward"] = MethodType(forward_with_low_rank, self.layer)

    def take_off(self) -> None:
        """Leave the layer as it was; a wrapper that lies above then passes through."""
        with below_offloading(self.layer):
            entries = self.layer.__dict__
            before = entries.get(BEFORE)
            if getattr(entries.get("forward"), "__func__", None) is forward_with_low_rank:
                del entries["forward"]
                if before is not None:
                    entries["forward"] = before
                entries.pop(BEFORE, None)
            elif before is None:
                entries.pop(BEFORE, None)
            entries.pop(PARTS, None)


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
    a, b, factor, shift = parts
    return (
        a.to(like),
        b.to(like),
        None if factor is None else factor.to(like),
        None if shift is None else shift.to(like),
    )


class TunedBackbone:
    """The backbone weights that belong to an adapter, on a model.

    Args:
        model: The transformer.
        weights: Weights of the LoRA or of the whole state; empty for a frozen backbone.
        lora: PEFT's settings if the weights are a LoRA's or DoRA's (rank = alpha).
        merge: Whether a LoRA or DoRA is merged into layers that are plain. Where one isn't
            (quantised, sharded), it lies beside in any case.
    """

    def __init__(
        self,
        model: Any,
        weights: Mapping[str, Tensor],
        lora: Mapping[str, Any] | None,
        *,
        merge: bool = True,
    ) -> None:
        self.model, self.weights = model, weights
        self.is_low_rank, self.merge = lora is not None, merge
        self.enabled = False
        self._merged: list[Merged] = []
        self.beside: list[Beside] = []
        """What lies beside layers, and costs something of its own."""

    def put_on(self) -> None:
        """Look where everything goes on the model as it is now, and put it there.

        Raises:
            ValueError: If the weights don't fit the model, or can't be put on it as it is. Nothing
                has changed then.
        """
        self._merged, self.beside = [], []
        if self.is_low_rank:
            self._read_low_rank()
        elif self.weights:
            self._read_whole()
        for attention, path in self._attentions():
            refuse_projections(attention, path)
        self._refuse_fused_under_dora()
        self.enable(True)

    # --- what goes where --------------------------------------------------------------------

    def _read_low_rank(self) -> None:
        merge = self.merge and not are_streamed(self.model)
        for path, change in low_ranks(self.weights).items():
            layer = layer_at(self.model, path)
            if layer is None:
                raise ValueError(f"the LoRA weights don't fit this model: it has no layer {path}.")
            _check_shape(layer, change, path)
            place = Place(layer, "weight", f"{path}.weight")
            if merge and isinstance(layer, nn.Linear) and _is_mergeable(place):
                self._merged.append(Merged([place], [change]))
            else:
                self.beside.append(Beside(layer, change, path))

    def _read_whole(self) -> None:
        places, weights = own_parameters(self.model), self.weights
        odd = sorted(
            # IP-Adapters bring weights of their own, in the processors.
            name
            for name in places.keys() ^ weights.keys()
            if ".processor." not in name
        )
        if odd:
            raise ValueError(
                f"the tuned backbone doesn't fit this model: {odd[:3]} differ. Apply to the model "
                "that it was trained on, before its projections are fused or layers replaced."
            )
        streamed = are_streamed(self.model)
        by_layer: dict[int, tuple[list[Place], list[Whole]]] = {}
        for name in weights:
            place = places[name]
            parameter = place.parameter
            assert parameter is not None
            why = place.obstacle()
            if why is None and streamed:
                why = f"{name} is under group offloading with a stream, which keeps copies of it"
            if why is not None:
                raise ValueError(
                    f"a tuned backbone replaces the model's weights, and {why}: apply to the plain "
                    "model first, then quantise, shard or offload it."
                )
            if weights[name].shape != parameter.shape:
                raise ValueError(
                    f"the tuned backbone doesn't fit this model: {name} has shape "
                    f"{tuple(weights[name].shape)}, the model's is {tuple(parameter.shape)}."
                )
            of_layer = by_layer.setdefault(id(place.module), ([], []))
            of_layer[0].append(place)
            of_layer[1].append(Whole(weights[name]))
        self._merged = [Merged(*of_layer) for of_layer in by_layer.values()]

    def _touched(self) -> set[str]:
        """Paths of all layers that hold something of ours."""
        merged = {entry.places[0].path.rpartition(".")[0] for entry in self._merged}
        return merged | {beside.path for beside in self.beside}

    def _attentions(self) -> Iterator[tuple[nn.Module, str]]:
        """Modules above our layers whose projections may be fused, and their paths."""
        for path in sorted(self._touched()):
            above: list[str] = []
            for parent, name, _ in links(self.model, path):
                if hasattr(parent, "fuse_projections"):
                    yield parent, ".".join(above)
                above.append(name)

    def _scaled(self) -> dict[int, Beside]:
        """Layers that a DoRA beside them scales, by id."""
        return {id(beside.layer): beside for beside in self.beside if beside.scales}

    def _refuse_fused_under_dora(self) -> None:
        """A DoRA beside a layer would scale what the user has fused into that."""
        for number, layers in wrappers(self.model).items() if self._scaled() else ():
            if number in self._scaled() and fused_into(layers):
                path = self._scaled()[number].path
                raise ValueError(
                    f"a LoRA of yours is fused into {path}, and the adapter's DoRA beside that "
                    "would scale it: call unfuse_lora() first."
                )

    # --- on and off -------------------------------------------------------------------------

    def enable(self, enabled: bool) -> None:
        """Put the tuned weights on, or the model's own back: all of them or, if that fails, none.

        Raises:
            RuntimeError: If the weights were replaced or changed meanwhile, so that the model's
                own can't be given back.
        """
        if enabled == self.enabled:
            return
        over = wrappers(self.model) if self._merged else {}
        if enabled:
            self._check_reachable()
        else:
            self._check_untouched(over)
        undo = Undo()
        try:
            for entry in self._merged:
                _exchange(entry, over.get(id(entry.layer), []), enabled, undo)
            for beside in self.beside:
                undo.add(beside.take_off if enabled else beside.put_on)
                (beside.put_on if enabled else beside.take_off)()
        except BaseException:
            undo.run()
            raise
        self.enabled = enabled
        if not enabled:
            for entry in self._merged:
                entry.own, entry.base = [], []

    def restore(self) -> None:
        """Give the model its own weights back, to the bit, until `put_on`.

        Raises:
            RuntimeError: As `enable`. Nothing has changed then.
        """
        self.enable(False)
        self._merged, self.beside = [], []

    def _check_reachable(self) -> None:
        for entry in self._merged:
            for place in entry.places:
                why = place.obstacle()
                if why is not None:
                    raise RuntimeError(f"the adapter's weights can't be put on: {why}. {ADVICE}")

    def _check_untouched(self, over: Mapping[int, list[Any]]) -> None:
        """Raise unless the tuned weights still stand where they were put, and only there."""
        for attention, path in self._attentions() if self._merged else ():
            if projections_are_fused(attention):
                raise RuntimeError(
                    f"the projections of {path} were fused while the adapter's weights were on "
                    "them, so that they hold copies of these: call unfuse_qkv_projections() first."
                )
        for entry in self._merged:
            why = _changed(entry, over.get(id(entry.layer), []))
            if why is not None:
                raise RuntimeError(
                    f"the model's own weights can't be given back: {why} since the adapter's were "
                    "put in their place (by training, load_state_dict, or a LoRA that was fused "
                    f"and then unloaded). Undo that, or load the model again. Next time {ADVICE}"
                )

    # --- what must hold ---------------------------------------------------------------------

    def watch(self, watch: Watch) -> None:
        """Have it checked before each forward that all of this still acts.

        A judge raises a RuntimeError where it doesn't.
        """
        for entry in self._merged:
            judge = partial(self._judge_weights, entry)
            watch.add(entry.layer.__dict__, "_hf_hook", judge)
            for place in entry.places:
                watch.add(*place.entry(), judge)
        for path in sorted(self._touched()):
            for parent, name, child in links(self.model, path):
                watch.add(parent._modules, name, partial(self._judge_link, parent, name, child))
        for beside in self.beside:
            judge = partial(self._judge_forward, beside)
            watch.add(beside.layer.__dict__, "forward", judge)
        scaled = self._scaled()
        for number, layers in wrappers(self.model).items() if scaled else ():
            if number in scaled:
                for layer in layers:
                    watch.add_length(layer.merged_adapters, self._refuse_fused_under_dora)
        for attention, path in self._attentions():
            judge = partial(self._judge_projections, attention, path)
            watch.add(attention.__dict__, "fused_projections", judge)
            watch.add(attention.__dict__, "processor", judge)
            watch.add(attention._modules, "processor", judge)

    def _judge_weights(self, entry: Merged) -> None:
        why = _changed(entry, wrappers(self.model).get(id(entry.layer), []))
        if self.enabled and why is not None and not why.endswith("sharded"):
            raise RuntimeError(f"{why} while the adapter's weights were on it: {ADVICE}")

    def _judge_forward(self, beside: Beside) -> None:
        forward = beside.layer.__dict__.get("forward")
        if self.enabled and not reaches(forward, forward_with_low_rank):
            raise RuntimeError(
                f"the layer {beside.path} runs past the adapter's LoRA: its forward was replaced, "
                "or put back by something that was on the model before. Call shiva_dit.apply again."
            )

    def _judge_link(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        now = parent._modules.get(name)
        while now is not None and now is not child:
            now = now._modules.get("base_layer")
        if self.enabled and now is None:
            raise RuntimeError(
                f"the layer {name!r} of a {type(parent).__name__} was replaced while the adapter's "
                f"weights were on it: {ADVICE}"
            )

    def _judge_projections(self, module: nn.Module, path: str) -> None:
        if self.enabled and projections_are_fused(module):
            raise RuntimeError(
                f"the projections of {path} were fused while the adapter's "
                "weights were on them: call unfuse_qkv_projections() first."
            )

    @property
    def is_merged(self) -> bool:
        """Whether weights of the model are replaced."""
        return bool(self._merged)

    def flops(self, model_flops: ModelFlops, counts: Sequence[int], block_paths: list[str]) -> int:
        """FLOPs of what lies beside layers, of one forward of one sample.

        Args:
            model_flops: Of the model; its blocks know how many text tokens they see.
            counts: k of every block.
            block_paths: The blocks' names in the model.
        """
        index_of = {path: index for index, path in enumerate(block_paths)}
        text = max(getattr(shape, "text_tokens", 0) for shape in model_flops.blocks)
        total = 0
        for beside in self.beside:
            block = index_of.get(_block_of(beside.path))
            if block is None:  # refiners of text or latents, side blocks
                image = model_flops.num_tokens
                is_text = not re.match(r"noise_refiner|vace_blocks", beside.path)
                rows = text if is_text or CROSS.search(beside.path) else image
            else:
                rows = _rows(beside.path, model_flops.blocks[block], counts[block])
            total += beside.flops(rows)
        return total


TEXT = re.compile(r"\.(add_[qkv]_proj|to_add_out|ff_context|txt_\w+)(\.|$)")
CROSS = re.compile(r"\.attn2\.to_[kv]$")


def _block_of(path: str) -> str:
    """The first two parts of a layer's path: blocks lie in lists of the model's."""
    return ".".join(path.split(".")[:2])


def _rows(path: str, shape: Any, image: int) -> int:
    """How many tokens a layer of a block sees."""
    text: int = getattr(shape, "text_tokens", 0)
    if isinstance(shape, SharedBlockShape):
        return image + text
    crosses = not isinstance(shape, JointBlockShape) and CROSS.search(path)
    return text if crosses or TEXT.search(path) else image


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
        found[path] = LowRank(a, b, magnitude)
    return found


def _check_shape(layer: nn.Module, change: LowRank, path: str) -> None:
    width, out = change.a.shape[1], change.b.shape[0]
    found = getattr(layer, "in_features", width), getattr(layer, "out_features", out)
    if found != (width, out):
        raise ValueError(
            f"the LoRA weights don't fit this model: {path} maps {found[0]} to {found[1]} values, "
            f"the LoRA {width} to {out}."
        )


def _is_mergeable(place: Place) -> bool:
    """Whether a LoRA can be merged here without more rounding than the weight's own."""
    return place.obstacle() is None and place.get().dtype in PLAIN


def _exchange(entry: Merged, layers: list[Any], enabled: bool, undo: Undo) -> None:
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


def _changed(entry: Merged, layers: list[Any]) -> str | None:
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
