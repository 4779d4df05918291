"""Z-Image: one stream, the image's tokens first; images and texts come as lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.flops import ModelFlops, SharedBlockShape
from shiva_dit.models.rows import mask_before_text, rows_before_text
from shiva_dit.models.spec import BlockSpec, ModelDims, ModelSpec, given

MULTIPLE = 32
"""Image and text are padded to a multiple of so many tokens each."""


def _padded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def _tokens(model: Any, sample: Sequence[Any] | Tensor) -> int:
    """Image tokens of pictures (C, F, H, W), padding included.

    Args:
        model: The transformer.
        sample: A list of them as pipelines pass it, or a batch.

    Raises:
        ValueError: If images differ in size, or others are there to go by (omni mode).
    """
    if not all(isinstance(image, Tensor) for image in sample):
        raise ValueError("Z-Image with pictures to go by (omni mode) is not supported.")
    shapes = {tuple(image.shape) for image in sample}
    if len(shapes) > 1:
        raise ValueError(
            f"the images of one call must be of one size, got {sorted(shapes)}: a block keeps as "
            "many tokens of each. Call the model once per size."
        )
    _, frames, height, width = shapes.pop()
    patch, frame_patch = model.config.all_patch_size[0], model.config.all_f_patch_size[0]
    return _padded((frames // frame_patch) * (height // patch) * (width // patch))


def _text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    return torch.stack([text.mean(0) for text in given(model, arguments, "cap_feats")])


def _time_dim(model: Any) -> int:
    return min(model.dim, 256)


def _dims(model: Any) -> ModelDims:
    return ModelDims(
        num_blocks=len(model.layers),
        width=model.dim,
        time_dim=_time_dim(model),
        context_dim=model.config.cap_feat_dim,
    )


def _flops(model: Any, num_tokens: int, text_tokens: int) -> ModelFlops:
    config, width = model.config, model.dim
    text, time = _padded(text_tokens), _time_dim(model)

    def block(text_tokens: int, modulation: int) -> SharedBlockShape:
        return SharedBlockShape(
            width=width,
            text_tokens=text_tokens,
            modulation=modulation,
            feed_forward=3 * width * int(width / 3 * 8),
        )

    modulation = 4 * width * time
    patch = config.all_patch_size[0] ** 2 * config.all_f_patch_size[0] * config.in_channels
    macs = num_tokens * patch * width + text * config.cap_feat_dim * width
    macs += 256 * 1024 + 1024 * time
    macs += width * time + (num_tokens + text) * width * patch  # the output of the text's, too
    refined = block(0, modulation).flops(num_tokens) + block(text, 0).flops(0)
    return ModelFlops(
        blocks=(block(text, modulation),) * config.n_layers,
        constant=2 * macs + config.n_refiner_layers * refined,
        num_tokens=num_tokens,
    )


BLOCKS = (
    BlockSpec(
        block_class="ZImageTransformerBlock",
        hidden="x",
        text_inside=True,
        text_last=True,
        value_modules=("attention.to_v",),
        values_of_text_last=True,
        rows={"freqs_cis": rows_before_text, "attn_mask": mask_before_text},
    ),
)

MODELS = (
    ModelSpec(
        model_class="ZImageTransformer2DModel",
        name="Z-Image",
        context_is="mean of the text",
        block_lists=("layers",),
        sample="x",
        timestep="t",
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="t_embedder",
        context=_text,
        guidance="one batch",
        text_tokens=512,
        tokens=_tokens,
        dims=_dims,
        flops=_flops,
    ),
)
