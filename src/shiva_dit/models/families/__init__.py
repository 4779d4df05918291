"""The specs of all supported models, by class name: a file by how they read the text."""

from __future__ import annotations

from torch import nn

from shiva_dit.models.families import (
    cross,
    flux,
    joint,
    one_stream,
    sound,
    videos,
    wan,
    with_sound,
)
from shiva_dit.models.families.refused import OUT_OF_SCOPE, REFUSED
from shiva_dit.models.spec import BlockSpec, ModelSpec

FAMILIES = (joint, flux, one_stream, cross, wan, videos, with_sound, sound)
BLOCKS: dict[str, BlockSpec] = {s.block_class: s for family in FAMILIES for s in family.BLOCKS}
MODELS: dict[str, ModelSpec] = {s.model_class: s for family in FAMILIES for s in family.MODELS}


def model_spec(model: nn.Module) -> ModelSpec:
    """The spec of a model.

    Raises:
        ValueError: If its class is not supported; the error says why, or lists those that are.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in MODELS:
            return MODELS[cls.__name__]
        if cls.__name__ in REFUSED:
            raise ValueError(f"{type(model).__name__} can't be served: {REFUSED[cls.__name__]}.")
        if cls.__name__ in OUT_OF_SCOPE:
            reason = OUT_OF_SCOPE[cls.__name__]
            raise ValueError(f"{type(model).__name__} is no transformer to serve: {reason}.")
    raise ValueError(
        f"{type(model).__name__} is not supported. Supported: {', '.join(sorted(MODELS))}. "
        "Pass the transformer of a pipeline, or the pipeline itself."
    )


def block_spec(block: nn.Module) -> BlockSpec:
    """The spec of a block.

    Raises:
        ValueError: If its class is not supported.
    """
    for cls in type(block).__mro__:
        if cls.__name__ in BLOCKS:
            return BLOCKS[cls.__name__]
    raise ValueError(
        f"blocks of class {type(block).__name__} are not supported. Supported: "
        f"{', '.join(sorted(BLOCKS))}."
    )
