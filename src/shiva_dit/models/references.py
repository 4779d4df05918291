"""Which image tokens of a call are those of pictures to go by, and what share of them is kept.

How many they are must be known before the forward: by shapes that the call names, by the variables
of the pipeline that makes it, or by the places of its tokens, which lie on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from shiva_dit.config import finite_number
from shiva_dit.core.roles import REFERENCE, TARGET, Span
from shiva_dit.models.guidance import running_call
from shiva_dit.models.pipelines import PIPELINES
from shiva_dit.models.spec import ModelSpec, given

Spans = tuple[Span, ...]


def check_reference_ratio(keep_ratio: Any) -> None:
    """Raise a ValueError unless this is a share that can be kept."""
    finite_number("reference_keep_ratio", keep_ratio)
    if not 0.0 <= keep_ratio <= 1.0:
        raise ValueError(
            f"reference_keep_ratio must lie in [0, 1], got {keep_ratio}: the share of the "
            "references' tokens KEPT."
        )


class References:
    """The budget of references on one model.

    Args:
        model: The transformer.
        spec: Its spec.
        keep_ratio: Share kept of their tokens in every prunable block, in (0, 1]; 0 as well where
            they are clean frames, which pass by then.

    Raises:
        ValueError: If that lies outside its range, or no image token of the class is a reference's.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, keep_ratio: float) -> None:
        check_has_references(model, spec, keep_ratio)
        self.model, self.spec, self.keep_ratio = model, spec, float(keep_ratio)

    @torch.compiler.disable()
    def spans(self, arguments: Mapping[str, Any]) -> Spans:
        """A call's image tokens by role; empty without pictures to go by."""
        return () if self.spec.references is None else self.spec.references(self.model, arguments)


def check_has_references(model: nn.Module, spec: ModelSpec, keep_ratio: Any) -> None:
    """Raise a ValueError unless a class has references of which this share can be kept."""
    check_reference_ratio(keep_ratio)
    if not keep_ratio and spec.token_times == "one":
        raise ValueError(
            "reference_keep_ratio = 0 is for clean frames alone, and the references of "
            f"{type(model).__name__} are pictures: it must lie in (0, 1]."
        )
    if spec.references is None and spec.token_times == "one":
        raise ValueError(
            f"the image tokens of {type(model).__name__} are the target's alone, as far as is "
            "known: leave reference_keep_ratio out."
        )


def spans_of(*parts: tuple[int, int]) -> Spans:
    """Spans by role and size; empty where no token is a reference's.

    >>> spans_of((TARGET, 4), (REFERENCE, 0))
    ()
    """
    spans = tuple(Span(role, size) for role, size in parts if size)
    return spans if any(span.role == REFERENCE for span in spans) else ()


def by_shapes(model: Any, arguments: Mapping[str, Any]) -> Spans:
    """Of Qwen-Image: the first of the pictures is the target; of layers, all but the last are.

    Raises:
        ValueError: If the pictures of samples are of other sizes.
    """
    shapes = given(model, arguments, "img_shapes")
    first = shapes[0]
    if any(sample != first for sample in shapes):
        raise ValueError(
            "the samples of one forward must have references of the same sizes, so that they keep "
            f"equally many tokens; got img_shapes {shapes}. Run them one by one."
        )
    sizes = [math.prod(first)] if isinstance(first[0], int) else [math.prod(s) for s in first]
    count = max(1, len(sizes) - 1) if model.config.get("use_layer3d_rope") else 1
    return spans_of((TARGET, sum(sizes[:count])), (REFERENCE, sum(sizes[count:])))


def by_places(cached: str | None = None) -> Callable[[Any, Mapping[str, Any]], Spans]:
    """Of Flux and its kin: rows of references follow the target's.

    Args:
        cached: Argument that says whether the keys of references are kept: in the step that keeps
            them these come first, and the call says how many; in later ones there are none.
    """

    def spans(model: Any, arguments: Mapping[str, Any]) -> Spans:
        tokens = given(model, arguments, "hidden_states").shape[1]
        if cached is not None and arguments.get(cached) is not None:
            first = (arguments.get("num_ref_tokens") or 0) if arguments[cached] == "extract" else 0
            return spans_of((REFERENCE, first), (TARGET, tokens - first))
        targets = _by_pipeline(tokens)
        if targets is None:
            targets = _by_ids(given(model, arguments, "img_ids"))
        return spans_of((TARGET, targets), (REFERENCE, tokens - targets))

    return spans


def _by_pipeline(tokens: int) -> int | None:
    """Rows of the latents that the running pipeline denoises; None if nobody says it."""
    running = running_call()
    known = PIPELINES.get(running.name) if running is not None and running.is_known else None
    latents = None if running is None or known is None else running.scope.get(known.latents)
    if not isinstance(latents, Tensor) or latents.ndim != 3 or latents.shape[1] > tokens:
        return None
    return latents.shape[1]


_KNOWN: Any = WeakIdKeyDictionary()
"""Of tensors of places: their version, and how many of their tokens are the target's."""


def _by_ids(ids: Tensor) -> int:
    """Tokens of the target by their places, (N, 3) or (B, N, 4), read from the device once.

    The first number of a place says which picture it is in.

    Raises:
        ValueError: If tokens of the target follow those of references.
    """
    version = None if ids.is_inference() else ids._version
    known = _KNOWN.get(ids)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    pictures = (ids[0] if ids.ndim == 3 else ids)[:, 0].tolist()
    targets = next((n for n, each in enumerate(pictures) if each != pictures[0]), len(pictures))
    if pictures[0] in pictures[targets:]:
        raise ValueError(
            "the tokens of references must follow the target's for a budget of their own, and "
            "img_ids has some of the first picture's behind others': leave reference_keep_ratio "
            "out."
        )
    _KNOWN[ids] = version, targets
    return targets
