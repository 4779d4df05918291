"""The real pipelines of diffusers around tiny models: built by their signatures, run by embeddings.

What a pipeline would ask its encoders for is handed in. Where that can't be passed, a method of the
one pipeline beside its `__call__` is replaced; `__call__` itself is always diffusers' own.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKL,
    ClassifierFreeGuidance,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    SD3ControlNetModel,
    UniPCMultistepScheduler,
    modular_pipelines,
)
from diffusers.modular_pipelines.modular_pipeline import BlockState
from torch import Tensor

from shiva_dit.models.families import MODELS
from tests import families, tiny

STEPS = 3
BATCH = 2
FAMILY = {
    "AceStepTransformer1DModel": "ace-step",
    "AllegroTransformer3DModel": "allegro",
    "AuraFlowTransformer2DModel": "auraflow",
    "BriaFiboTransformer2DModel": "bria-fibo",
    "BriaTransformer2DModel": "bria",
    "ChromaTransformer2DModel": "chroma",
    "ChronoEditTransformer3DModel": "chronoedit",
    "CogVideoXTransformer3DModel": "cogvideox",
    "CosmosTransformer3DModel": "cosmos",
    "CogView3PlusTransformer2DModel": "cogview3-plus",
    "CogView4Transformer2DModel": "cogview4",
    "ConsisIDTransformer3DModel": "consisid",
    "DiTTransformer2DModel": "dit",
    "EasyAnimateTransformer3DModel": "easyanimate",
    "ErnieImageTransformer2DModel": "ernie-image",
    "Flux2Transformer2DModel": "flux2-klein",
    "Flux3Transformer2DModel": "flux3",
    "FluxTransformer2DModel": "flux",
    "GlmImageTransformer2DModel": "glm-image",
    "HunyuanDiT2DModel": "hunyuan-dit",
    "HunyuanImageTransformer2DModel": "hunyuan-image",
    "HunyuanVideo15Transformer3DModel": "hunyuan-video-1.5",
    "HunyuanVideoTransformer3DModel": "hunyuan-video",
    "Ideogram4Transformer2DModel": "ideogram4",
    "JoyImageEditPlusTransformer3DModel": "joyimage-plus",
    "JoyImageEditTransformer3DModel": "joyimage",
    "Kandinsky6Transformer3DModel": "kandinsky6",
    "Krea2Transformer2DModel": "krea2",
    "LTX2VideoTransformer3DModel": "ltx2",
    "LTXVideoTransformer3DModel": "ltx",
    "LongCatAudioDiTTransformer": "longcat-audio",
    "LongCatImageTransformer2DModel": "longcat",
    "Lumina2Transformer2DModel": "lumina2",
    "LuminaNextDiT2DModel": "lumina-next",
    "MiniMaxMusic3Transformer1DModel": "minimax-music3",
    "MochiTransformer3DModel": "mochi",
    "MotifVideoTransformer3DModel": "motif-video",
    "OvisImageTransformer2DModel": "ovis-image",
    "PRXTransformer2DModel": "prx",
    "PixArtTransformer2DModel": "pixart-sigma",
    "QwenImage21Transformer2DModel": "qwen-image-2.1",
    "QwenImageTransformer2DModel": "qwen-image",
    "SD3Transformer2DModel": "sd3",
    "SkyReelsV2Transformer3DModel": "skyreels",
    "StableAudio3DiTModel": "stable-audio-3",
    "StableAudioDiTModel": "stable-audio",
    "WanAnimateTransformer3DModel": "wan-animate",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan-vace",
    "ZImageTransformer2DModel": "z-image",
}
"""A tiny model for every class."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN = {"ConsisIDPipeline": "diffusers.pipelines.consisid.pipeline_consisid"}
"""Modules of pipelines that diffusers shows where a package is there which they run without."""


def kind_of(name: str) -> Any:
    """A pipeline's class."""
    if name in HIDDEN:
        return getattr(importlib.import_module(HIDDEN[name]), name)
    return getattr(diffusers, name)


def served_pipelines() -> dict[str, str]:
    """Every pipeline of the installed diffusers whose transformer is of a served class, and it."""
    found = {}
    for name in dir(diffusers):
        if not name.endswith("Pipeline") or "Modular" in name or name.startswith("Onnx"):
            continue
        parameters = inspect.signature(kind_of(name).__init__).parameters
        if "transformer" in parameters:
            words = re.findall(r"\w+", str(parameters["transformer"].annotation))
            served = [word for word in words if word in MODELS]
            if served:
                found[name] = served[0]
    return found


def vae(channels: int) -> Any:
    """A tiny autoencoder of pictures, 8 to 1."""
    made = AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.0,
    )
    tiny.randomize(made, seed=5)
    return made.eval()


def picture() -> Tensor:
    return normal(BATCH, 3, 128, 128, seed=6).clamp(-1, 1)


def left_half() -> Tensor:
    mask = torch.zeros(BATCH, 1, 128, 128)
    mask[..., 64:] = 1.0
    return mask


def _replace(**methods: Callable[..., Any]) -> Callable[[Any], None]:
    def prepare(pipe: Any) -> None:
        for name, method in methods.items():
            setattr(pipe, name, method)

    return prepare


def _given(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _video_of(*others: Any) -> Callable[[Any], None]:
    """Image or video to video, of latents that need no autoencoder."""
    latents = normal(BATCH, 4, 4, 8, 8, seed=8)
    return _replace(
        check_inputs=_given(None),
        prepare_latents=_given((latents, *others) if others else latents),
        encode_image=_given(torch.zeros(1, 1, 24)),
        video_processor=SimpleNamespace(
            preprocess=_given(torch.zeros(1)), preprocess_video=_given(torch.zeros(1))
        ),
    )


def _half_of_channels(pipe: Any) -> None:
    """A model that reads latents and a picture to go by gives as many channels here as it reads."""
    pipe.scheduler.step = lambda noise, t, latents, *args, **kwargs: (0.9 * latents,)


def _fibo(pipe: Any) -> None:
    def encode(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        text, other = normal(BATCH, 7, 24, seed=1), normal(BATCH, 7, 24, seed=3)
        mask = torch.ones(BATCH, 7)
        mask[0, 5:] = 0.0
        layers, others = (
            [normal(BATCH, 7, 12, seed=seed + layer) for layer in range(3)] for seed in (10, 20)
        )
        return text, other, torch.zeros(7, 3), mask, mask, layers, others

    pipe.encode_prompt = encode


def _texts() -> tuple[Tensor, Tensor]:
    return normal(BATCH, 7, 24, seed=1), normal(BATCH, 7, 24, seed=3)


def _stable_audio(pipe: Any) -> None:
    both = normal(2 * BATCH, 5, 24, seed=1)
    pipe.check_inputs = _given(None)
    pipe.encode_prompt = lambda prompt, device, guided, *args: both[: BATCH * (1 + guided)]
    pipe.encode_duration = lambda start, end, device, guided, batch: (
        normal(batch * (1 + guided), 1, 24, seed=2),
        normal(batch * (1 + guided), 1, 24, seed=4),
    )


def _stable_audio_3(pipe: Any) -> None:
    texts, mask = _texts(), torch.ones(BATCH, 7)
    pipe.encode_prompt = lambda prompt, *args: (texts[0] if prompt == "yes" else texts[1], mask)
    pipe.encode_duration = _given(normal(BATCH, 20, seed=2))
    pipe.prepare_cross_attention = lambda text, mask, times: (text, mask)
    pipe.check_inputs = _given(None)
    pipe.prepare_latents = _given(normal(BATCH, 4, 64, seed=8))


def _ace_step(pipe: Any) -> None:
    text, other = _texts()
    encoder: Any = lambda **given: (text, torch.ones(BATCH, 7))  # noqa: E731
    encoder.null_condition_emb = other[:1, :1]
    encoder.silence_latent = torch.zeros(1, 1000, 4)
    pipe.condition_encoder = encoder
    pipe.encode_prompt = _given((None,) * 4)
    pipe.prepare_src_latents = _given((normal(BATCH, 128, 4, seed=6), 128))
    pipe.prepare_latents = _given(normal(BATCH, 128, 4, seed=8))
    pipe._build_chunk_mask = _given(torch.ones(BATCH, 128, 4))


def _ltx2(pipe: Any) -> None:
    pipe.connectors = lambda text, mask, **options: (text, -text, mask)
    pipe.prepare_audio_latents = _given(normal(BATCH, 26, 3, seed=9))


def _ideogram4(pipe: Any) -> None:
    given = families.arguments("ideogram4", BATCH)
    names = "encoder_hidden_states", "position_ids", "segment_ids", "indicator"
    pipe.encode_prompt = _given(tuple(given[name] for name in names))


def _joyimage_plus(pipe: Any) -> None:
    given = families.arguments("joyimage-plus", BATCH)
    texts, mask = _texts(), torch.ones(BATCH, 7, dtype=torch.long)
    target = torch.arange(64).repeat(BATCH, 1) < 48
    pipe.check_inputs = _given(None)
    pipe.prepare_latents = _given((given["hidden_states"], target, given["shape_list"]))
    encoded = iter([(texts[0], mask), (texts[1], mask)])
    pipe.encode_prompt_multiple_images = lambda *args, **options: next(encoded)


def _longcat_audio(pipe: Any) -> None:
    lengths = torch.tensor([4, 7])
    pipe.encode_prompt = lambda prompts, device: (_texts()[prompts[0] == "no"], lengths)


def _beside(pipe: Any) -> None:
    """No channels of a picture to go by."""
    pipe.prepare_cond_latents_and_mask = lambda latents, *args: (latents[:, :0],) * 2
    pipe.vision_num_semantic_tokens, pipe.vision_states_dim = 729, 10


def _chronoedit(pipe: Any) -> None:
    _video_of(torch.zeros(BATCH, 0, 4, 8, 8))(pipe)
    nothing = SimpleNamespace(to=_given(None))
    pipe.encode_image = _given(SimpleNamespace(repeat=_given(nothing)))


def _cogvideox_image(pipe: Any) -> None:
    half = normal(BATCH, 4, 2, 8, 8, seed=8)
    _video_of()(pipe)
    pipe.prepare_latents = _given((half, half))
    _half_of_channels(pipe)


def _cogvideox_control(pipe: Any) -> None:
    half = normal(BATCH, 4, 2, 8, 8, seed=8)
    _video_of()(pipe)
    pipe.prepare_latents = _given(half)
    pipe.prepare_control_latents = _given((None, half.transpose(1, 2)))
    _half_of_channels(pipe)


def _hunyuan_video(pipe: Any) -> None:
    def encode(*args: Any, prompt_embeds: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return prompt_embeds, normal(BATCH, 20, seed=2), torch.ones(BATCH, 7)

    half = normal(BATCH, 2, 4, 8, 8, seed=8)
    _video_of()(pipe)
    pipe.encode_prompt, pipe.prepare_latents = encode, _given((half, half))
    _half_of_channels(pipe)


def _hunyuan_image_to_video(pipe: Any) -> None:
    _hunyuan_video(pipe)
    pipe.prepare_latents = _given(
        (normal(BATCH, 2, 4, 8, 8, seed=8), normal(BATCH, 1, 4, 8, 8, seed=9))
    )
    pipe.transformer.register_to_config(image_condition_type="latent_concat")


class _Some:
    """Stands for a part that is asked for its dtype and configuration alone."""

    def __init__(self, **config: Any) -> None:
        usual = {"scaling_factor": 1.0, "scale_factor_temporal": 4, "scale_factor_spatial": 8}
        self.config, self.dtype = SimpleNamespace(**usual, **config), torch.float32
        self.spatial_compression_ratio, self.temporal_compression_ratio = 8, 4
        self.temperal_downsample = [False, True, True]


def _sound() -> Any:
    made = _Some(sampling_rate=64, audio_channels=1, latent_dim=4)
    made.hop_length = made.downsampling_ratio = 1
    return made


class _Checker:
    """Stands for a checker of prompts, of which there are none."""

    to = staticmethod(_given(None))


def _ltx2_vae(channels: int, times: int) -> Any:
    made = _Some(sample_rate=16000, mel_hop_length=160, mel_bins=12, latent_channels=8)
    made.latents_mean, made.latents_std = torch.zeros(channels), torch.ones(channels)
    made.spatial_compression_ratio, made.temporal_compression_ratio = 32, times
    made.mel_compression_ratio = 4
    return made


def _of_one_timestep() -> dict[str, Any]:
    return {"scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)}


class _Reader:
    """Stands for a processor of prompts, of whose template the length is asked."""

    tokenizer = SimpleNamespace(encode=_given([0]))
    apply_chat_template = staticmethod(_given([[0]]))


def _bn_of_flux2() -> Any:
    made = _Some(batch_norm_eps=1e-4, block_out_channels=(4,) * 4)
    made.bn = SimpleNamespace(running_mean=torch.zeros(4), running_var=torch.ones(4))
    return made


_PICTURE = {"image": picture()}
_PAINT = {"image": picture(), "mask_image": left_half()}
_CHROMA = {
    "prompt_attention_mask": torch.ones(BATCH, 7),
    "negative_prompt_attention_mask": torch.ones(BATCH, 7),
}
_PIXART = {"negative_prompt": None, "use_resolution_binning": False}
_HUNYUAN_DIT: dict[str, Any] = {
    "use_resolution_binning": False,
    "prompt_embeds": normal(BATCH, 3, 24, seed=1),
    "negative_prompt_embeds": normal(BATCH, 3, 24, seed=3),
    "prompt_attention_mask": torch.ones(BATCH, 3),
    "negative_prompt_attention_mask": torch.ones(BATCH, 3),
    "prompt_embeds_2": normal(BATCH, 4, 16, seed=1),
    "negative_prompt_embeds_2": normal(BATCH, 4, 16, seed=3),
    "prompt_attention_mask_2": torch.ones(BATCH, 4),
    "negative_prompt_attention_mask_2": torch.ones(BATCH, 4),
}
_Z_IMAGE: dict[str, Any] = {
    "prompt_embeds": list(normal(BATCH, 7, 24, seed=1)),
    "negative_prompt_embeds": list(normal(BATCH, 7, 24, seed=3)),
}

CALLS: dict[str, dict[str, Any]] = {
    "AllegroPipeline": {"negative_prompt": None, "num_frames": 16},
    "ChromaImg2ImgPipeline": {**_PICTURE, **_CHROMA},
    "ChromaInpaintPipeline": {**_PAINT, **_CHROMA},
    "ChromaPipeline": _CHROMA,
    "ChronoEditPipeline": {"image": picture()[:1]},
    "CogVideoXFunControlPipeline": {
        "control_video": torch.zeros(1, 13, 3, 64, 64),
        "height": 64,
        "width": 64,
    },
    "CogVideoXImageToVideoPipeline": {"image": picture()[:1]},
    "CogVideoXVideoToVideoPipeline": {"video": [picture()]},
    "CogView4ControlPipeline": {"control_image": picture()},
    "AceStepPipeline": {"prompt": [""] * BATCH},
    "BriaFiboPipeline": {"prompt": [""] * BATCH},
    "ErnieImagePipeline": {
        "height": 256,
        "width": 256,
        "prompt_embeds": list(normal(BATCH, 7, 24, seed=1)),
        "negative_prompt_embeds": list(normal(BATCH, 7, 24, seed=3)),
    },
    "LongCatAudioDiTPipeline": {
        "prompt": ["yes"] * BATCH,
        "negative_prompt": "no",
        "latents": normal(BATCH, 64, 4, seed=8),
    },
    "StableAudio3Pipeline": {"prompt": "yes", "negative_prompt": "no"},
    "Ideogram4Pipeline": {
        "prompt": [""] * BATCH,
        "max_sequence_length": 7,
        "guidance_schedule": None,
    },
    "JoyImageEditPlusPipeline": {"prompt": [""] * BATCH, "images": [[]] * BATCH},
    "LTX2Pipeline": {
        "height": 128,
        "width": 128,
        "num_frames": 25,
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
        "spatio_temporal_guidance_blocks": None,
    },
    "ConsisIDPipeline": {"image": picture()[:1]},
    "GlmImagePipeline": {"prior_token_ids": torch.arange(BATCH * 64).view(BATCH, 64) % 50},
    "HunyuanVideo15Pipeline": {
        "num_frames": 13,
        "prompt_embeds_2": normal(BATCH, 256, 12, seed=1),
        "negative_prompt_embeds_2": normal(BATCH, 256, 12, seed=3),
        "prompt_embeds_mask_2": torch.ones(BATCH, 256),
        "negative_prompt_embeds_mask_2": torch.ones(BATCH, 256),
    },
    "DiTPipeline": {"class_labels": [3, 7], "output_type": "pt"},
    "FluxControlNetPipeline": {"control_image": picture()},
    "FluxImg2ImgPipeline": _PICTURE,
    "FluxInpaintPipeline": _PAINT,
    "FluxKontextPipeline": {"max_area": 128 * 128},
    "FluxKontextInpaintPipeline": {**_PAINT, "_auto_resize": False, "max_area": 128 * 128},
    "HunyuanDiTPAGPipeline": {**_HUNYUAN_DIT, "pag_scale": 0.0},
    "HunyuanDiTPipeline": _HUNYUAN_DIT,
    "HunyuanImagePipeline": {
        "height": 512,
        "width": 512,
        "prompt_embeds_2": normal(BATCH, 7, 24, seed=1),
        "negative_prompt_embeds_2": normal(BATCH, 7, 24, seed=3),
        "prompt_embeds_mask_2": torch.ones(BATCH, 7),
        "negative_prompt_embeds_mask_2": torch.ones(BATCH, 7),
    },
    "HunyuanSkyreelsImageToVideoPipeline": {"image": picture()[:1]},
    "HunyuanVideoImageToVideoPipeline": {"image": picture()[:1]},
    "Krea2Pipeline": {
        "prompt_embeds": normal(BATCH, 7, 3, 24, seed=1),
        "negative_prompt_embeds": normal(BATCH, 7, 3, 24, seed=3),
        "prompt_embeds_mask": torch.ones(BATCH, 7, dtype=torch.bool),
        "negative_prompt_embeds_mask": torch.ones(BATCH, 7, dtype=torch.bool),
    },
    "LucyEditPipeline": {"video": [picture()]},
    "WanImageToVideoPipeline": {"image": picture()[:1]},
    "LTXPipeline": {"height": 128, "width": 128, "num_frames": 25},
    "LTXConditionPipeline": {"height": 128, "width": 128, "num_frames": 25},
    "OvisImagePipeline": {"negative_prompt": None},
    "PRXPipeline": {"use_resolution_binning": False},
    "PRXPixelPipeline": {"use_resolution_binning": False, "height": 16, "width": 16},
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPAGPipeline": {**_PIXART, "pag_scale": 0.0},
    "PixArtSigmaPipeline": _PIXART,
    "SkyReelsV2DiffusionForcingPipeline": {"prompt": None},
    "StableDiffusion3ControlNetPipeline": {"control_image": picture()},
    "StableDiffusion3Img2ImgPipeline": _PICTURE,
    "StableDiffusion3InpaintPipeline": _PAINT,
    "StableDiffusion3PAGImg2ImgPipeline": {**_PICTURE, "pag_scale": 0.0},
    "StableDiffusion3PAGPipeline": {"pag_scale": 0.0},
    "WanVideoToVideoPipeline": {"video": [picture()]},
    "ZImageImg2ImgPipeline": {**_Z_IMAGE, **_PICTURE},
    "ZImageInpaintPipeline": {**_Z_IMAGE, **_PAINT},
    "ZImagePipeline": _Z_IMAGE,
}
"""What calls take beside the usual."""

PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "BriaPipeline": lambda model: {"vae": vae(1)},
    "ChronoEditPipeline": lambda model: {
        "vae": _Some(z_dim=4),
        "scheduler": UniPCMultistepScheduler(),
    },
    "DiTPipeline": lambda model: {"vae": vae(4)},
    "FluxControlNetPipeline": lambda model: {
        "vae": vae(1),
        "controlnet": FluxControlNetModel.from_transformer(
            model, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
        ),
    },
    "StableDiffusion3ControlNetPipeline": lambda model: {
        "vae": vae(4),
        "controlnet": SD3ControlNetModel.from_transformer(
            model, num_layers=2, num_extra_conditioning_channels=0
        ),
    },
    "CogView4ControlPipeline": lambda model: {"vae": vae(2)},
    "EasyAnimatePipeline": lambda model: {"vae": _Some(latent_channels=4)},
    "Flux2KleinPipeline": lambda model: {"vae": _bn_of_flux2()},
    "HunyuanVideo15Pipeline": lambda model: {
        "vae": _Some(latent_channels=4),
        "guider": ClassifierFreeGuidance(),
    },
    "LongCatAudioDiTPipeline": lambda model: {
        "vae": _Some(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    },
    "QwenImage21Pipeline": lambda model: {"vae": _Some(z_dim=4), "processor": _Reader()},
    "StableAudioPipeline": lambda model: {
        "vae": _sound(),
        "scheduler": CosineDPMSolverMultistepScheduler(),
    },
    "StableAudio3Pipeline": lambda model: {"vae": _sound(), **_of_one_timestep()},
    "AceStepPipeline": lambda model: _of_one_timestep(),
    "Cosmos2TextToImagePipeline": lambda model: {
        "vae": _Some(),
        "safety_checker": _Checker(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    },
    "Ideogram4Pipeline": lambda model: {"unconditional_transformer": families.made("ideogram4")},
    "JoyImageEditPlusPipeline": lambda model: {"vae": _Some(latent_channels=4)},
    "LTX2Pipeline": lambda model: {"vae": _ltx2_vae(4, 8), "audio_vae": _ltx2_vae(3, 4)},
    "MotifVideoPipeline": lambda model: {
        "vae": _Some(z_dim=2),
        "guider": ClassifierFreeGuidance(),
    },
    "HunyuanSkyreelsImageToVideoPipeline": lambda model: {"vae": _Some()},
    "HunyuanVideoImageToVideoPipeline": lambda model: {"vae": _Some()},
    "LTXConditionPipeline": lambda model: {"vae": _Some()},
    "SkyReelsV2DiffusionForcingPipeline": lambda model: {
        "scheduler": UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    },
    "HunyuanImagePipeline": lambda model: {"guider": AdaptiveProjectedMixGuidance()},
    "WanImageToVideoPipeline": lambda model: {"vae": _Some(z_dim=4)},
    "WanVACEPipeline": lambda model: {"vae": _Some()},
}

PREPARED: dict[str, Callable[[Any], None]] = {
    "AceStepPipeline": _ace_step,
    "BriaFiboPipeline": _fibo,
    "Ideogram4Pipeline": _ideogram4,
    "JoyImageEditPlusPipeline": _joyimage_plus,
    "LTX2Pipeline": _ltx2,
    "LongCatAudioDiTPipeline": _longcat_audio,
    "StableAudio3Pipeline": _stable_audio_3,
    "StableAudioPipeline": _stable_audio,
    "ConsisIDPipeline": _cogvideox_image,
    "HunyuanVideo15Pipeline": _beside,
    "MotifVideoPipeline": _replace(prepare_latents=_given(normal(BATCH, 2, 4, 8, 8, seed=8))),
    "ChromaInpaintPipeline": lambda pipe: pipe.transformer.register_to_config(
        guidance_embeds=False  # diffusers 0.42.1 asks for what Chroma hasn't
    ),
    "ChronoEditPipeline": _chronoedit,
    "CogVideoXFunControlPipeline": _cogvideox_control,
    "CogView4ControlPipeline": _half_of_channels,
    "CogVideoXImageToVideoPipeline": _cogvideox_image,
    "CogVideoXVideoToVideoPipeline": _video_of(),
    "HunyuanSkyreelsImageToVideoPipeline": _hunyuan_video,
    "HunyuanVideoImageToVideoPipeline": _hunyuan_image_to_video,
    "LucyEditPipeline": _video_of(torch.zeros(BATCH, 0, 4, 8, 8)),
    "StableDiffusion3InpaintPipeline": lambda pipe: pipe.transformer.register_to_config(
        in_channels=16  # what it asks for of models that paint without a mask
    ),
    "WanImageToVideoPipeline": _video_of(torch.zeros(BATCH, 0, 4, 8, 8)),
    "WanVACEPipeline": _replace(
        preprocess_conditions=_given((None, None, [[]])),
        prepare_video_latents=_given(normal(BATCH, 6, 4, 8, 8, seed=8)),
        prepare_masks=_given(torch.zeros(BATCH, 0, 4, 8, 8)),
    ),
    "WanVideoToVideoPipeline": _video_of(),
}
"""Methods beside `__call__` that are replaced."""
for _name in ("LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"):
    for _held in (CALLS, PARTS, PREPARED):
        _held[_name] = _held["LTX2Pipeline"]  # type: ignore[index]
WITH_PICTURES = ("Img2Img", "Inpaint")
ONE_OF_EACH = """
    AllegroPipeline AuraFlowPipeline BriaPipeline ChromaPipeline ChronoEditPipeline
    CogVideoXPipeline CogView3PlusPipeline CogView4Pipeline DiTPipeline EasyAnimatePipeline
    Flux2KleinPipeline FluxPipeline HunyuanDiTPipeline HunyuanImagePipeline HunyuanVideoPipeline
    Krea2Pipeline LTXPipeline Lumina2Pipeline LuminaPipeline MochiPipeline OvisImagePipeline
    PRXPipeline PixArtSigmaPipeline QwenImagePipeline StableDiffusion3Pipeline SkyReelsV2Pipeline
    WanPipeline WanVACEPipeline ZImagePipeline
""".split()  # noqa: SIM905
"""A pipeline of every served class but LongCat-Image's, whose own fixes its channels."""
ONE = ("PRXPipeline", "PRXPixelPipeline")
"""Those that take one image per call under guidance (in diffusers 0.42.1)."""


def build(name: str, kind: Any = None) -> Any:
    """A pipeline by its class name (or a kind of it), without progress bars."""
    base = kind_of(name)
    model_class = served_pipelines()[name]
    model = families.made(FAMILY[model_class])
    parts: dict[str, Any] = {"transformer": model}
    for part in list(inspect.signature(base.__init__).parameters.values())[1:]:
        if part.name == "scheduler":
            diffusion = MODELS[model_class].learned_by == "diffusion schedule"
            mochi = {"invert_sigmas": True} if "Mochi" in name else {}
            parts[part.name] = (
                DDIMScheduler() if diffusion else FlowMatchEulerDiscreteScheduler(**mochi)
            )
        elif part.name == "vae" and any(word in name for word in WITH_PICTURES):
            parts[part.name] = vae(1 if model_class.startswith(("Flux", "Chroma")) else 4)
        elif part.default is inspect.Parameter.empty:
            parts.setdefault(part.name, None)
    parts.update(PARTS.get(name, lambda model: {})(model))
    pipe = (kind or base)(**parts)
    pipe.set_progress_bar_config(disable=True)
    PREPARED.get(name, lambda pipe: None)(pipe)
    return pipe


def call(name: str, pipe: Any, guided: bool = True, **options: Any) -> Any:
    """Two images or videos of a few steps."""
    known = inspect.signature(kind_of(name).__call__).parameters
    batch = 1 if name in ONE else BATCH
    usual: dict[str, Any] = {
        "height": 128,
        "width": 128,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "guidance_scale": 4.0 if guided else 0.0 if name == "Krea2Pipeline" else 1.0,
        "true_cfg_scale": 4.0 if guided else 1.0,
        "generator": torch.Generator().manual_seed(0),
    }
    for seed, word in ((1, ""), (3, "negative_")):
        usual |= {
            f"{word}prompt_embeds": normal(batch, 7, 24, seed=seed),
            f"{word}pooled_prompt_embeds": normal(batch, 20, seed=seed + 1),
            f"{word}prompt_attention_mask": torch.ones(batch, 7, dtype=torch.long),
            f"{word}prompt_embeds_mask": torch.ones(batch, 7, dtype=torch.long),
        }
    if "num_frames" in known or "video" in known:
        usual |= {"num_frames": 13, "height": 64, "width": 64}
    given = {key: value for key, value in usual.items() if key in known}
    return pipe(**{**given, **CALLS.get(name, {}), **options})


# --- modular pipelines --------------------------------------------------------------------------


PARTS_TOO_MANY = (
    "EchoLoopDenoiser",
    "Flux3DistilledLoopDenoiser",
    "Ideogram4LoopDenoiser",
    "LTX2LoopDenoiser",
)
"""Blocks that ask for more than is put together below: of LTX-2 with its sound, of Flux.3 with the
time that a step ends at, and of Ideogram 4, whose other pass another model runs."""


def _fields(kind: Any, given: dict[str, Any], text: Any, other: Any) -> dict[str, Any]:
    """What Flux.3's blocks are handed, and others."""
    if not kind.__name__.startswith("Flux3"):
        return {"img_shapes": given.get("img_shapes")}
    fields = {name: given[name] for name in ("img_ids", "txt_ids")}
    return {**fields, "prompt_embeds": text, "negative_prompt_embeds": other} | (
        {} if "Distilled" in kind.__name__ else {"negative_txt_ids": given["txt_ids"]}
    )


def served_denoisers() -> dict[str, tuple[Any, str, bool]]:
    """Every block of the modular pipelines that calls a transformer of a served class.

    Returns:
        By name: the block's class, the transformer's, and whether a guider runs its passes.
    """
    found = {}
    for package in pkgutil.iter_modules(modular_pipelines.__path__):
        name = f"{modular_pipelines.__name__}.{package.name}.denoise"
        if not package.ispkg or importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        for key, kind in vars(module).items():
            own = key.endswith("Denoiser") and not key.endswith(("BeforeDenoiser", "AfterDenoiser"))
            if not own or kind.__module__ != name:
                continue
            if key in PARTS_TOO_MANY:
                continue
            parts = {p.name: p.type_hint.__name__ for p in kind().expected_components}
            if parts.get("transformer") in MODELS:
                found[key] = kind, parts["transformer"], "guider" in parts
    return found


def denoise(kind: Any, model: Any, given: dict[str, Any], guider: Any) -> None:
    """Two steps of such a block, by hand: what blocks before it would have prepared is given."""
    sample = given.get("hidden_states", given.get("x"))
    time = given.get("timestep", given.get("t"))
    named = ("encoder_hidden_states", "cap_feats", "text_bth")
    text = next(given[name] for name in named if name in given)
    other = [-part for part in text] if isinstance(text, list) else -text
    mask = given.get("encoder_attention_mask", given.get("encoder_hidden_states_mask"))
    nothing = torch.zeros(BATCH, 0, 4)
    usual: dict[str, Any] = {
        "latents": sample,
        "latent_model_input": sample,
        "image_latents": None if kind.__name__.startswith("Flux2") else nothing,
        "latent_height": 4,
        "latent_width": 4,
        "latent_num_frames": 4,
        "latent_ids": given.get("img_ids"),
        "dtype": torch.float32,
        "timestep": time,
        "timestep_adjusted": time,
        "rope_interpolation_scale": None,
        "guidance": None,
        "prompt_embeds": text,
        "pooled_prompt_embeds": given.get("pooled_projections"),
        "prompt_embeds_mask": mask,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": other,
        "negative_pooled_prompt_embeds": given.get("pooled_projections"),
        "negative_prompt_embeds_mask": mask,
        "negative_prompt_attention_mask": mask,
        "negative_text_bth": other,
        "negative_text_lens": given.get("text_lens"),
        "image_pad_mask": torch.zeros(BATCH, 7, dtype=torch.bool),
        "negative_image_pad_mask": torch.zeros(BATCH, 7, dtype=torch.bool),
        "cache_enabled": True,
        "kv_caches": {},
        "prompt_embeds_2": given.get("encoder_hidden_states_2"),
        "prompt_embeds_mask_2": given.get("encoder_attention_mask_2"),
        "negative_prompt_embeds_2": given.get("encoder_hidden_states_2"),
        "negative_prompt_embeds_mask_2": given.get("encoder_attention_mask_2"),
        "cond_latents_concat": sample[:, :0] if isinstance(sample, Tensor) else None,
        "mask_concat": sample[:, :0] if isinstance(sample, Tensor) else None,
        "negative_txt_ids": given.get("txt_ids"),
        "attention_kwargs": None,
        "joint_attention_kwargs": None,
        "denoiser_input_fields": _fields(kind, given, text, other),
        "padding_mask": None,
        "timesteps": 1000.0 * time,
        "additional_cond_kwargs": {},
        "num_inference_steps": 2,
        "num_frames": 13,
        "height": 32,
        "width": 32,
        "frame_rate": 25,
    }
    left_out = "hidden_states|num_frames|height|width"
    own = {key: value for key, value in given.items() if not re.search(left_out, key)}
    state = BlockState(**{**usual, **own})
    components = SimpleNamespace(
        transformer=model,
        transformer_2=model,
        guider=guider,
        guider_2=guider,
        config=SimpleNamespace(boundary_ratio=0.9),
        num_train_timesteps=1000,
        vae_temporal_compression_ratio=4,
        vae_spatial_compression_ratio=8,
    )
    block = kind()
    for step in range(2):
        block(components, state, i=step, t=time[0] + 0.0)
