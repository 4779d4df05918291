"""Reading what a model's blocks take and give, for distillation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from shiva_dit.models.families import block_spec, model_spec
from shiva_dit.models.rows import apart
from shiva_dit.models.spec import bind


@dataclass(slots=True)
class BlockFeatures:
    """Image tokens before and after blocks, by block index, each (B, N, D)."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def update(self, block: int) -> Tensor:
        """What the block added to the tokens."""
        return self.outputs[block] - self.inputs[block]


@contextmanager
def record_blocks(
    model: nn.Module, *, inputs: Collection[int], outputs: Collection[int], num_tokens: int
) -> Iterator[BlockFeatures]:
    """Within: a forward of the model leaves the image tokens of the named blocks in the result.

    Args:
        model: A supported transformer.
        inputs: Blocks whose tokens before are kept.
        outputs: Blocks whose tokens after are kept.
        num_tokens: N: some blocks hold text as well.
    """
    features = BlockFeatures()
    handles = []
    try:
        for index, block in enumerate(model_spec(model).blocks(model)):
            if index in inputs or index in outputs:
                keep = partial(
                    _keep, features, index, index in inputs, index in outputs, num_tokens
                )
                handles.append(block.register_forward_hook(keep, with_kwargs=True))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _keep(
    features: BlockFeatures,
    index: int,
    keep_input: bool,
    keep_output: bool,
    num_tokens: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    spec = block_spec(module)
    if keep_input:
        before = spec.turned(bind(module, args, kwargs)[spec.hidden])
        features.inputs[index] = apart(before, num_tokens, spec.text)[1]
    if keep_output:
        after = spec.turned(output if spec.output is None else output[spec.output])
        features.outputs[index] = apart(after, num_tokens, spec.text)[1]
