"""Where tuned weights go on a model as it is: into a layer, or beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from shiva_dit.models.low_rank import Beside, LowRank, low_ranks
from shiva_dit.models.parallelism import is_part, why_not_beside
from shiva_dit.models.places import PLAIN, Place, kept_copies, layer_at, own_parameters
from shiva_dit.models.weights import Merged, Whole


def place_low_rank(
    model: nn.Module, weights: Mapping[str, Tensor], merge: bool
) -> tuple[list[Merged], list[Beside]]:
    """Where a LoRA or DoRA goes: merged into layers that are plain, beside the others.

    Args:
        model: The transformer.
        weights: The LoRA's.
        merge: Whether any may be merged.

    Raises:
        ValueError: If it doesn't fit the model, or can't be put on it as it is.
    """
    merged: list[Merged] = []
    beside: list[Beside] = []
    copies = kept_copies(model)
    merge = merge and copies is None
    shared = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for path, change in low_ranks(weights).items():
        layer = layer_at(model, path)
        if layer is None:
            raise ValueError(f"the LoRA weights don't fit this model: it has no layer {path}.")
        _check_shape(layer, change, path)
        place = Place(layer, "weight", f"{path}.weight")
        # Others do more with a weight, or one of several layers with the same one is meant.
        is_plain = type(layer).forward is nn.Linear.forward
        is_plain &= shared[id(place.parameter)] == 1
        if merge and is_plain and _is_mergeable(place):
            merged.append(Merged(place, change))
            continue
        if is_part(model, layer):
            raise ValueError(why_not_beside(path))
        if change.magnitude is not None and copies == "group offloading to disk":
            raise ValueError(
                f"the weights of {path} are in files ({copies}), and a DoRA must read them: "
                "apply first, then offload."
            )
        beside.append(Beside(layer, change, path))
    return merged, beside


def place_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Merged]:
    """Where the weights of a whole state go.

    Args:
        model: The transformer.
        weights: All of its own, tuned.

    Raises:
        ValueError: If they don't fit the model, or can't be put on it as it is.
    """
    merged: list[Merged] = []
    places = own_parameters(model)
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
    copies = kept_copies(model)
    for name in weights:
        place = places[name]
        parameter = place.parameter
        assert parameter is not None
        why = place.obstacle()
        if why is None and copies is not None:
            why = f"{name} is under {copies}, which keeps copies of it"
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
        merged.append(Merged(place, Whole(weights[name])))
    return merged


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
