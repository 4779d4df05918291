"""Models that judge pictures, small and random, of the real classes, saved as their folders are."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BitImageProcessorPil,
    BlipConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from shiva_dit.pictures.reward import HIDDEN, renamed
from tests import tiny
from tests.whole import clip_tokenizer

SIDE = 16
LONGEST = 12  # tokens of a prompt
SIZES = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def clip_folder(folder: Path, seed: int = 0) -> Path:
    config = CLIPConfig(
        text_config={
            "vocab_size": 54,
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": LONGEST,
            "bos_token_id": 52,
            "eos_token_id": 53,
        },
        vision_config={
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        projection_dim=10,
    )
    model = CLIPModel(config)
    tiny.randomize(model, seed, std=0.5)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(**SIZES).save_pretrained(folder)
    clip_tokenizer(folder / "words").save_pretrained(folder)
    return folder


def dino_folder(folder: Path, seed: int = 0) -> Path:
    config = Dinov2Config(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        mlp_ratio=2,
    )
    model = Dinov2Model(config)
    tiny.randomize(model, seed, std=0.5)
    model.save_pretrained(folder)
    BitImageProcessorPil(**SIZES).save_pretrained(folder)
    return folder


def reward_folder(folder: Path, seed: int = 0) -> Path:
    """ImageReward under its published names, at tiny sizes."""
    folder.mkdir(parents=True)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BlipConfig(
        text_config={
            **shared,
            "vocab_size": 54,
            "hidden_size": 12,
            "encoder_hidden_size": 8,
            "max_position_embeddings": 64,
            "pad_token_id": 53,
        },
        vision_config={**shared, "hidden_size": 8, "image_size": SIDE, "patch_size": 8},
    )
    config.save_pretrained(folder)
    clip_tokenizer(folder / "words").save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    names = {**published_vision(8), **published_text(12, 8)}
    widths = (12, *HIDDEN)
    for place, before, after in zip((0, 2, 4, 6, 7), widths, HIDDEN, strict=False):
        names[f"mlp.layers.{place}.weight"] = (after, before)
        names[f"mlp.layers.{place}.bias"] = (after,)
    state = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in names.items()}
    assert len({renamed(name) for name in names}) == len(names)
    save_file(state, folder / "ImageReward.safetensors")
    return folder


def published_vision(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as BLIP's own code has them."""
    top, inner, patch = "blip.visual_encoder", 16, 8
    found: dict[str, tuple[int, ...]] = {
        f"{top}.cls_token": (1, 1, width),
        f"{top}.pos_embed": (1, (SIDE // patch) ** 2 + 1, width),
        f"{top}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{top}.patch_embed.proj.bias": (width,),
        **_both(f"{top}.norm", width),
    }
    for block in range(2):
        at = f"{top}.blocks.{block}"
        found |= {**_both(f"{at}.norm1", width), **_both(f"{at}.norm2", width)}
        found |= _both(f"{at}.attn.qkv", 3 * width, width) | _both(f"{at}.attn.proj", width, width)
        found |= _both(f"{at}.mlp.fc1", inner, width) | _both(f"{at}.mlp.fc2", width, inner)
    return found


def published_text(width: int, seen: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as BERT with cross-attention has them."""
    top, inner = "blip.text_encoder", 16
    found: dict[str, tuple[int, ...]] = {
        f"{top}.embeddings.word_embeddings.weight": (54, width),
        f"{top}.embeddings.position_embeddings.weight": (64, width),
        **_both(f"{top}.embeddings.LayerNorm", width),
    }
    for layer in range(2):
        at = f"{top}.encoder.layer.{layer}"
        for kind, source in (("attention", width), ("crossattention", seen)):
            found |= _both(f"{at}.{kind}.self.query", width, width)
            found |= _both(f"{at}.{kind}.self.key", width, source)
            found |= _both(f"{at}.{kind}.self.value", width, source)
            found |= _both(f"{at}.{kind}.output.dense", width, width)
            found |= _both(f"{at}.{kind}.output.LayerNorm", width)
        found |= _both(f"{at}.intermediate.dense", inner, width)
        found |= _both(f"{at}.output.dense", width, inner) | _both(f"{at}.output.LayerNorm", width)
    return found


def _both(name: str, after: int, *before: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (after, *before), f"{name}.bias": (after,)}


def paint(folder: Path, count: int, seed: int = 0, shift: int = 0, side: int = 24) -> Path:
    """Random pictures of smooth patches, named as `generate` names them."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        small = torch.randint(0, 200, (6, 6, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray((small + shift).numpy()).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        image.save(folder / f"{index:05d}-0.png")
    return folder


def texts(path: Path, count: int) -> Path:
    words = ["star", "disc", "red", "box", "blue"]
    lines = [f"{words[i % 5]} {words[(i // 5) % 5]}" for i in range(count)]
    path.write_text("\n".join(lines))
    return path
