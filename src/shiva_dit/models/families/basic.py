"""diffusers' `BasicTransformerBlock`, which several families share."""

from __future__ import annotations

from shiva_dit.models.rows import key_bias
from shiva_dit.models.spec import BlockSpec

BLOCKS = (
    BlockSpec(
        block_class="BasicTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"attention_mask": key_bias},
    ),
)
