"""Tiny pipelines with all their parts, of diffusers' and transformers' own classes."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    HunyuanImagePipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests import families, tiny

WIDTH = 24
"""Of text, as the tiny models of `families` take it."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def filled(module: Any, seed: int) -> Any:
    tiny.randomize(module, seed)
    return module.eval()


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a letter."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=77)


def clip(seed: int, kind: Any = CLIPTextModelWithProjection, width: int = 12) -> Any:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=52,
        eos_token_id=53,
    )
    return filled(kind(config), seed)


def t5_tokenizer() -> T5Tokenizer:
    """One token a letter."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*specials, *((letter, -3.0) for letter in string.ascii_lowercase)])


def t5(width: int = WIDTH, words: int = 200, config: Any = T5Config, kind: Any = T5EncoderModel):
    sizes = {"d_model": width, "d_kv": width // 2, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return filled(kind(config(vocab_size=words, **sizes)), seed=3)


def umt5() -> UMT5EncoderModel:
    return t5(config=UMT5Config, kind=UMT5EncoderModel)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    made = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    made.chat_template = CHAT
    return made


QWEN = {
    "vocab_size": 300,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def qwen3(kind: Any, width: int, layers: int) -> Any:
    config = Qwen3Config(hidden_size=width, num_hidden_layers=layers, head_dim=4, **QWEN)
    return filled(kind(config), seed=4)


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            **QWEN,
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    return filled(Qwen2_5_VLForConditionalGeneration(config), seed=4)


def mistral() -> Mistral3ForConditionalGeneration:
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            **QWEN,
            "hidden_size": WIDTH // 3,
            "num_hidden_layers": 31,
            "head_dim": 4,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    )
    return filled(Mistral3ForConditionalGeneration(config), seed=4)


def kl(channels: int, kind: Any = AutoencoderKL, **options: Any) -> Any:
    """Halves the sides."""
    made = kind(
        latent_channels=channels,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )
    return filled(made, seed=5)


def shifted(channels: int) -> AutoencoderKL:
    return kl(channels, shift_factor=0.1, scaling_factor=1.5)


def causal(kind: Any, channels: int, **options: Any) -> Any:
    """Halves the sides of videos."""
    made = kind(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1 * channel - 0.2 for channel in range(channels)],
        latents_std=[1.5 + channel for channel in range(channels)],
        **options,
    )
    return filled(made, seed=5)


def flux2_vae() -> AutoencoderKLFlux2:
    made = kl(1, AutoencoderKLFlux2)
    made.bn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    made.bn.running_var.copy_(torch.tensor([0.5, 2.0, 1.5, 0.7]))
    return made


def hunyuan_vae() -> AutoencoderKLHunyuanImage:
    made = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=0.75,
    )
    return filled(made, seed=5)


def changed(name: str, **config: Any) -> Any:
    """The model of a family by other settings."""
    made = families.made(name)
    return filled(type(made).from_config({**made.config, **config}), seed=0)


def _sd3(folder: Path) -> Any:
    words = clip_tokenizer(folder / "words")
    return StableDiffusion3Pipeline(
        transformer=changed("sd35", pos_embed_max_size=32),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=shifted(4),
        text_encoder=clip(1),
        tokenizer=words,
        text_encoder_2=clip(2),
        tokenizer_2=words,
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def _flux(folder: Path, name: str) -> Any:
    return FluxPipeline(
        transformer=families.made(name),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=shifted(1),
        text_encoder=clip(1, CLIPTextModel, width=20),
        tokenizer=clip_tokenizer(folder / "words"),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def _flux2(folder: Path) -> Any:
    del folder
    return Flux2Pipeline(
        transformer=families.made("flux2-dev"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=mistral(),
        tokenizer=qwen_tokenizer(),
    )


def _klein(folder: Path) -> Any:
    del folder
    return Flux2KleinPipeline(
        transformer=families.made("flux2-klein"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3(Qwen3ForCausalLM, WIDTH // 3, 28),
        tokenizer=qwen_tokenizer(),
    )


def _chroma(folder: Path) -> Any:
    del folder
    return ChromaPipeline(
        transformer=families.made("chroma"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=shifted(1),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def _qwen(folder: Path) -> Any:
    del folder
    return QwenImagePipeline(
        transformer=families.made("qwen-image"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=causal(AutoencoderKLQwenImage, 2),
        text_encoder=qwen_vl(),
        tokenizer=qwen_tokenizer(),
    )


def _z_image(folder: Path) -> Any:
    del folder
    return ZImagePipeline(
        transformer=families.made("z-image"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=shifted(4),
        text_encoder=qwen3(Qwen3Model, WIDTH, 3),
        tokenizer=qwen_tokenizer(),
    )


def _pixart(folder: Path, kind: Any, name: str) -> Any:
    del folder
    return kind(
        transformer=changed(name, sample_size=128),
        scheduler=DPMSolverMultistepScheduler(),
        vae=kl(4, scaling_factor=0.75),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def _auraflow(folder: Path) -> Any:
    del folder
    return AuraFlowPipeline(
        transformer=changed("auraflow", pos_embed_max_size=32 * 32),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl(4, scaling_factor=0.75),
        text_encoder=umt5(),
        tokenizer=t5_tokenizer(),
    )


def _hunyuan(folder: Path) -> Any:
    del folder
    return HunyuanImagePipeline(
        transformer=families.made("hunyuan-image-glyphs"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=hunyuan_vae(),
        text_encoder=qwen_vl(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=t5(12, words=400),
        tokenizer_2=ByT5Tokenizer(),
    )


def _wan(folder: Path) -> Any:
    del folder
    return WanPipeline(
        transformer=families.made("wan"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=causal(AutoencoderKLWan, 4, scale_factor_spatial=2),
        text_encoder=umt5(),
        tokenizer=t5_tokenizer(),
    )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A pipeline, and how it is called."""

    build: Callable[[Path], Any]
    """With a folder for files of its own."""
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """Arguments of a call without guidance, or with the scale that the model is told."""
    guided: dict[str, Any] | None = field(default_factory=lambda: {"guidance_scale": 4.0})
    """Arguments of a call with both passes; None where there is none."""
    empty_first: bool = False
    """Whether the pass without a caption is the first of the two."""
    backbone: str = "lora"
    """What of the transformer is trained."""
    checkpointing: bool = True
    """Whether its blocks are recomputed."""
    told: float | None = None
    """What the model is told in a plain call."""


TOLD = {"guidance_scale": 4.0}
TRUE = {"true_cfg_scale": 4.0, "negative_prompt": ""}
BINS = {"use_resolution_binning": False}
FRAME = {"num_frames": 1}
WHOLE: dict[str, Whole] = {
    "sd3": Whole(build=_sd3, empty_first=True),
    "flux": Whole(build=lambda folder: _flux(folder, "flux"), plain={}, guided=TRUE),
    "flux-dev": Whole(
        build=lambda folder: _flux(folder, "flux-dev"), plain=TOLD, guided=None, told=4.0
    ),
    "flux2": Whole(build=_flux2, plain=TOLD, guided=None, told=4.0),
    "klein": Whole(build=_klein),
    "chroma": Whole(build=_chroma, checkpointing=False),
    "qwen": Whole(build=_qwen, plain={}, guided=TRUE),
    "z-image": Whole(build=_z_image, plain={"guidance_scale": 0.0}),
    "pixart-alpha": Whole(
        build=lambda folder: _pixart(folder, PixArtAlphaPipeline, "pixart-alpha"),
        plain={"guidance_scale": 1.0, **BINS},
        guided={**TOLD, **BINS},
        empty_first=True,
        backbone="full",  # diffusers 0.42.1 gives the class no LoRA
    ),
    "pixart-sigma": Whole(
        build=lambda folder: _pixart(folder, PixArtSigmaPipeline, "pixart-sigma"),
        plain={"guidance_scale": 1.0, **BINS},
        guided={**TOLD, **BINS},
        empty_first=True,
        backbone="full",  # diffusers 0.42.1 gives the class no LoRA
    ),
    "auraflow": Whole(build=_auraflow, empty_first=True),
    "hunyuan-image": Whole(
        build=_hunyuan,
        plain={"distilled_guidance_scale": 4.0},
        guided=None,
        told=4.0,
    ),
    "wan": Whole(build=_wan, plain={"guidance_scale": 1.0, **FRAME}, guided={**TOLD, **FRAME}),
}
