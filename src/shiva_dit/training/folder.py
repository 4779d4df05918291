"""A folder of pictures and captions as training data: encoded once by a pipeline, then read."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from shiva_dit.ownership import owned
from shiva_dit.provenance import (
    data_digest,
    file_digest,
    load_tensors,
    module_digest,
    read_json,
    read_text,
    write_atomically,
    write_json,
)
from shiva_dit.training.data import Batch

KINDS = (".png", ".jpg", ".jpeg", ".webp")
LATENTS = "latents"
ABOUT = "data.json"
UNCONDITIONAL = "unconditional.safetensors"
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)
"""What Pillow's readers raise on damaged files."""


def encode_folder(
    pipe: Any, images: Path, out: Path, *, size: int, show_progress: bool = True
) -> Path:
    """Encode pictures and captions by a pipeline's own encoders; goes on where it was stopped.

    Args:
        pipe: A `StableDiffusion3Pipeline` with its VAE and text encoders, on its device.
        images: Folder of pictures (png, jpg, webp), each with its caption in a text file of the
            same name; other folders below it are read too.
        out: Folder for a file per picture, that of the empty caption, and `data.json`.
        size: Side in pixels; pictures are scaled to cover a square of it, and cut in the middle.
        show_progress: Whether a bar counts pictures.

    Returns:
        `out`, for `FolderData`.

    Raises:
        ValueError: If the pipeline is another kind, the size doesn't fit its patches, there are no
            pictures, one can't be read or has no caption, `out` holds other data, or another
            process encodes into it.
    """
    if not isinstance(pipe, StableDiffusion3Pipeline):
        raise ValueError(
            f"pictures are encoded by a StableDiffusion3Pipeline, got {type(pipe).__name__}: for "
            "other models give the trainer data of your own (docs/training.md)."
        )
    step = pipe.vae_scale_factor * pipe.patch_size
    if size < step or size % step:
        raise ValueError(f"size must be a multiple of {step} pixels, got {size}.")
    pictures = sorted(p for p in images.rglob("*") if p.suffix.lower() in KINDS)
    if not pictures:
        raise ValueError(f"there are no pictures ({', '.join(KINDS)}) in {images}.")
    captions = [_caption(path) for path in pictures]
    about = {
        "pictures": [path.relative_to(images).as_posix() for path in pictures],
        "size": size,
        "model": str(pipe.name_or_path),
        "sources": [
            data_digest([file_digest(path), caption])
            for path, caption in zip(pictures, captions, strict=True)
        ],
        "encoders": {name: _digest_of(getattr(pipe, name)) for name in ENCODERS},
        "scaling": [pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor],
    }
    todo = list(zip(pictures, captions, sample_files(out, len(pictures)), strict=True))
    with owned(out):
        _check_or_write(out / ABOUT, about)
        if not (out / UNCONDITIONAL).is_file():
            _save(out / UNCONDITIONAL, _text(pipe, ""))
        for picture, caption, path in tqdm(todo, desc="encode", disable=not show_progress):
            if not path.is_file():
                _save(path, {LATENTS: _latents(pipe, picture, size), **_text(pipe, caption)})
    return out


def sample_files(folder: Path, count: int) -> list[Path]:
    """The files of so many samples."""
    return [folder / f"{index:06d}.safetensors" for index in range(count)]


def _caption(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        raise ValueError(f"{picture} has no caption: write it into {path.name} beside it.")
    return read_text(path).strip()


def _digest_of(encoder: nn.Module | None) -> str | None:
    return None if encoder is None else module_digest(encoder)


def _check_or_write(path: Path, about: dict[str, Any]) -> None:
    if not path.is_file():
        write_json(path, about)
        return
    found = read_json(path)
    if found == about:
        return
    if not isinstance(found, dict) or found.keys() != about.keys():
        raise ValueError(
            f"{path} is not of this version of shiva-dit, or no data of pictures at all: encode "
            "into an empty folder."
        )
    raise ValueError(
        f"{path.parent} holds data of other pictures, another size or another model (what "
        f"differs: {', '.join(key for key in about if found[key] != about[key])}): encode into an "
        "empty folder."
    )


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda file: save_file(plain, file))


@torch.no_grad()
def _latents(pipe: Any, picture: Path, size: int) -> Float[Tensor, "C H W"]:
    try:
        with Image.open(picture) as opened:
            image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (size, size))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{picture} is too large a picture, make it smaller: {error}") from error
    except UNREADABLE as error:
        raise ValueError(f"{picture} can't be read as a picture: {error}") from error
    pixels = pipe.image_processor.preprocess(image).to(pipe.vae.device, pipe.vae.dtype)
    mean = pipe.vae.encode(pixels).latent_dist.mode()[0]
    return (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


@torch.no_grad()
def _text(pipe: Any, caption: str) -> dict[str, Tensor]:
    text, _, pooled, _ = pipe.encode_prompt(
        caption, caption, caption, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}


class FolderData:
    """Training data that `encode_folder` wrote (`TrainingData`).

    Args:
        folder: Its `out`.

    Raises:
        ValueError: If it is no such folder, or a sample is missing.
    """

    def __init__(self, folder: Path) -> None:
        about = folder / ABOUT
        if not about.is_file():
            raise ValueError(
                f"{folder} holds no encoded pictures ({ABOUT} is missing): make it by "
                "`shiva-dit encode`."
            )
        self.name = str(folder)
        self._about = read_json(about)
        pictures = self._about.get("pictures") if isinstance(self._about, dict) else None
        if not isinstance(pictures, list):
            raise ValueError(f"{about} doesn't say which pictures were encoded: encode them again.")
        count = len(pictures)
        self.files = sample_files(folder, count)
        self.empty = folder / UNCONDITIONAL
        self._shapes: dict[str, torch.Size] = {}
        missing = [path.name for path in (*self.files, self.empty) if not path.is_file()]
        if missing:
            raise ValueError(
                f"{folder} is not complete, {len(missing)} files are missing (first "
                f"{missing[0]}): run the same `shiva-dit encode` again, it goes on."
            )

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.files)

    def identity(self) -> str:
        """Digest of what was encoded (pictures, captions, size) and by what (autoencoder, text).

        "not given" for data of older versions, which didn't keep that.
        """
        if "sources" not in self._about:
            return "not given"
        return data_digest({k: v for k, v in self._about.items() if k != "model"})

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """The samples with these indices, in float32; nothing is drawn.

        Raises:
            ValueError: If the file of a sample is damaged, or unlike the others.
        """
        del generator
        samples = [self._sample(self.files[index]) for index in indices.tolist()]
        stacked = {n: torch.stack([s[n] for s in samples]).float() for n in samples[0]}
        return Batch(latents=stacked.pop(LATENTS), conditioning=stacked)

    def unconditional(self) -> dict[str, Tensor]:
        """The empty caption.

        Raises:
            ValueError: If its file is damaged.
        """
        return {name: value.float() for name, value in load_tensors(self.empty).items()}

    def _sample(self, path: Path) -> dict[str, Tensor]:
        sample = load_tensors(path)
        shapes = {name: value.shape for name, value in sample.items()}
        self._shapes = self._shapes or shapes
        if LATENTS not in shapes or shapes != self._shapes:
            raise ValueError(
                f"{path} is not a sample like the others: remove it and run the same "
                "`shiva-dit encode` again."
            )
        return sample
