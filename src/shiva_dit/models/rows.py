"""Arguments of a block that hold a row per image token: how the chosen rows are taken."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from shiva_dit.core.selection import gather_tokens


class RowsBySample:
    """A rotary table whose rows differ by sample, where the model expects one table for all.

    diffusers widens a table (S, d) by indexing it with None for batch and heads, or by
    unsqueezing a dimension for the heads; the answers here have a batch dimension beside.

    Args:
        rows: (B, S, d).
    """

    def __init__(self, rows: Shaped[Tensor, "B S d"]) -> None:
        self.rows = rows

    def __getitem__(self, index: tuple[Any, ...]) -> Tensor:
        """`[None, None]`: heads before the tokens; `[None, :, None]`: after them."""
        return self.rows.unsqueeze(1 if index[1] is None else 2)

    def unsqueeze(self, dim: int) -> Tensor:
        """A dimension for the heads after the tokens."""
        assert dim == 1
        return self.rows.unsqueeze(2)


def after_text(
    table: tuple[Tensor, ...], chosen: Int[Tensor, "B k"], num_tokens: int
) -> tuple[Tensor | RowsBySample, ...]:
    """Rotary tables (T + N, d) whose first T rows are the text's: those stay."""
    return tuple(_after_text(rows, chosen, num_tokens) for rows in table)


def image_of_pair(
    tables: tuple[Tensor, Tensor], chosen: Int[Tensor, "B k"], num_tokens: int
) -> tuple[Tensor | RowsBySample, Tensor]:
    """A rotary table (N, d) of the image, and one of the text, which stays."""
    image, text = tables
    return _after_text(image, chosen, num_tokens), text


def of_all(
    tables: tuple[Tensor, ...], chosen: Int[Tensor, "B k"], num_tokens: int
) -> tuple[Tensor, ...]:
    """Rotary tables (N, ...) that the model lets broadcast: rows by sample, (B, k, ...)."""
    del num_tokens
    return tuple(table[chosen] for table in tables)


def of_batch_one(
    tables: tuple[Tensor, ...], chosen: Int[Tensor, "B k"], num_tokens: int
) -> tuple[Tensor, ...]:
    """Rotary tables (1, N, ...) for all samples: the chosen rows by sample, (B, k, ...)."""
    del num_tokens
    return tuple(table[0][chosen] for table in tables)


def of_pairs(
    mask: Shaped[Tensor, "1 1 N N"], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B 1 k k"]:
    """A mask over pairs of image tokens, one for all samples."""
    del num_tokens
    return mask[0, 0][chosen[:, :, None], chosen[:, None, :]][:, None]


def of_heads(
    table: Shaped[Tensor, "B 1 N ..."], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B 1 k ..."]:
    """A rotary table by sample with a dimension for the heads."""
    return by_token(table[:, 0], chosen, num_tokens)[:, None]


def of_each(
    tables: tuple[Tensor, ...], chosen: Int[Tensor, "B k"], num_tokens: int
) -> tuple[Tensor, ...]:
    """Rotary tables (B, N, d) by sample, or (1, N, d) for all."""
    return tuple(
        table[0][chosen] if len(table) == 1 else by_token(table, chosen, num_tokens)
        for table in tables
    )


def _after_text(
    rows: Shaped[Tensor, "S d"], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Tensor | RowsBySample:
    text = rows.shape[0] - num_tokens
    if chosen.shape[0] == 1:
        return torch.cat([rows[:text], rows[text:][chosen[0]]])
    picked = rows[text:][chosen]  # (B, k, d)
    return RowsBySample(torch.cat([rows[:text].expand(len(chosen), -1, -1), picked], dim=1))


def key_bias(
    bias: Float[Tensor, "B ..."], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Float[Tensor, "B ..."]:
    """A bias (B, 1, N) or mask (B, N) on the keys of the image tokens."""
    del num_tokens
    if bias.ndim == 2:
        return bias.gather(1, chosen)
    return bias.gather(2, chosen[:, None].expand(-1, bias.shape[1], -1))


def mask_after_text(
    mask: Shaped[Tensor, "B ..."], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B ..."]:
    """A mask of text and image, (B, T + N) or (B, 1, 1, T + N), the text's entries first."""
    start = mask.shape[-1] - num_tokens
    text, image = mask[..., :start], mask[..., start:]
    index = chosen if mask.ndim == 2 else chosen[:, None, None]
    return torch.cat([text, image.gather(-1, index)], dim=-1)


def mask_before_text(
    mask: Shaped[Tensor, "B ..."], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B ..."]:
    """A mask of image and text, (B, N + T) or (B, 1, 1, N + T), the image's entries first."""
    image, text = mask[..., :num_tokens], mask[..., num_tokens:]
    index = chosen if mask.ndim == 2 else chosen[:, None, None]
    return torch.cat([image.gather(-1, index), text], dim=-1)


def rows_after_text(
    table: Shaped[Tensor, "B S d"], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B K d"]:
    """A rotary table by sample (B, T + N, d), the text's rows first: those stay."""
    text = table.shape[1] - num_tokens
    return torch.cat([table[:, :text], by_token(table[:, text:], chosen, num_tokens)], dim=1)


def rows_before_text(
    table: Shaped[Tensor, "B S d"], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B K d"]:
    """A rotary table by sample (B, N + T, d), the image's rows first."""
    image, text = table[:, :num_tokens], table[:, num_tokens:]
    return torch.cat([by_token(image, chosen, num_tokens), text], dim=1)


def by_token(
    values: Shaped[Tensor, "B N ..."], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B k ..."]:
    """Values per image token (B, N, ...)."""
    del num_tokens
    if values.ndim == 2:
        return values.gather(1, chosen)
    return gather_tokens(values.flatten(2), chosen).unflatten(2, values.shape[2:])


def modulation(
    values: Shaped[Tensor, "#B ..."], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "#B ..."]:
    """Modulation by the time: (B, 6, D) by sample, which stays, or (B, N, 6, D) by token.

    B may be 1 for one time of all samples, here and below.
    """
    if values.ndim != 4:
        return values
    return by_token(values.expand(len(chosen), -1, -1, -1), chosen, num_tokens)


def modulation_tokens_third(
    values: Shaped[Tensor, "#B ..."], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "#B ..."]:
    """Modulation by the time: (B, 6, D) by sample, which stays, or (B, 6, N, D) by token."""
    if values.ndim != 4:
        return values
    return modulation(values.transpose(1, 2), chosen, num_tokens).transpose(1, 2)


def modulation_in_one(
    values: Shaped[Tensor, "B M D"], chosen: Int[Tensor, "B k"], num_tokens: int
) -> Shaped[Tensor, "B K D"]:
    """Modulation by the time: (B, 1, D) for all tokens of a sample, which stays, or (B, N, D)."""
    return values if values.shape[1] == 1 else by_token(values, chosen, num_tokens)
