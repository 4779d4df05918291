"""How a tiny model of a family is described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOKENS = 64
TEXT = 7


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a tiny model of a family is built and called."""

    build: Callable[[], Any]
    """The model, its weights not yet random."""
    arguments: Callable[[int, float], dict[str, Any]]
    """Arguments of one forward, from a batch size and a time in [0, 1]."""
    narrow: Callable[[dict[str, Any]], dict[str, Any]] | None
    """What changes for half as many tokens; None for a model that takes squares alone."""
    text_inside: tuple[str, ...] = ()
    """Classes of its blocks in which text and image run through the same layers."""
    own_tokens: int = 0
    """Tokens that the model adds to the text."""
    recomputes: bool = True
    """Whether gradient checkpointing is there, and gives the model's own gradients."""
    text: int = TEXT
    """Text tokens that FLOPs are asked for."""
    queries: float = 1.0
    """What queries are multiplied by, where no norm makes them large."""
    counted: bool = True
    """Whether it is called as the package counts it."""
    rows: str | None = None
    """An argument of its blocks that holds a row per image token, if there is one."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(batch: int) -> Tensor:
    """A mask of the text: the first sample has padding."""
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[0, 4:] = 0
    return mask


def narrow_latents(given: dict[str, Any]) -> dict[str, Any]:
    """Half of the width."""
    latents = given["hidden_states"]
    return {"hidden_states": latents[..., : latents.shape[-1] // 2]}


def half_of_rows(**others: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Half of the rows of packed latents, and what else says how many there are."""
    return lambda given: {"hidden_states": given["hidden_states"][:, : TOKENS // 2], **others}
