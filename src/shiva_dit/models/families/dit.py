"""DiT: classes instead of text, and every block with a time embedding of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from shiva_dit.core.flops import ClassBlockShape, ModelFlops
from shiva_dit.models.families.basic import BLOCKS as BLOCKS
from shiva_dit.models.spec import ModelDims, ModelSpec, given, latent_grid, own_square
from shiva_dit.modules.context import TIME_FEATURES


def _context(model: Any, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    """The first block's class embedding, without its random dropping of labels in training."""
    labels = given(model, arguments, "class_labels")
    table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    return table(labels).detach()


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.transformer_blocks),
        width=model.inner_dim,
        time_dim=TIME_FEATURES,
        context_dim=model.inner_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    del text_tokens
    config, width = model.config, model.inner_dim
    patch = config.patch_size**2
    macs = num_tokens * width * patch * (config.in_channels + model.out_channels)
    macs += 256 * width + width * width + 2 * width * width  # the last modulation and its time
    blocks = (ClassBlockShape(width=width),) * len(model.transformer_blocks)
    return ModelFlops(blocks=blocks, constant=2 * macs, num_tokens=num_tokens)


MODELS = (
    ModelSpec(
        model_class="DiTTransformer2DModel",
        name="DiT",
        context_is="class",
        block_lists=("transformer_blocks",),
        sample="hidden_states",
        timestep="timestep",
        noise_timestep=1000.0,
        diffusion=True,
        time_embedder=None,
        context=_context,
        guidance="one batch",
        text_tokens=0,
        tokens=latent_grid,
        own_tokens=own_square,
        dims=_dims,
        flops=_flops,
    ),
)
