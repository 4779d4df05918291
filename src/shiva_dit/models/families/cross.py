"""Images by cross attention to text, or none (DiT): PixArt, Hunyuan-DiT, Lumina-Next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from shiva_dit.models import examples
from shiva_dit.models.examples import Size
from shiva_dit.models.rows import TABLE, Rows
from shiva_dit.models.spec import BlockSpec, ModelSpec, SitePlace, given, mean_text, text_mean


def _class_embedding(model: Any, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    """The first block's class embedding, without its random dropping of labels in training."""
    labels = given(model, arguments, "class_labels")
    table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    return table(labels).detach()


def _clip_text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    text: Tensor = given(model, arguments, "encoder_hidden_states")
    return mean_text(text, arguments.get("text_embedding_mask"))


def _skipped_into(model: Any) -> tuple[int, ...]:
    """Blocks that first mix in an earlier block's output, for all tokens."""
    return tuple(range(len(model.blocks) // 2 + 1, len(model.blocks)))


def _classes(model: Any, size: Size) -> Int[Tensor, " B"]:
    return torch.arange(size.batch) % model.config.num_embeds_ada_norm


def _resolution(model: Any, size: Size) -> dict[str, Tensor | None]:
    if not model.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    return {
        "resolution": size.draw(size.batch, 2),
        "aspect_ratio": size.draw(size.batch, 1),
    }


def _t5_tokens(config: Mapping[str, Any], text_tokens: int) -> dict[str, int]:
    """The rest of the text is T5's."""
    clip = config["text_len"]
    if text_tokens <= clip:
        raise ValueError(
            f"{clip} of Hunyuan-DiT's text tokens are CLIP's and the others T5's: text_tokens must "
            f"be more than {clip}, got {text_tokens}."
        )
    return {"text_len_t5": text_tokens - clip}


def _part_of_text(length: str, width: str | None = None) -> examples.Input:
    """Text of one of Hunyuan-DiT's two encoders, or the mask of it."""

    def make(model: Any, size: Size) -> Tensor:
        tokens = model.config[length]
        if width is None:
            return torch.ones(size.batch, tokens, dtype=torch.long)
        return size.draw(size.batch, tokens, model.config[width])

    return make


def _sizes_and_places(model: Any, size: Size) -> Float[Tensor, "B 6"] | None:
    styled = model.config.use_style_cond_and_image_meta_size
    return torch.zeros(size.batch, 6) if styled else None


def _style(model: Any, size: Size) -> Int[Tensor, " B"] | None:
    styled = model.config.use_style_cond_and_image_meta_size
    return torch.zeros(size.batch, dtype=torch.long) if styled else None


def _grid_table(model: Any, size: Size) -> Complex[Tensor, "H W d"]:
    width = model.config.hidden_size // model.config.num_attention_heads
    angles = torch.zeros(size.height, size.width, width // 2)
    return torch.polar(torch.ones_like(angles), angles)


BLOCKS = (
    BlockSpec(
        block_class="BasicTransformerBlock",
        value_modules=("attn1.to_v",),
        rows={"attention_mask": Rows(axis=-1)},
        sites={
            "attention": (SitePlace("attn1"),),
            "cross_attention": (SitePlace("attn2"),),
            "feed_forward": (SitePlace("ff"),),
            "heads": (SitePlace("attn1.to_out.0"),),
            "hidden": (SitePlace("ff.net.2"),),
        },
    ),
    BlockSpec(
        block_class="HunyuanDiTBlock",
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": TABLE},
    ),
    BlockSpec(
        block_class="LuminaNextDiTBlock",
        value_modules=("attn1.to_v",),
        rows={"image_rotary_emb": Rows(), "attention_mask": Rows()},
    ),
)

MODELS = (
    ModelSpec(
        model_class="PixArtTransformer2DModel",
        name="PixArt-Alpha and -Sigma",
        learned_by="diffusion schedule",
        time_embedder="adaln_single.emb.timestep_embedder",
        context=text_mean("encoder_attention_mask"),
        guidance="one batch",
        text_tokens=300,
        inputs={
            "hidden_states": examples.image,
            "encoder_hidden_states": examples.text("caption_channels", "cross_attention_dim"),
            "encoder_attention_mask": examples.mask(torch.float32),
            "added_cond_kwargs": _resolution,
        },
    ),
    ModelSpec(
        model_class="DiTTransformer2DModel",
        name="DiT",
        context_is="class",
        learned_by="diffusion schedule",
        time_embedder=None,  # every block has one of its own
        context=_class_embedding,
        guidance="one batch",
        text_tokens=0,
        sizes=lambda model, i: (1, 2 * i, 2 * i),  # it takes squares alone
        inputs={"hidden_states": examples.image, "class_labels": _classes},
    ),
    ModelSpec(
        model_class="HunyuanDiT2DModel",
        name="Hunyuan-DiT (its first half)",
        block_lists=("blocks",),
        full_blocks=_skipped_into,
        learned_by="diffusion schedule",
        time_embedder="time_extra_emb.timestep_embedder",
        context=_clip_text,
        guidance="one batch",
        text_tokens=333,
        for_text=_t5_tokens,
        inputs={
            "hidden_states": examples.image,
            "encoder_hidden_states": _part_of_text("text_len", "cross_attention_dim"),
            "text_embedding_mask": _part_of_text("text_len"),
            "encoder_hidden_states_t5": _part_of_text("text_len_t5", "cross_attention_dim_t5"),
            "text_embedding_mask_t5": _part_of_text("text_len_t5"),
            "image_rotary_emb": examples.angles("attention_head_dim"),
            "image_meta_size": _sizes_and_places,
            "style": _style,
        },
    ),
    ModelSpec(
        model_class="LuminaNextDiT2DModel",
        name="Lumina-Next",
        block_lists=("layers",),
        noise_timestep=0.0,
        clean_timestep=1.0,
        time_embedder="time_caption_embed.timestep_embedder",
        context=text_mean("encoder_mask"),
        guidance="one batch",
        text_tokens=256,
        inputs={
            "hidden_states": examples.image,
            "encoder_hidden_states": examples.text("cross_attention_dim"),
            "encoder_mask": examples.mask(),
            "image_rotary_emb": _grid_table,
            "cross_attention_kwargs": lambda model, size: {},
        },
    ),
)
