"""Tiny real models, inputs, adapters and pipelines: diffusers' own classes, small and random."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.backbone import PEFT_NAME, add_lora, backbone_weights

KINDS = ("plain", "dual")
NUM_LAYERS = 4
NUM_TOKENS = 64
TEXT_TOKENS = 7
TEXT_DIM, POOLED_DIM, CHANNELS, LATENT = 24, 20, 4, 16


def randomize(module: nn.Module, seed: int, std: float = 0.1) -> None:
    """Fill every parameter: freshly built, adaLN gates and LoRA's B are zero or near it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def fill_lora(model: nn.Module, name: str, seed: int) -> None:
    """Fill the LoRA or DoRA of a name, whose initial values come from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                # DoRA's magnitudes are positive: near the norms that they start from.
                parameter.copy_(parameter * (1 + noise) if "magnitude" in key else noise)


def sd3(kind: str = "plain", num_layers: int = NUM_LAYERS, seed: int = 0) -> SD3Transformer2DModel:
    """SD3 ("plain"), or SD3.5-Medium ("dual"): second attention in the first half, rms_norm."""
    dual = kind == "dual"
    model = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED_DIM,
        pos_embed_max_size=LATENT,
        dual_attention_layers=tuple(range(num_layers // 2)) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    randomize(model, seed)
    return model.eval()


LORA_RANK = 3


@cache
def _tuned(method: str, kind: str, num_layers: int) -> tuple[dict[str, Tensor], Tensor]:
    model = sd3(kind, num_layers)
    if method == "full":
        randomize(model, seed=7)
    elif method != "frozen":
        dora = method == "dora"
        add_lora(model, {"r": LORA_RANK, "lora_alpha": LORA_RANK, "use_dora": dora})
        fill_lora(model, PEFT_NAME, seed=7)
    return backbone_weights(model, method), run(model, inputs())


def tuned(
    method: str, kind: str = "plain", num_layers: int = NUM_LAYERS
) -> tuple[dict[str, Tensor], Tensor]:
    """Weights of a backbone that was tuned, and what the tuned model gives for `inputs()`."""
    weights, output = _tuned(method, kind, num_layers)
    return {name: value.clone() for name, value in weights.items()}, output


def inputs(batch: int = 2, t: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of one forward of `sd3`; every sample differs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, CHANNELS, LATENT, LATENT, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "pooled_projections": torch.randn(batch, POOLED_DIM, generator=generator),
        "timestep": torch.full((batch,), 1000.0 * t),
    }


def run(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        return model(**arguments).sample


def adapter(model: nn.Module, schedule: Schedule | None = None, **options: Any) -> ShivaAdapter:
    """A ShivaAdapter with a random router, small, for a model."""
    made = ShivaAdapter(ShivaConfig.for_model(model, **{"hidden": 8, **options}), schedule)
    randomize(made.router, seed=1, std=1.0)
    if made.updates is not None:
        randomize(made.updates, seed=3, std=0.3)
    return made


def from_counts(counts: list[list[int]], num_tokens: int = NUM_TOKENS) -> Schedule:
    """The schedule that keeps exactly these tokens, by (time bin, block)."""
    full = [b for b in range(len(counts[0])) if all(row[b] == num_tokens for row in counts)]
    return Schedule.from_ratios([[k / num_tokens for k in row] for row in counts], full)


def pipeline(
    model: SD3Transformer2DModel, kind: Any = StableDiffusion3Pipeline, **options: Any
) -> StableDiffusion3Pipeline:
    """A pipeline around a transformer; text comes as embeddings, images leave as latents."""
    absent: Any = None
    pipe = kind(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=absent,
        text_encoder=absent,
        tokenizer=absent,
        text_encoder_2=absent,
        tokenizer_2=absent,
        text_encoder_3=absent,
        tokenizer_3=absent,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: StableDiffusion3Pipeline, guidance: float, batch: int = 2, **options: Any
) -> Tensor:
    """Latents of a few steps from a fixed seed."""
    generator = torch.Generator().manual_seed(3)

    def text(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    call: Any = pipe
    return call(
        prompt_embeds=text(TEXT_TOKENS, TEXT_DIM),
        negative_prompt_embeds=text(TEXT_TOKENS, TEXT_DIM),
        pooled_prompt_embeds=text(POOLED_DIM),
        negative_pooled_prompt_embeds=text(POOLED_DIM),
        guidance_scale=guidance,
        generator=generator,
        output_type="latent",
        **{"num_inference_steps": 4, **options},
    ).images


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could leave behind: modules, attributes, hooks, flags."""
    marks: dict[str, Any] = {}
    for name, module in model.named_modules():
        marks[name] = (
            id(module),
            {
                key: [id(each) for each in value] if isinstance(value, list) else id(value)
                for key, value in module.__dict__.items()
            },
        )
        for key, value in module.__dict__.items():
            if isinstance(value, dict):
                marks[f"{name}:{key}"] = [(k, id(v)) for k, v in value.items()]
        for key, parameter in module.named_parameters(recurse=False):
            marks[f"{name}:{key}:requires_grad"] = parameter.requires_grad
    return marks


def edit_config(folder: Path, *, sign: bool = True, **changes: Any) -> None:
    """Rewrite top-level keys of an adapter's config.json; a None removes the key.

    `sign` makes the digest fit again, for what a digest alone must not have to catch.
    """
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    data = {k: v for k, v in data.items() if v is not None}
    if sign:
        rest = {k: v for k, v in data.items() if k != "digest"}
        text = json.dumps(rest, sort_keys=True)
        data["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(data))
