"""Stable Diffusion 3's own encoders: what they are, and what they make of pictures and captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn

from shiva_dit.provenance import data_digest, module_digest, read_as, read_json

TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LATENTS = "latents"
NARROW = (torch.float16, torch.bfloat16)
CLIP_TOKENS, T5_TOKENS = 77, 256
"""Length of a caption: the shorter encoders' and the pipeline's own default."""

SAMPLE = 4096
"""Bytes of a tensor that a signature reads at its beginning, middle and end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a pipeline before its weights are loaded."""

    step: int
    """Sides are multiples of it, in pixels."""
    latent_step: int
    """Pixels per side of a latent."""
    channels: int
    largest: int | None = None
    """Longest side in pixels that the transformer has positions for, where that is known."""
    text_bytes: int | None = None
    """What a caption takes."""
    dtype: torch.dtype = torch.float32
    """Of the latents."""

    @classmethod
    def saved(cls, source: str, dtype: torch.dtype) -> Facts:
        """Of a pipeline in a folder or on the Hub that will be in a dtype, by its configs alone.

        Raises:
            OSError: If there is none.
            ValueError: If it is another kind.
        """
        index = StableDiffusion3Pipeline.load_config(source)
        kind = index.get("_class_name") if isinstance(index, dict) else None
        if kind != StableDiffusion3Pipeline.__name__:
            raise ValueError(refused(str(kind)))
        vae: Any = AutoencoderKL.load_config(source, subfolder="vae")
        made: Any = SD3Transformer2DModel.load_config(source, subfolder="transformer")
        latent_step, patch = 2 ** (len(vae["block_out_channels"]) - 1), made["patch_size"]
        text = (CLIP_TOKENS + T5_TOKENS) * made["joint_attention_dim"]
        text += made["pooled_projection_dim"]
        return cls(
            step=latent_step * patch,
            latent_step=latent_step,
            channels=vae["latent_channels"],
            largest=made["pos_embed_max_size"] * patch * latent_step,
            text_bytes=2 * text,
            dtype=dtype,
        )

    @classmethod
    def of(cls, pipe: Any) -> Facts:
        """Of a pipeline that is loaded, with its transformer or without.

        Raises:
            ValueError: If it is another kind.
        """
        if not isinstance(pipe, StableDiffusion3Pipeline):
            raise ValueError(refused(type(pipe).__name__))
        step, largest = pipe.vae_scale_factor * pipe.patch_size, None
        if getattr(pipe, "transformer", None) is not None:
            largest = pipe.transformer.config.pos_embed_max_size * step
        return cls(
            step=step,
            latent_step=pipe.vae_scale_factor,
            channels=pipe.vae.config.latent_channels,
            largest=largest,
            dtype=pipe.vae.dtype,
        )

    def check(self, size: int) -> None:
        """Raise unless squares of this side can be encoded and trained on.

        Raises:
            ValueError: If not; says which can.
        """
        if size < self.step or size % self.step:
            raise ValueError(f"size must be a multiple of {self.step} pixels, got {size}.")
        if self.largest is not None and size > self.largest:
            raise ValueError(
                f"size must be at most {self.largest} pixels, for which the model has positions, "
                f"got {size}."
            )

    def latent_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that a picture of this width and height takes."""
        width, height = (side // self.latent_step for side in shape)
        return self.channels * width * height * self.dtype.itemsize


def refused(kind: str) -> str:
    """What to say of another pipeline."""
    return (
        f"pictures are encoded by a StableDiffusion3Pipeline, got {kind}: for other models give "
        "the trainer data of your own (docs/training.md)."
    )


def digests(pipe: Any) -> dict[str, str]:
    """Of all that decides what a picture and what a caption becomes: "vae" and "text"."""
    vae = [_digest_of(pipe.vae), pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor]
    text = [_digest_of(getattr(pipe, name)) for name in TEXTS]
    words = [_tokenizer(getattr(pipe, name.replace("text_encoder", "tokenizer"))) for name in TEXTS]
    return {"vae": data_digest(vae), "text": data_digest([text, words])}


def _digest_of(encoder: nn.Module | None) -> str | None:
    return None if encoder is None else module_digest(encoder)


def _tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return [json.dumps(rules), tokenizer.model_max_length]


def fitted(picture: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """A picture scaled to cover a width and height, and cut to it in the middle."""
    return ImageOps.fit(picture, shape)


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: Sequence[Image.Image]) -> Float[Tensor, "B C H W"]:
    """Latents of pictures of one size, scaled for the transformer, in the autoencoder's dtype."""
    pixels = pipe.image_processor.preprocess(list(pictures)).to(pipe.vae.device, pipe.vae.dtype)
    mean = pipe.vae.encode(pixels).latent_dist.mode()
    return (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


@torch.no_grad()
def encode_captions(pipe: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """What the model is conditioned on, of each caption, in 16 bits.

    Raises:
        ValueError: If 16 bits can't hold it.
    """
    given = list(captions)
    text, _, pooled, _ = pipe.encode_prompt(given, given, given, do_classifier_free_guidance=False)
    made = {"encoder_hidden_states": _narrow(text), "pooled_projections": _narrow(pooled)}
    for name, value in made.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"captions have {name} that 16 bits can't hold, or that aren't finite: load the "
                "pipeline in bfloat16 (--precision bfloat16)."
            )
    return [{n: value[i].clone() for n, value in made.items()} for i in range(len(given))]


def _narrow(value: Tensor) -> Tensor:
    return value if value.dtype in NARROW else value.half()


def signature(source: str) -> dict[str, str] | None:
    """Digest of a saved pipeline's encoders by samples of their weights' files, within a second.

    For telling, before training, whether data is of the same encoders; files of another kind or
    split otherwise count as the same where they hold the same tensors.

    Returns:
        By part; None where the files aren't on this machine.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # noqa: PLC0415
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

        try:
            folder = Path(snapshot_download(source, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    found = {}
    for name in ("vae", *TEXTS):
        samples = _samples(folder / name)
        if samples:
            found[name] = data_digest(samples)
    if "vae" in found:
        found["scale of latents"] = data_digest(_scale(folder / "vae" / "config.json"))
    return found or None


def _scale(path: Path) -> list[Any]:
    """What latents are shifted and multiplied by, as a saved VAE says."""
    with read_as("config of a VAE", path):
        config = read_json(path)
        return [config.get("shift_factor"), config.get("scaling_factor")]


def _samples(folder: Path) -> list[tuple[str, ...]]:
    """Name, dtype, shape and some bytes of every tensor of a folder's safetensors files."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file, read_as("safetensors", path):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name, about in header.items():
                if name == "__metadata__":
                    continue
                begin, end = about["data_offsets"]
                content = hashlib.sha256()
                for start in (begin, (begin + end) // 2, max(end - SAMPLE, begin)):
                    file.seek(8 + length + start)
                    content.update(file.read(min(SAMPLE, end - start)))
                found.append((name, about["dtype"], str(about["shape"]), content.hexdigest()))
    return sorted(found)
