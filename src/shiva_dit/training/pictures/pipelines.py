"""How pictures and captions of each pipeline become what its transformer is given: data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Scale = Callable[[Any, Tensor], tuple[Any, Any]]
"""From a VAE and its latents (B, C, H, W): what is taken from them, and then what they are
multiplied by."""


def _by_config(vae: Any, latents: Tensor) -> tuple[float, float]:
    """One number for all channels."""
    del latents
    return vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor


def _by_channel(vae: Any, latents: Tensor) -> tuple[Float[Tensor, "C 1 1"], Float[Tensor, "C 1 1"]]:
    mean, std = (
        torch.tensor(vae.config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    return mean.to(latents), 1.0 / std.to(latents)


def _by_batch_norm(
    vae: Any, latents: Float[Tensor, "B C H W"]
) -> tuple[Float[Tensor, "1 C H W"], Float[Tensor, "1 C H W"]]:
    """By channel and place within a token of 2x2."""
    high, wide = (side // 2 for side in latents.shape[-2:])

    def spread(values: Float[Tensor, " C4"]) -> Float[Tensor, "1 C H W"]:
        return F.pixel_shuffle(values.view(1, -1, 1, 1).expand(1, -1, high, wide), 2).to(latents)

    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return spread(vae.bn.running_mean), 1.0 / spread(variance.sqrt())


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a transformer takes latents (B, C, H, W)."""

    laid: Callable[[Tensor], Tensor]
    picture: Callable[[Tensor, int, int], Tensor]
    """Undoes it, by H and W."""


AS_IT_IS = Layout(laid=lambda x: x, picture=lambda x, high, wide: x)
FRAME = Layout(laid=lambda x: x.unsqueeze(2), picture=lambda x, high, wide: x.squeeze(2))
"""A video of one frame, (B, C, 1, H, W)."""
PACKED = Layout(
    laid=lambda x: F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2).contiguous(),
    picture=lambda x, high, wide: F.pixel_shuffle(
        x.transpose(1, 2).unflatten(2, (high // 2, wide // 2)), 2
    ),
)
"""A row for each 2x2 latents, (B, N, 4 C)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """Height and width of a picture."""

    pixels: tuple[int, int]
    latents: tuple[int, int]

    @property
    def tokens(self) -> tuple[int, int]:
        """Of 2x2 latents."""
        return self.latents[0] // 2, self.latents[1] // 2


Given = dict[str, Tensor]
"""Kept of captions: by name, batch first."""


def _as_kept(kept: Given, sides: Sides) -> dict[str, Any]:
    del sides
    return kept


def _flux_ids(kept: Given, sides: Sides) -> dict[str, Any]:
    """Text stands at 0, image tokens at their row and column."""
    text = kept["encoder_hidden_states"]
    places = torch.cartesian_prod(
        *(torch.arange(side, dtype=text.dtype, device=text.device) for side in sides.tokens)
    )
    image = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)
    return {**kept, "img_ids": image, "txt_ids": text.new_zeros(text.shape[1], 3)}


def _flux2_ids(kept: Given, sides: Sides) -> dict[str, Any]:
    """Of four coordinates: text stands at its own place in the last."""
    text = kept["encoder_hidden_states"]
    counts = (1, *sides.tokens, 1), (1, 1, 1, text.shape[1])
    image, words = (
        torch.cartesian_prod(*(torch.arange(count, device=text.device) for count in own))
        .unsqueeze(0)
        .expand(len(text), -1, -1)
        for own in counts
    )
    return {**kept, "img_ids": image, "txt_ids": words}


def _chroma(kept: Given, sides: Sides) -> dict[str, Any]:
    """Flux with a mask of text and image."""
    mask = kept["attention_mask"]
    image = mask.new_ones(len(mask), math.prod(sides.tokens))
    return {**_flux_ids(kept, sides), "attention_mask": torch.cat([mask, image], dim=1)}


def _qwen_shapes(kept: Given, sides: Sides) -> dict[str, Any]:
    return {**kept, "img_shapes": [[(1, *sides.tokens)]] * len(kept["encoder_hidden_states"])}


def _no_sizes(kept: Given, sides: Sides) -> dict[str, Any]:
    del sides
    return {**kept, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sizes(kept: Given, sides: Sides) -> dict[str, Any]:
    """PixArt-Alpha at 1024 pixels is told the size; its smaller models ignore it."""
    text, (high, wide) = kept["encoder_hidden_states"], sides.pixels
    resolution = text.new_tensor([[high, wide]]).repeat(len(text), 1)
    ratio = text.new_tensor([[high / wide]]).repeat(len(text), 1)
    return {**kept, "added_cond_kwargs": {"resolution": resolution, "aspect_ratio": ratio}}


def _list_of_texts(kept: Given, sides: Sides) -> dict[str, Any]:
    """Z-Image takes each caption at its own length."""
    del sides
    text, mask = kept["cap_feats"], kept["mask"]
    if type(mask) is not Tensor:  # of a shape alone, to count by: no length is known
        return {"cap_feats": list(text)}
    lengths = mask.sum(1).tolist()
    return {"cap_feats": [row[:length] for row, length in zip(text, lengths, strict=True)]}


def _of_stages(config: Mapping[str, Any]) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A pipeline whose pictures and captions can be encoded."""

    gives: tuple[str | None, ...] = ("encoder_hidden_states",)
    """What `encode_prompt` returns, as the transformer's arguments; None, and further ones, are not
    kept."""
    mask: str | None = None
    """Which of what is kept is the mask of text that `encode_prompt` makes as long as it has to be,
    and that is kept at the longest length."""
    widths: Mapping[str, int]
    """Tokens of a caption, by the transformer's setting that says how wide they are."""
    arguments: Callable[[Given, Sides], dict[str, Any]] = _as_kept
    """The transformer's, but latents and time."""
    layout: Layout = AS_IT_IS
    patch: Callable[[Mapping[str, Any]], int] = lambda config: 2
    """Latents along a side of a token, by the transformer's config."""
    most_tokens: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    """Along a side, for which the transformer has positions."""
    scale: Scale = _by_config
    latent_step: Callable[[Mapping[str, Any]], int] = _of_stages
    """Pixels along a side of a latent, by the VAE's config."""
    frames: bool = False
    """Whether the VAE takes videos."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Settings of the transformer by which it can't be trained, and what they mean."""

    def to_latents(self, vae: Any, pixels: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C H W"]:
        """Latents of pictures in [-1, 1], in the VAE's dtype, scaled for the transformer."""
        found = vae.encode(pixels.unsqueeze(2) if self.frames else pixels).latent_dist.mode()
        found = found.squeeze(2) if self.frames else found
        less, times = self.scale(vae, found)
        return (found - less) * times

    def to_pixels(self, vae: Any, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        """Pictures of latents, as the pipeline decodes them."""
        less, times = self.scale(vae, latents)
        found = latents / times + less
        made = vae.decode(found.unsqueeze(2) if self.frames else found, return_dict=False)[0]
        return made.squeeze(2) if self.frames else made


SD3 = "StableDiffusion3Pipeline"
_FLUX = Served(
    gives=("encoder_hidden_states", "pooled_projections"),
    widths={"joint_attention_dim": 512, "pooled_projection_dim": 1},
    arguments=_flux_ids,
    layout=PACKED,
)
_PIXART = Served(
    gives=("encoder_hidden_states", "encoder_attention_mask"),
    widths={"caption_channels": 300},
    arguments=_no_sizes,
    patch=lambda config: config["patch_size"],
)
_FLUX2 = Served(
    widths={"joint_attention_dim": 512},
    arguments=_flux2_ids,
    layout=PACKED,
    scale=_by_batch_norm,
)
PIPELINES: dict[str, Served] = {
    SD3: Served(
        gives=("encoder_hidden_states", None, "pooled_projections"),
        widths={"joint_attention_dim": 77 + 256, "pooled_projection_dim": 1},
        patch=lambda config: config["patch_size"],
        most_tokens=lambda config: config["pos_embed_max_size"],
    ),
    "FluxPipeline": _FLUX,
    "Flux2Pipeline": _FLUX2,
    "Flux2KleinPipeline": _FLUX2,
    "ChromaPipeline": Served(
        gives=("encoder_hidden_states", None, "attention_mask"),
        widths={"joint_attention_dim": 512},
        arguments=_chroma,
        layout=PACKED,
    ),
    "QwenImagePipeline": Served(
        gives=("encoder_hidden_states", "encoder_hidden_states_mask"),
        mask="encoder_hidden_states_mask",
        widths={"joint_attention_dim": 512},
        arguments=_qwen_shapes,
        layout=PACKED,
        scale=_by_channel,
        latent_step=lambda config: 2 ** len(config["temperal_downsample"]),
        frames=True,
    ),
    "ZImagePipeline": Served(
        gives=("cap_feats",),
        mask="mask",
        widths={"cap_feat_dim": 512},
        arguments=_list_of_texts,
        layout=FRAME,
        most_tokens=lambda config: min(config["axes_lens"][1:]),
    ),
    "PixArtAlphaPipeline": Served(
        gives=_PIXART.gives,
        widths={"caption_channels": 120},
        arguments=_sizes,
        patch=_PIXART.patch,
    ),
    "PixArtSigmaPipeline": _PIXART,
    "AuraFlowPipeline": Served(
        widths={"joint_attention_dim": 256},
        patch=lambda config: config["patch_size"],
        most_tokens=lambda config: math.isqrt(config["pos_embed_max_size"]),
    ),
    "HunyuanImagePipeline": Served(
        gives=(
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
        ),
        widths={"text_embed_dim": 1000, "text_embed_2_dim": 128},
        patch=lambda config: config["patch_size"][-1],
        latent_step=lambda config: config["spatial_compression_ratio"],
        refuses={"use_meanflow": "it is told the next step's time as well"},
    ),
    "WanPipeline": Served(
        widths={"text_dim": 512},
        layout=FRAME,
        patch=lambda config: config["patch_size"][-1],
        most_tokens=lambda config: config["rope_max_seq_len"],
        scale=_by_channel,
        latent_step=lambda config: config["scale_factor_spatial"],
        frames=True,
    ),
}
"""By class."""


def served(kind: str) -> Served:
    """What is known of a pipeline of a class.

    Raises:
        ValueError: If it isn't served; lists those that are.
    """
    if kind not in PIPELINES:
        names = ", ".join(name.removesuffix("Pipeline") for name in PIPELINES)
        raise ValueError(
            f"pictures are encoded by the pipelines {names}, got {kind}: for other models give "
            "the trainer data of your own (docs/training.md)."
        )
    return PIPELINES[kind]
