"""A pipeline's own encoders: what they are, and what they make of pictures and captions."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn

from shiva_dit.provenance import data_digest, module_digest, read_as, read_json
from shiva_dit.training.pictures.pipelines import PIPELINES, SD3, served

TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
NARROW = (torch.float16, torch.bfloat16)
PADDED = "max_sequence_length"
"""What pipelines call the longest text that they take."""

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
        index = DiffusionPipeline.load_config(source)
        kind = str(index.get("_class_name") if isinstance(index, dict) else None)
        served(kind)
        vae, made = (saved_config(source, part) for part in ("vae", "transformer"))
        return cls._by(kind, vae, made, dtype)

    @classmethod
    def of(cls, pipe: Any) -> Facts:
        """Of a pipeline that is loaded, with its transformer or without.

        Raises:
            ValueError: If it is another kind.
        """
        transformer = getattr(pipe, "transformer", None)
        made = None if transformer is None else transformer.config
        return cls._by(kind_of(pipe), pipe.vae.config, made, pipe.vae.dtype)

    @classmethod
    def _by(cls, kind: str, vae: Any, transformer: Any, dtype: torch.dtype) -> Facts:
        how = served(kind)
        latent_step = how.latent_step(vae)
        facts = cls(
            step=2 * latent_step,
            latent_step=latent_step,
            channels=vae.get("latent_channels") or vae["z_dim"],
            dtype=dtype,
        )
        if transformer is None:
            return facts
        for name, why in how.refuses.items():
            if transformer.get(name):
                raise ValueError(f"this {kind} can't be trained ({name}): {why}.")
        step, most = latent_step * how.patch(transformer), how.most_tokens(transformer)
        text = sum((transformer[name] or 0) * tokens for name, tokens in how.widths.items())
        largest = None if most is None else most * step
        return replace(facts, step=step, largest=largest, text_bytes=2 * text)

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


def saved_config(source: str, part: str) -> dict[str, Any]:
    """Config of a model of a saved pipeline. `AutoModel` looks elsewhere once it has loaded one."""
    found: Any = AutoencoderKL.load_config(source, subfolder=part)
    return found


def kind_of(pipe: Any) -> str:
    """The class of a pipeline by which it is served.

    Raises:
        ValueError: If it isn't.
    """
    names = [cls.__name__ for cls in type(pipe).__mro__]
    found = next((name for name in names if name in PIPELINES), names[0])
    served(found)
    return found


def digests(pipe: Any) -> dict[str, str]:
    """Of all that decides what a picture and what a caption becomes: "vae" and "text"."""
    kind = kind_of(pipe)
    vae = [_digest_of(pipe.vae), *_scale(pipe.vae.config)]
    encoders = [name for name in TEXTS if hasattr(pipe, name)]
    text = [_digest_of(getattr(pipe, name)) for name in encoders]
    words = [
        _tokenizer(getattr(pipe, name.replace("text_encoder", "tokenizer"))) for name in encoders
    ]
    further = [] if kind == SD3 else [kind]  # the first that was served
    return {
        "vae": data_digest([*vae, *further]),
        "text": data_digest([text, words, *further]),
    }


def _digest_of(encoder: nn.Module | None) -> str | None:
    return None if encoder is None else module_digest(encoder)


def _tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    template = getattr(tokenizer, "chat_template", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else _unused(backend)
    made = [json.dumps(rules), tokenizer.model_max_length]
    return made if template is None else [*made, template]


def _unused(backend: Any) -> str:
    """A fast tokenizer as it was before it was called: it remembers how long texts were."""
    made = type(backend).from_str(backend.to_str())
    made.no_truncation()
    made.no_padding()
    return made.to_str()


def fitted(picture: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """A picture scaled to cover a width and height, and cut to it in the middle."""
    return ImageOps.fit(picture, shape)


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: Sequence[Image.Image]) -> Float[Tensor, "B C H W"]:
    """Latents of pictures of one size, scaled for the transformer, in the autoencoder's dtype."""
    processor = getattr(pipe, "image_processor", None) or pipe.video_processor
    pixels = processor.preprocess(list(pictures)).to(pipe.vae.device, pipe.vae.dtype)
    return served(kind_of(pipe)).to_latents(pipe.vae, pixels)


@torch.no_grad()
def encode_captions(pipe: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """What the model is conditioned on, of each caption, in 16 bits.

    Raises:
        ValueError: If 16 bits can't hold it.
    """
    how, arguments = served(kind_of(pipe)), _as_called(pipe, captions)
    found = pipe.encode_prompt(**arguments)
    named = {n: v for n, v in zip(how.gives, found, strict=False) if n is not None}
    if how.mask is not None:
        named = _padded(named, how.mask, arguments[PADDED])
    own = next(iter(named.values())).dtype
    narrow = own if own in NARROW else torch.float16  # HunyuanImage's second text may be wider
    made = {n: v.to(narrow) if v.is_floating_point() else v for n, v in named.items()}
    for name, value in made.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"captions have {name} that 16 bits can't hold, or that aren't finite: load the "
                "pipeline in bfloat16 (--precision bfloat16)."
            )
    return [{n: value[i].clone() for n, value in made.items()} for i in range(len(captions))]


def _as_called(pipe: Any, captions: Sequence[str]) -> dict[str, Any]:
    """Arguments of `encode_prompt`: as `__call__` gives them by default, without guidance."""
    known = inspect.signature(pipe.encode_prompt).parameters
    called = inspect.signature(type(pipe).__call__).parameters
    usual = {n: called[n].default for n in known if n in called}
    prompts = {name: [*captions] for name in ("prompt", "prompt_2", "prompt_3")}
    given = {**usual, **prompts, "do_classifier_free_guidance": False, "batch_size": len(captions)}
    return {name: value for name, value in given.items() if name in known}


def _padded(made: Mapping[str, Any], name: str, length: int) -> dict[str, Tensor]:
    """Texts, each of its length or all as long as the longest, at one length with their mask."""
    text, rows = next(iter(made.items()))
    if made.get(name) is not None:
        rows = [row[own.bool()] for row, own in zip(rows, made[name], strict=True)]
    filled = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    kept = torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
        kept[place, : len(row)] = 1
    return {text: filled, name: kept}


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
    index = folder / "model_index.json"
    if found and index.is_file():
        with read_as("index of a pipeline", index):
            found["class"] = str(read_json(index)["_class_name"])
    if "vae" in found:
        path = folder / "vae" / "config.json"
        with read_as("config of a VAE", path):
            found["scale of latents"] = data_digest(_scale(read_json(path)))
    return found or None


def _scale(config: Mapping[str, Any]) -> list[Any]:
    """What latents are shifted and multiplied by, as a VAE says."""
    by_channel = [config[n] for n in ("latents_mean", "latents_std") if config.get(n)]
    return [config.get("shift_factor"), config.get("scaling_factor"), *by_channel]


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
