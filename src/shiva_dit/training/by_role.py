"""References in training: whose tokens need a budget of their own, and who goes without them."""

from __future__ import annotations

from shiva_dit.training.data import Batch
from shiva_dit.training.recipe import TrainConfig


def num_references(config: TrainConfig, batch: Batch) -> int:
    """Tokens of references of a batch.

    Raises:
        ValueError: If there are any, and the recipe has no budget for them.
    """
    if batch.num_references and config.reference_keep_ratio is None:
        raise ValueError(
            "the data have references, whose tokens need a budget of their own: set "
            "reference_keep_ratio."
        )
    return batch.num_references


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
