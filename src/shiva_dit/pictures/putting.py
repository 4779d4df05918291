"""What makes a pipeline's pictures: the pipeline itself, an adapter on it, or a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import shiva_dit
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.adapter.module import named_parts
from shiva_dit.config import check_types, finite_number, to_dict
from shiva_dit.methods.registry import METHODS, Making
from shiva_dit.models.correction import HALF_LIFE, WholeSteps
from shiva_dit.models.families import model_spec
from shiva_dit.models.reducing import attach_reducer
from shiva_dit.models.target import transformers_of
from shiva_dit.provenance import data_digest, tensors_digest

FREE = tuple(name for name, found in METHODS.items() if not found.tunes)
"""Methods without training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What is put on a pipeline; nothing by default. As `shiva_dit.apply` and `correct` take it."""

    adapter: str | None = None
    """Folder or Hub id of an adapter."""
    transformer_2: str | None = None
    """That of a second transformer."""
    method: str | None = None
    """Instead of an adapter: a method without training, such as "tomesd"."""
    keep_ratio: float | None = None
    """Mean share of tokens kept; an adapter's own by default."""
    multiple: int | None = None
    """The number of tokens kept is a multiple of this."""
    segments: int | None = None
    """At most so many different rows of a schedule."""
    select_every: int | None = None
    """So many blocks in a row share their scores."""
    whole_steps: int = 0
    """Steps of a run in which the unpruned model predicts as well."""
    half_life: float = HALF_LIFE
    """The share of a run after which half of a correction is left."""

    def __post_init__(self) -> None:
        check_types(self)
        WholeSteps(self.whole_steps, self.half_life)
        if self.adapter is not None and self.method is not None:
            raise ValueError("an adapter or a method, not both: leave one of them out.")
        if self.adapter is None:
            self._check_without_adapter()

    def _check_without_adapter(self) -> None:
        lost = ["transformer_2", "multiple", "segments", "select_every"]
        if self.method is None:
            lost += ["keep_ratio", "whole_steps"]
        elif self.method not in FREE:
            raise ValueError(
                f"{self.method!r} is no method without training: take one of {', '.join(FREE)}, or "
                "an adapter."
            )
        elif self.keep_ratio is None:
            raise ValueError(f"the method {self.method!r} needs a keep ratio, such as 0.6.")
        given = [name for name in lost if getattr(self, name)]
        if given:
            raise ValueError(f"{', '.join(given)}: for an adapter, and there is none.")

    def adapters(self) -> list[ShivaAdapter]:
        """Its adapters, read.

        Raises:
            ValueError: If one is missing, damaged or another thing.
        """
        named = (self.adapter, self.transformer_2)
        return [ShivaAdapter.from_pretrained(name) for name in named if name is not None]

    def put_on(self, pipe: Any) -> dict[str, Any]:
        """Put it on a pipeline.

        Returns:
            All that decides what it does: its settings, and digests of adapters.

        Raises:
            ValueError: As `apply` and `correct`.
        """
        said = to_dict(self)
        if self.adapter is not None:
            adapters = self.adapters()
            numbers = ("keep_ratio", "multiple", "segments", "select_every")
            shiva_dit.apply(
                pipe,
                adapters[0],
                transformer_2=adapters[1] if len(adapters) > 1 else None,
                **{name: said[name] for name in numbers},
            )
            said["sha256"] = [adapter_digest(adapter) for adapter in adapters]
        elif self.method is not None:
            assert self.keep_ratio is not None
            for model in transformers_of(pipe):
                put_method_on(model, self.method, self.keep_ratio)
        if self.whole_steps:
            shiva_dit.correct(pipe, self.whole_steps, half_life=self.half_life)
        return said


def adapter_digest(adapter: ShivaAdapter) -> str:
    """SHA-256 of all content of an adapter that decides what it does, wherever it was saved."""
    said: list[Any] = []
    for _, part in named_parts(adapter):
        tuned = {f"backbone.{name}": value for name, value in part.backbone_weights.items()}
        weights = tensors_digest(sorted({**part.state_dict(), **tuned}.items()))
        said += [to_dict(part.config), part.schedule.to_json(), weights]
    return data_digest(said)


def put_method_on(model: Any, method: str, keep_ratio: float, *, seed: int = 0) -> None:
    """Put a method without training on a model.

    Args:
        model: The transformer.
        method: Its name in `METHODS`.
        keep_ratio: Share of the tokens that it keeps.
        seed: Of what it draws.

    Raises:
        ValueError: If the method can't work in this model, or at this ratio.
    """
    making = Making(
        num_blocks=len(model_spec(model).blocks(model)),
        grid=_unknown,
        keep_ratio=finite_number("keep_ratio", keep_ratio),
        router=None,
        generator=torch.Generator(),
    )
    reducer = METHODS[method].make(making)
    if reducer is not None:
        attach_reducer(model, reducer.seeded(seed))


def _unknown() -> tuple[int, int]:
    raise ValueError("a method without training asked for the grid of the images.")
