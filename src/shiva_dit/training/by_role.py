"""References in training: whose tokens need a budget of their own, and who goes without them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.models.spec import ModelSpec
from shiva_dit.training.clean_frames import CleanFrames
from shiva_dit.training.data import Batch
from shiva_dit.training.recipe import TrainConfig


class ByRole:
    """Which of a batch's tokens are the target's and which are references'.

    Args:
        config: The recipe.
        model: The transformer.
        spec: Its spec.

    Raises:
        ValueError: If frames shall be clean of a class that takes one time for a sample.
    """

    def __init__(self, config: TrainConfig, model: Any, spec: ModelSpec) -> None:
        self.config, self.model, self.spec = config, model, spec
        self.clean = None
        if config.clean_frames:
            self.clean = CleanFrames(model, spec, config.clean_frames)

    def of(self, batch: Batch) -> tuple[int, int]:
        """Tokens of the target of each sample, and of references, clean frames among them.

        Raises:
            ValueError: If there are references, and the recipe has no budget for them.
        """
        if batch.num_references and self.config.reference_keep_ratio is None:
            raise ValueError(
                "the data have references, whose tokens need a budget of their own: set "
                "reference_keep_ratio."
            )
        clean = 0 if self.clean is None else self.clean.num_tokens(batch)
        every = self.spec.tokens(self.model, batch.latents)
        return every - clean, batch.num_references + clean

    def learned(self, values: Float[Tensor, "P ..."], batch: Batch) -> Float[Tensor, "P ..."]:
        """What losses are of: of values laid out as the latents, those of frames that are noisy."""
        return values if self.clean is None else self.clean.others(values, batch)


def without_references(batch: Batch) -> Batch:
    """The batch, for who knows one budget alone.

    Raises:
        ValueError: If it has references.
    """
    if batch.num_references:
        raise ValueError(
            "the flip test is for data without references: it knows one budget of all tokens."
        )
    return batch
