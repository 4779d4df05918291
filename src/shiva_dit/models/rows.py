"""What has a row per image token: where the text lies in it, and how the chosen rows are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from shiva_dit.core.selection import gather_tokens

Text = Literal["none", "first", "last"]
"""Where the text's tokens lie among the image's."""


def apart(
    values: Shaped[Tensor, "B S ..."], num_tokens: int, text: Text
) -> tuple[Shaped[Tensor, "B T ..."] | None, Shaped[Tensor, "B N ..."]]:
    """The text's rows, where there are any, and the image's."""
    if text == "none":
        return None, values
    if text == "last":
        return values[:, num_tokens:], values[:, :num_tokens]
    start = values.shape[1] - num_tokens
    return values[:, :start], values[:, start:]


def together(
    rows_of_text: Shaped[Tensor, "#B T ..."] | None,
    image: Shaped[Tensor, "B N ..."],
    text: Text,
) -> Shaped[Tensor, "B S ..."]:
    """What `apart` took apart."""
    if rows_of_text is None:
        return image
    if len(rows_of_text) != len(image):
        rows_of_text = rows_of_text.expand(len(image), *rows_of_text.shape[1:])
    pair = [image, rows_of_text] if text == "last" else [rows_of_text, image]
    return torch.cat(pair, dim=1)


class RowsBySample:
    """A rotary table whose rows differ by sample, where the model expects one table for all.

    diffusers widens a table (S, d) by indexing it with None for batch and heads, by a view, or by
    unsqueezing a dimension for the heads; the answers here have a batch dimension beside.

    Args:
        rows: (B, S, d).
    """

    def __init__(self, rows: Shaped[Tensor, "B S d"]) -> None:
        self.rows = rows

    @property
    def shape(self) -> torch.Size:
        """(B, S, d): the last is the table's."""
        return self.rows.shape

    def __getitem__(self, index: tuple[Any, ...] | slice) -> Any:
        """`[None, None]`: heads before the tokens; `:` before None: after; `[-S:]`: all rows."""
        if isinstance(index, slice):
            return self
        return self.rows.unsqueeze(1 if index[:2] == (None, None) else 2)

    def float(self) -> RowsBySample:
        """In float32."""
        return RowsBySample(self.rows.float())

    def view(self, *shape: int) -> Tensor:
        """`(1, S, 1, d)`: heads after the tokens."""
        assert shape[2] == 1
        return self.rows.unsqueeze(2)

    def unsqueeze(self, dim: int) -> Tensor:
        """A dimension for the heads after the tokens."""
        assert dim == 1
        return self.rows.unsqueeze(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """An argument with a row per image token; called with one, it takes the chosen rows.

    A tuple is many such arguments. Where there is one row for all tokens (the modulation by one
    time of a sample), it stays.
    """

    axis: int | tuple[int, ...] = 1
    """The tokens' axis, of (B, ...), where B may be 1 for all samples; several of a mask over
    pairs of tokens."""
    text: Text = "none"
    """Where the text's rows are, which stay."""
    batch: Literal["own", "none", "widened"] = "own"
    """Whether there is a dimension for the batch; "none" where the model lets one broadcast,
    "widened" where it puts it there itself (`RowsBySample`)."""
    dims: int | None = None
    """Dimensions of a value that has rows by token; one with fewer is by sample, and stays."""

    def __call__(self, value: Any, chosen: Int[Tensor, "B k"], num_tokens: int) -> Any:
        """The argument for the chosen tokens."""
        if isinstance(value, tuple):
            return tuple(self(each, chosen, num_tokens) for each in value)
        if self.dims is not None and value.ndim < self.dims:
            return value
        if self.batch != "own":
            taken = self._take(value[None], 1, chosen, num_tokens)
            if self.batch == "none":
                return taken
            return taken[0] if len(chosen) == 1 else RowsBySample(taken)
        for axis in (self.axis,) if isinstance(self.axis, int) else self.axis:
            value = self._take(value, axis % value.ndim, chosen, num_tokens)
        return value

    def whole(self, value: Any, num_own: int, gather: Callable[[Tensor], Tensor]) -> Any:
        """The argument with the rows of all processes' image tokens (context parallelism).

        Args:
            value: With those of this process's own.
            num_own: How many it has.
            gather: Such rows, (B, n, ...), to those of all, (B, N, ...).
        """
        if isinstance(value, tuple):
            return tuple(self.whole(each, num_own, gather) for each in value)
        if self.dims is not None and value.ndim < self.dims:
            return value
        assert isinstance(self.axis, int)
        if self.batch != "own":
            return self._changed(value[None], 1, num_own, gather)[0]
        return self._changed(value, self.axis % value.ndim, num_own, gather)

    def _take(
        self, value: Tensor, axis: int, chosen: Int[Tensor, "B k"], num_tokens: int
    ) -> Tensor:
        return self._changed(value, axis, num_tokens, partial(by_token, chosen=chosen))

    def _changed(
        self, value: Tensor, axis: int, num_tokens: int, change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """With other rows of the image; where one is for all tokens, it stays."""
        if value.shape[axis] == 1:
            return value
        if axis != 1:
            turned = value.transpose(1, axis)
            return self._changed(turned, 1, num_tokens, change).transpose(1, axis)
        of_text, image = apart(value, num_tokens, self.text)
        return together(of_text, change(image), self.text)


def by_token(
    values: Shaped[Tensor, "#B N ..."], chosen: Int[Tensor, "B k"]
) -> Shaped[Tensor, "B k ..."]:
    """The chosen rows of each sample."""
    if len(values) < len(chosen):
        return values[0][chosen]
    if values.ndim == 2:
        return values.gather(1, chosen)
    return gather_tokens(values.flatten(2), chosen).unflatten(2, values.shape[2:])


def alike(axis: int) -> Callable[[Any, Tensor, int], Any]:
    """As many rows as are chosen, of an argument that has one and the same for all image tokens.

    Args:
        axis: Of the tokens, the image's last or first among others.
    """

    def take(value: Any, chosen: Int[Tensor, "B k"], num_tokens: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [take(each, chosen, num_tokens) for each in value]
        return value.narrow(axis, 0, value.shape[axis] - num_tokens + chosen.shape[1])

    return take


TABLE = Rows(batch="widened", text="first")
"""A rotary table (T + N, d) for all samples, the text's rows first; T may be 0."""
