"""What is attached to the transformers of a target."""

from __future__ import annotations

from typing import Any

from shiva_dit.models.attach import attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.reducing import Reduction, reduction_of
from shiva_dit.models.target import pipeline_transformer, transformers_of


def attachments(target: Any) -> list[Attachment]:
    """What is attached to the transformers of a target, in order."""
    found = [attachment_of(model) for model in transformers_of(target)]
    return [attachment for attachment in found if attachment is not None]


def reductions(target: Any) -> list[Reduction]:
    """The reducers on the transformers of a target, in order."""
    found = [reduction_of(model) for model in transformers_of(target)]
    return [reduction for reduction in found if reduction is not None]


def all_attached(target: Any) -> list[Attachment]:
    """The same, at least one.

    Raises:
        ValueError: If nothing is attached.
    """
    return attachments(target) or [attached(target)]


def attached(target: Any) -> Attachment:
    """What is attached to the first transformer.

    Raises:
        ValueError: If nothing is.
    """
    model = pipeline_transformer(target)
    attachment = attachment_of(model)
    if attachment is None:
        reduction = reduction_of(model)
        if reduction is not None:
            raise ValueError(
                f"a {type(reduction.reducer).__name__} is on this {type(model).__name__}, and this "
                "is for adapters: what it costs says flops(height, width, text_tokens) of what "
                "attach_reducer returned; shiva_dit.remove takes it off."
            )
        raise ValueError(
            f"no adapter is attached to this {type(model).__name__}: call shiva_dit.apply first."
        )
    return attachment
