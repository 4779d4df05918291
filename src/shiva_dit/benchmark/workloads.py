"""Models of real size by name, with random weights, and what they are called with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor

from shiva_dit.models.examples import Size
from shiva_dit.models.families import model_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The size of one sample in latents."""

    frames: int
    """Frames of latents; 1 for images."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A transformer, what it is called with, and how large its samples are."""

    name: str
    about: str
    """One line, for people."""
    model_class: str
    """Class in diffusers."""
    config: Mapping[str, Any]
    """Arguments of the class."""
    size: tuple[int, int]
    """Width and height in pixels, where none are asked for."""
    text_tokens: int
    """T."""
    frames: int = 1
    """Frames of latents."""
    pixels: int = 8
    """Pixels per latent, along each side."""
    patch: int = 2
    """Latents per token, along each side."""
    sized_by_config: bool = False
    """Whether the model is built for one size of the sample (DiT: its positions are a table)."""

    def grid(self, size: tuple[int, int] | None = None) -> Grid:
        """Latents of a picture of some width and height in pixels.

        Raises:
            ValueError: If these are no whole tokens.
        """
        width, height = size or self.size
        step = self.pixels * self.patch
        if min(width, height) < step or width % step or height % step:
            raise ValueError(
                f"width and height of {self.name} must be multiples of {step} pixels, "
                f"got {width}x{height}."
            )
        return Grid(frames=self.frames, height=height // self.pixels, width=width // self.pixels)

    def num_tokens(self, grid: Grid) -> int:
        """N."""
        return grid.frames * (grid.height // self.patch) * (grid.width // self.patch)

    def build(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> Any:
        """The model with random weights (seed 0), in evaluation mode."""
        config = dict(self.config)
        if self.sized_by_config:
            if grid.height != grid.width:
                raise ValueError(f"{self.name} is for squares, got {grid.width}x{grid.height}.")
            config["sample_size"] = grid.height
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(diffusers, self.model_class)(**config)
        finally:
            torch.set_default_dtype(before)
        _as_loaded(model, dtype)
        return model.eval().requires_grad_(False)

    def inputs(
        self, model: Any, batch: int, grid: Grid, text_tokens: int, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Arguments of one forward but the time, random, on the model's device."""
        device = next(model.parameters()).device

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        size = Size(
            frames=grid.frames,
            height=grid.height // self.patch,
            width=grid.width // self.patch,
            text=text_tokens,
            batch=batch,
            draw=torch.randn,
        )
        made = model_spec(model).example(model, size)
        return {name: place(value) for name, value in made.items()}


def _as_loaded(model: Any, dtype: torch.dtype) -> None:
    """Dtypes as `from_pretrained(torch_dtype=...)` gives them: what a class keeps is float32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, module in model.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for leaf, tensor in own:
            if tensor.is_floating_point():
                wide = kept.intersection((*name.split("."), leaf))
                tensor.data = tensor.data.to(torch.float32 if wide else dtype)


_SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SD3_SMALL = {
    **_SD3_MEDIUM,
    "sample_size": 64,
    "num_layers": 8,
    "num_attention_heads": 8,
    "caption_projection_dim": 512,
}
_SD3_TINY = {
    **_SD3_SMALL,
    "sample_size": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 32,
}
_SD3 = Workload(
    name="sd3-medium",
    about="Stable Diffusion 3 Medium",
    model_class="SD3Transformer2DModel",
    config=_SD3_MEDIUM,
    size=(1024, 1024),
    text_tokens=333,
)

_ALL = (
    replace(
        _SD3,
        name="sd35-medium",
        about="Stable Diffusion 3.5 Medium",
        config={
            **_SD3_MEDIUM,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    _SD3,
    Workload(
        name="flux-dev",
        about="Flux.1 dev",
        model_class="FluxTransformer2DModel",
        config={"guidance_embeds": True},
        size=(1024, 1024),
        text_tokens=512,
    ),
    Workload(
        name="pixart-sigma",
        about="PixArt-Sigma XL at 1024 pixels",
        model_class="PixArtTransformer2DModel",
        config={"caption_channels": 4096, "use_additional_conditions": False},
        size=(1024, 1024),
        text_tokens=300,
        sized_by_config=True,
    ),
    Workload(
        name="dit-xl-2",
        about="DiT-XL/2",
        model_class="DiTTransformer2DModel",
        config={"out_channels": 8},
        size=(512, 512),
        text_tokens=0,
        sized_by_config=True,
    ),
    Workload(
        name="wan-1.3b",
        about="Wan 2.1 1.3B, 81 frames",
        model_class="WanTransformer3DModel",
        config={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        size=(832, 480),
        text_tokens=512,
        frames=21,
    ),
    replace(
        _SD3,
        name="sd3-small",
        about="like Stable Diffusion 3, 8 blocks of width 512: for a laptop",
        config=_SD3_SMALL,
        size=(512, 512),
        text_tokens=77,
    ),
    replace(
        _SD3,
        name="sd35-small",
        about="like Stable Diffusion 3.5, 8 blocks of width 512: for a laptop",
        config={**_SD3_SMALL, "dual_attention_layers": (0, 1, 2, 3), "qk_norm": "rms_norm"},
        size=(512, 512),
        text_tokens=77,
    ),
    replace(
        _SD3,
        name="sd3-tiny",
        about="like Stable Diffusion 3, 3 blocks of width 32: to try the command",
        config=_SD3_TINY,
        size=(128, 128),
        text_tokens=7,
    ),
    replace(
        _SD3,
        name="sd3-thin",
        about="like Stable Diffusion 3, 24 blocks of width 32: what the host costs per block",
        config={**_SD3_TINY, "num_layers": 24},
        size=(128, 128),
        text_tokens=7,
    ),
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}
"""By name."""


def workload(name: str) -> Workload:
    """The workload of a name.

    Raises:
        ValueError: If there is none; names the nearest.
    """
    if name not in WORKLOADS:
        near = difflib.get_close_matches(name, WORKLOADS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no model {name!r}; known: {', '.join(WORKLOADS)}.{hint}")
    return WORKLOADS[name]
