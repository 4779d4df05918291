"""What a model costs and how wide it is, read off a run without weights.

The model is built a second time from its config, of tensors that have shapes alone, and called with
a family's example inputs at three sizes under torch's FLOP counter. A block's cost, the cost of all
else, and the rows that each linear layer sees are polynomials in the image tokens: three sizes give
them for all. The user's model is never touched, be it quantised, sharded or hooked.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from shiva_dit.core.flops import ModelFlops, Polynomial
from shiva_dit.models.families import model_spec
from shiva_dit.models.skeleton import Skeleton, Widths
from shiva_dit.models.spec import ModelSpec

EXAMPLES = (1, 2, 3)
"""As many as a quadratic needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Costs of a model of some config, for T text tokens, by the number of image tokens."""

    blocks: tuple[Polynomial, ...]
    outside: Polynomial
    rows: Mapping[str, Polynomial]
    """Rows that each linear layer sees, by its path."""
    block_of: Mapping[str, int]
    """The block that these are in; the others see all tokens."""
    parts: tuple[frozenset[str], ...]
    """Names of what each block is made of."""

    def flops(self, num_tokens: int) -> ModelFlops:
        """FLOPs of a forward of one sample of N image tokens."""
        constant = self.outside.at(num_tokens)
        return ModelFlops(blocks=self.blocks, constant=constant, num_tokens=num_tokens)

    def linear_rows(self, path: str, num_tokens: int, counts: Sequence[int]) -> int:
        """Rows that a linear layer sees in a forward of one sample.

        Args:
            path: The layer's in the model.
            num_tokens: N.
            counts: k of every block.

        Raises:
            ValueError: If the layer came later than the model's own, by fusing some of them.
        """
        if path not in self.rows:
            raise ValueError(f"{path} is no linear layer of a model that is built by the config.")
        block = self.block_of.get(path)
        return self.rows[path].at(num_tokens if block is None else counts[block])


def counted(model: nn.Module, text_tokens: int, by_frame: bool = False) -> Counted:
    """Costs of a model for T text tokens; counted once for each config and T.

    Args:
        model: The transformer.
        text_tokens: T.
        by_frame: Whether it is told a time for each frame or token, not one for a sample; where it
            is by frame, what embedding one for each costs is that of an example's frames.

    Raises:
        ValueError: If the model doesn't take T text tokens, or isn't what its config says.
    """
    spec = model_spec(model)
    if spec.text_tokens and not text_tokens:
        raise ValueError(f"{type(model).__name__} reads text: text_tokens must be 1 at least.")
    found = _counted(*recipe(model, spec, text_tokens), text_tokens, by_frame)
    known = frozenset().union(*found.parts)
    for index, (block, parts) in enumerate(zip(spec.blocks(model), found.parts, strict=True)):
        if known.intersection(block._modules) != parts:
            raise ValueError(
                f"block {index} of the model isn't the one that its config says: where blocks "
                "were taken out or added, their kinds must stand in the config as well "
                "(model.register_to_config)."
            )
    return found


def model_flops(
    model: nn.Module, num_tokens: int, text_tokens: int, by_frame: bool = False
) -> ModelFlops:
    """FLOPs of a model for N image tokens and T text tokens; as `counted` otherwise."""
    return counted(model, text_tokens, by_frame).flops(num_tokens)


def model_widths(model: nn.Module) -> Widths:
    """Widths of a model."""
    spec = model_spec(model)
    return _widths(*recipe(model, spec, spec.text_tokens), spec.text_tokens)


def recipe(model: Any, spec: ModelSpec, text_tokens: int) -> tuple[type[nn.Module], str]:
    """The class that a model is built from anew, and its config.

    Subclasses are looked through. How many blocks there are is the model's word, not the config's:
    making a ControlNet from a transformer overwrites that (diffusers 0.42.1).
    """
    cls = next(c for c in type(model).__mro__ if c.__name__ == spec.model_class)
    known = inspect.signature(cls.__init__).parameters
    config = {name: value for name, value in model.config.items() if name in known}
    depths = {
        name: len(model.get_submodule(blocks))
        for name, blocks in zip(spec.depths, spec.block_lists, strict=False)
    }
    config = {**config, **depths, **spec.for_text(config, text_tokens)}
    return cls, json.dumps(config, sort_keys=True)


@lru_cache(maxsize=2)  # widths and costs are asked for one after the other
def _skeleton(cls: type[nn.Module], config: str) -> Skeleton:
    return Skeleton(cls, json.loads(config))


@lru_cache(maxsize=64)
def _widths(cls: type[nn.Module], config: str, text_tokens: int) -> Widths:
    return _skeleton(cls, config).widths(EXAMPLES[0], text_tokens)


@lru_cache(maxsize=32)
def _counted(cls: type[nn.Module], config: str, text_tokens: int, by_frame: bool) -> Counted:
    skeleton = _skeleton(cls, config)
    runs = [skeleton.run(example, text_tokens, by_frame) for example in EXAMPLES]
    first = runs[0]

    def through(values: Sequence[int]) -> Polynomial:
        return Polynomial.through(dict(zip((r.num_tokens for r in runs), values, strict=True)))

    return Counted(
        blocks=tuple(map(through, zip(*(run.blocks for run in runs), strict=True))),
        outside=through([run.outside for run in runs]),
        rows={path: through([run.rows[path] for run in runs]) for path in first.rows},
        block_of=skeleton.block_of,
        parts=skeleton.parts,
    )
