"""Which models an adapter can be attached to."""

from __future__ import annotations

from dataclasses import dataclass

from shiva_dit.models.families import MODELS


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportedModel:
    """What holds for a class of transformers."""

    name: str
    """As people call it."""
    model_class: str
    """Class in diffusers; subclasses count."""
    context: str
    """What routers read of the prompt, beside the tokens."""
    guidance: str
    """How its pipelines run the two passes of guidance: "one batch" or "in turn"."""
    learned_by: str
    """How its releases were trained: "flow matching", or by a "diffusion schedule", which training
    an adapter then needs."""


def supported() -> tuple[SupportedModel, ...]:
    """All classes that an adapter can be attached to."""
    return tuple(
        SupportedModel(
            name=spec.name,
            model_class=spec.model_class,
            context=spec.context_is,
            guidance=spec.guidance,
            learned_by=spec.learned_by,
        )
        for spec in MODELS.values()
    )
