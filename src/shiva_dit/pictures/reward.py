"""ImageReward by transformers' BLIP: its own package doesn't run beside transformers 5.

Thin, and not validated: no real weights were at hand. It follows the published code (BLIP with
ViT-L/16, the text's first token read off the picture, a chain of linear layers).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipConfig, CLIPImageProcessorPil
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from shiva_dit.pictures.scorers import Columns, model_folder, read_by
from shiva_dit.provenance import file_digest, load_tensors

WEIGHTS = "ImageReward.safetensors"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of its rewards, as published."""
LONGEST = 35
"""Tokens of a prompt that it reads."""
HIDDEN = (1024, 128, 64, 16, 1)
DROPPED = (0.2, 0.2, 0.1, 0.0, 0.0)
CONVERT = (
    "import torch, safetensors.torch as s; w = torch.load('ImageReward.pt', weights_only=True); "
    "s.save_file({k: v.contiguous() for k, v in w.items()}, 'ImageReward.safetensors')"
)
"""What makes the file that is read here of the published one."""
RENAMED = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
)
"""Names of the published weights, and transformers'."""


class _Reward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        widths = (config.text_config.hidden_size, *HIDDEN)
        layers: list[nn.Module] = []
        for before, after, dropped in zip(widths, HIDDEN, DROPPED, strict=False):
            layers.append(nn.Linear(before, after))
            layers += [nn.Dropout(dropped)] if dropped else []
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    def forward(self, pixels: Tensor, tokens: Any) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device).long(),
        ).last_hidden_state[:, 0]
        return (self.mlp["layers"](read).squeeze(-1) - MEAN) / STD


class ImageReward:
    """How people would like a picture of a prompt.

    Args:
        source: Folder with `ImageReward.safetensors` (the published weights under their names) and
            BERT's tokenizer; a `config.json` of a `BlipConfig` if the sizes aren't the published.
        device: Where it runs.

    Raises:
        ValueError: If the folder isn't whole, or its weights are another model's.
    """

    name = "image_reward"

    def __init__(self, source: str, device: torch.device | str) -> None:
        folder = model_folder(source, "--image-reward", download=False)
        if not (folder / WEIGHTS).is_file():
            raise ValueError(
                f'{folder} holds no {WEIGHTS}: make it there by python -c "{CONVERT}".'
            )
        self._model = _load(folder, _config(folder)).to(device)
        self._tokenizer: Any = read_by(folder, AutoTokenizer.from_pretrained)
        side = self._model.vision.config.image_size
        self._prepare: Any = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        self._device = device
        self.sha256 = file_digest(folder / WEIGHTS)
        self.about: dict[str, Any] = {"source": source}

    def notes(self, texts: Sequence[str] | None) -> list[str]:
        """That nobody compared it."""
        del texts
        return ["ImageReward: not validated against the published weights"]

    @torch.no_grad()
    def measure(self, images: Sequence[Tensor], texts: Sequence[str] | None) -> Columns:
        """Rewards, about 0 with a spread of 1; nothing without prompts."""
        if texts is None:
            return {}
        arrays = [image.permute(1, 2, 0).numpy() for image in images]
        pixels = self._prepare(
            images=arrays, input_data_format="channels_last", return_tensors="pt"
        )["pixel_values"]
        tokens = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        found = self._model(pixels.to(self._device), tokens.to(self._device))
        return {"image_reward": found.double()}


def published_config() -> BlipConfig:
    """ViT-L/16 and BERT with cross-attention, as ImageReward was trained."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
    }
    text = {"vocab_size": 30524, "encoder_hidden_size": 1024}
    return BlipConfig(vision_config=vision, text_config=text)


def renamed(name: str) -> str:
    """Transformers' name of one of the published weights.

    >>> renamed("blip.visual_encoder.blocks.3.attn.qkv.weight")
    'vision.encoder.layers.3.self_attn.qkv.weight'
    """
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


def _config(folder: Path) -> Any:
    if (folder / "config.json").is_file():
        return read_by(folder, BlipConfig.from_pretrained)
    return published_config()


def _load(folder: Path, config: Any) -> Any:
    model = _Reward(config)
    state = {renamed(name): value for name, value in load_tensors(folder / WEIGHTS).items()}
    state.pop("text.embeddings.position_ids", None)  # 0, 1, 2, ...
    wanted = {n: v.shape for n, v in model.state_dict().items() if not n.endswith("position_ids")}
    wrong = sorted(
        name
        for name in {*state, *wanted}
        if name not in state or name not in wanted or state[name].shape != wanted[name]
    )
    if wrong:
        raise ValueError(
            f"{folder / WEIGHTS} are not ImageReward's weights: {len(wrong)} are missing, unknown "
            f"or of another size (first {wrong[0]})."
        )
    model.load_state_dict(state, strict=False)
    return model.float().eval().requires_grad_(False)
