"""Shapes and types are enforced while tests run, by jaxtyping and by beartype."""

from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from tests.shapes import jaxtyped

enforced: Any = jaxtyped(typechecker=beartype)


@enforced
def product(x: Float[Tensor, "B N"], y: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    return (x * y).sum(1 if x.shape[0] > 1 else 0)


@enforced
def first(values: list[int], count: int) -> int:
    return values[0] if count else "none"  # type: ignore[return-value]


def test_wrong_shapes_and_types_are_errors() -> None:
    pair = torch.ones(2, 3)
    assert product(pair, pair).tolist() == [3.0, 3.0]
    for x, y in ((pair, pair.T), (pair, pair.long()), (pair[:1], pair[:1])):
        with pytest.raises(TypeCheckError):
            product(x, y)
    assert first([4], 1) == 4
    for values, count in (("4", 1), (["4"], 1), ([4], 1.0), ([4], 0)):
        with pytest.raises(TypeCheckError):
            first(values, count)  # type: ignore[arg-type]
