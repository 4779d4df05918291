"""Models that look at pictures: loaded from local files, named by the SHA-256 of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Model,
)

from shiva_dit.provenance import data_digest, file_digest

Columns = dict[str, Tensor]
"""Of each picture a row: features of several numbers, scores of one."""
PREPROCESSING = "preprocessor_config.json"
IQA_PROMPTS = ("Good photo.", "Bad photo.")


@runtime_checkable
class Scorer(Protocol):
    """A model with weights."""

    name: str
    """Which option brings it."""
    sha256: str
    """Of its weights."""
    about: dict[str, Any]
    """What else decides what it says."""

    def notes(self, texts: Sequence[str] | None) -> list[str]:
        """What to know of its scores of pictures with these prompts."""
        ...

    def measure(self, images: Sequence[Tensor], texts: Sequence[str] | None) -> Columns:
        """What it says of some pictures.

        Args:
            images: Each uint8 (3, H, W).
            texts: Their prompts; None: what needs them is left out.
        """
        ...


class Clip:
    """CLIP: features, the score of picture and prompt, and CLIP-IQA.

    Args:
        source: Folder of a `CLIPModel`, with its tokenizer and preprocessing.
        device: Where it runs.
        download: Whether `source` may be a Hub id, to be fetched.

    Raises:
        ValueError: If the folder isn't one or isn't whole.
    """

    name = "clip"

    def __init__(self, source: str, device: torch.device | str, *, download: bool = False) -> None:
        folder = model_folder(source, "--clip", download=download)
        self._model: Any = load_model(folder, CLIPModel, "clip").to(device)
        self._prepare = preprocessing(folder, CLIPImageProcessorPil)
        self._tokenizer: Any = read_by(folder, AutoTokenizer.from_pretrained)
        self._device = device
        self.sha256 = weights_digest(folder)
        self._longest = self._model.config.text_config.max_position_embeddings
        self._poles = self._text(IQA_PROMPTS)
        self.about = {"source": source, "preprocessing": file_digest(folder / PREPROCESSING)}

    def notes(self, texts: Sequence[str] | None) -> list[str]:
        """How many prompts are longer than it reads."""
        cut = sum(len(self._tokenizer(text).input_ids) > self._longest for text in texts or ())
        return [f"{cut} prompts cut to {self._longest} tokens"] if cut else []

    @torch.no_grad()
    def measure(self, images: Sequence[Tensor], texts: Sequence[str] | None) -> Columns:
        """Features of length 1; `clip_iqa` in [0, 1]; with prompts `clip_score`, up to 100."""
        pixels = self._prepare(images).to(self._device)
        features = self._model.get_image_features(pixel_values=pixels).pooler_output
        features = nn.functional.normalize(features.double(), dim=-1)  # (B, P)
        scale = self._model.logit_scale.double().exp()
        found = {
            "clip": features,
            "clip_iqa": (scale * features @ self._poles.T).softmax(-1)[:, 0],
        }
        if texts is not None:
            alike = (features * self._text(texts)).sum(-1)
            found["clip_score"] = 100.0 * alike.clamp_min(0.0)
        return found

    @torch.no_grad()
    def _text(self, texts: Sequence[str]) -> Float[Tensor, "B P"]:
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        ).to(self._device)
        found = self._model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return nn.functional.normalize(found.double(), dim=-1)


class Dino:
    """DINOv2's features, of its class token.

    Args:
        source: Folder of a `Dinov2Model` with its preprocessing.
        device: Where it runs.
        download: Whether `source` may be a Hub id, to be fetched.

    Raises:
        ValueError: If the folder isn't one or isn't whole.
    """

    name = "dinov2"

    def __init__(self, source: str, device: torch.device | str, *, download: bool = False) -> None:
        folder = model_folder(source, "--dinov2", download=download)
        self._model: Any = load_model(folder, Dinov2Model, "dinov2").to(device)
        self._prepare = preprocessing(folder, BitImageProcessorPil)
        self._device = device
        self.sha256 = weights_digest(folder)
        self.about = {"source": source, "preprocessing": file_digest(folder / PREPROCESSING)}

    def notes(self, texts: Sequence[str] | None) -> list[str]:
        """None."""
        del texts
        return []

    @torch.no_grad()
    def measure(self, images: Sequence[Tensor], texts: Sequence[str] | None) -> Columns:
        """Features."""
        del texts
        pixels = self._prepare(images).to(self._device)
        return {"dinov2": self._model(pixel_values=pixels).pooler_output.double()}


# --- what they are read from ----------------------------------------------------------------------


def model_folder(source: str, option: str, *, download: bool) -> Path:
    """The folder of a model, which is fetched only if that was asked for.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not download:
        raise ValueError(
            f"{option}: there is no folder {source}. Nothing is fetched unasked: give a folder of "
            "a model, or add --download to fetch a Hub id."
        )
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "model*.safetensors"]))


def load_model(folder: Path, kind: Any, model_type: str) -> nn.Module:
    """A model of transformers in float32, every weight of it from the folder.

    Raises:
        ValueError: If the folder holds another model, or lacks weights.
    """
    found = read_by(folder, AutoConfig.from_pretrained).model_type
    if found != model_type:
        raise ValueError(f"{folder} holds a model of type {found!r}, expected {model_type!r}.")
    model, said = read_by(
        folder,
        kind.from_pretrained,
        use_safetensors=True,
        output_loading_info=True,
        dtype=torch.float32,
    )
    lacking = sorted([*said["missing_keys"], *(str(key[0]) for key in said["mismatched_keys"])])
    if lacking:
        raise ValueError(
            f"{folder} lacks {len(lacking)} weights of a {kind.__name__} (first {lacking[0]}): "
            "fetch it again."
        )
    return model.eval().requires_grad_(False)


def read_by(folder: Path, load: Callable[..., Any], **options: Any) -> Any:
    """What transformers reads from a folder, never from the Hub.

    Raises:
        ValueError: If it can't; names the folder.
    """
    from safetensors import SafetensorError  # noqa: PLC0415

    try:
        return load(str(folder), local_files_only=True, **options)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} can't be read as a model's folder: {reason:.300}") from error


def weights_digest(folder: Path) -> str:
    """SHA-256 of a folder's weights: of the one file, or of the digests of several."""
    digests = [file_digest(path) for path in sorted(folder.glob("model*.safetensors"))]
    if not digests:
        raise ValueError(f"{folder} holds no model.safetensors: fetch the model again.")
    return digests[0] if len(digests) == 1 else data_digest(digests)


def preprocessing(
    folder: Path, kind: Any
) -> Callable[[Sequence[Tensor]], Float[Tensor, "B C H W"]]:
    """A folder's preprocessing by Pillow: the same pixels whether torchvision is there or not.

    Raises:
        ValueError: If it isn't there.
    """
    if not (folder / PREPROCESSING).is_file():
        raise ValueError(f"{folder} holds no {PREPROCESSING}: fetch the model again.")
    processor = read_by(folder, kind.from_pretrained)

    def prepare(images: Sequence[Tensor]) -> Tensor:
        arrays = [np.asarray(image.permute(1, 2, 0)) for image in images]
        return processor(images=arrays, input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ]

    return prepare
