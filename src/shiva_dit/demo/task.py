"""What a demo task is: captioned pictures with known truth, a backbone, and a judge of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shiva_dit.demo.captions import CaptionEncoder
from shiva_dit.demo.judge import Judge, JudgeTraining, TrainedJudge, train_judge
from shiva_dit.models.sampling import Sampler
from shiva_dit.provenance import tensors_digest
from shiva_dit.training.data import Batch
from shiva_dit.training.looks.material import Material, Shown
from shiva_dit.training.settings import WatchConfig

PATCH = 2
WIDTH = 128
NUM_BLOCKS = 6


class DemoTask(ABC):
    """Captioned pictures in pixel space, an SD3 backbone of 6 blocks of width 128, and a judge.

    A task is the training data of its backbone and of adapters (`TrainingData`). Beside it stand
    held-out pictures that neither backbone nor adapter ever sees, with captions and labels.
    """

    name: str
    channels: ClassVar[int]
    feature_dim: ClassVar[int]
    """Width of the judge's features."""
    num_logits: ClassVar[int]
    """Outputs of the judge."""
    captions: CaptionEncoder
    image_size: int
    """Pixels of a side."""
    patch: ClassVar[int] = PATCH
    """Pixels of a token's side."""
    held_out_images: Float[Tensor, "M C H W"]
    held_out_labels: Int[Tensor, "M ..."]
    num_blocks = NUM_BLOCKS

    # --- data -------------------------------------------------------------------------------

    @abstractmethod
    def __len__(self) -> int:
        """Number of training images."""

    @abstractmethod
    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """Training images by index, with their captions."""

    @abstractmethod
    def content(self) -> dict[str, Tensor]:
        """The arrays that the training images and captions are made of."""

    def identity(self) -> str:
        """Digest of what is trained on: the images and their captions."""
        empty = {f"empty.{name}": value for name, value in self.unconditional().items()}
        return tensors_digest({**self.content(), **empty}.items())

    @abstractmethod
    def held_out_captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of held-out images."""

    @abstractmethod
    def prompts(self, start: int, count: int) -> tuple[list[str], Int[Tensor, "N ..."]]:
        """Captions to sample and the labels that the judge should read, from a fixed list.

        Raises:
            ValueError: If the list is shorter.
        """

    def watched(self, config: WatchConfig) -> Material:
        """What a training is looked at by: held-out pictures, and prompts of the fixed list.

        Raises:
            ValueError: If there are not so many.
        """
        if config.held_out > len(self.held_out_images):
            raise ValueError(
                f"{self.name} has {len(self.held_out_images)} held-out pictures: set "
                f"watch.held_out to that at most, got {config.held_out}."
            )
        captions = self.held_out_captions(range(config.held_out))
        held_out = self.held_out_images[: config.held_out]
        shown: tuple[Shown, ...] = ()
        if config.prompts:
            prompts = self.prompts(0, config.prompts)[0]
            shape = (len(prompts), self.channels, self.image_size, self.image_size)
            batch = Batch(latents=torch.zeros(shape), conditioning=self.conditioning(prompts))
            shown = (Shown(titles=tuple(prompts), batch=batch),)
        return Material(
            training=self,
            held_out=(Batch(latents=held_out, conditioning=self.conditioning(captions)),),
            shown=shown,
            decode=lambda pixels: pixels,
        )

    @abstractmethod
    def real(self, count: int) -> tuple[Float[Tensor, "N C H W"], Int[Tensor, "N ..."]]:
        """Real images that are not among the held-out ones, and their labels: for floors."""

    @abstractmethod
    def ink(self, indices: Sequence[int]) -> Bool[Tensor, "B N"]:
        """Tokens of held-out images that show something other than background."""

    # --- the judge --------------------------------------------------------------------------

    def train_judge(self, judge: Judge, config: JudgeTraining, generator: torch.Generator) -> None:
        """Train a judge in place."""
        train_judge(judge, self.judge_batch, self.judge_loss, config, generator)

    def judge_test(self) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, "B ..."]]:
        """Pictures and labels that say what a judge is worth: the held-out ones."""
        return self.held_out_images, self.held_out_labels

    @abstractmethod
    def judge_batch(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, "B ..."]]:
        """Real images and labels to train the judge."""

    @abstractmethod
    def judge_loss(
        self, logits: Float[Tensor, "B K"], labels: Int[Tensor, "B ..."]
    ) -> Float[Tensor, ""]:
        """What the judge minimises."""

    @abstractmethod
    def right(self, logits: Float[Tensor, "B K"], labels: Int[Tensor, "B ..."]) -> dict[str, float]:
        """Share of what was asked that the judge sees, in [0, 1], by attribute."""

    # --- models -----------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """N image tokens."""
        return (self.image_size // self.patch) ** 2

    def build_backbone(self) -> SD3Transformer2DModel:
        """An untrained backbone.

        diffusers leaves the modulations and the output layer at their random start; training from
        scratch wants them at zero (adaLN-zero).
        """
        model: Any = SD3Transformer2DModel(
            sample_size=self.image_size,
            patch_size=self.patch,
            in_channels=self.channels,
            out_channels=self.channels,
            num_layers=self.num_blocks,
            attention_head_dim=32,
            num_attention_heads=WIDTH // 32,
            joint_attention_dim=self.captions.embed_dim,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=self.captions.pooled_dim,
            pos_embed_max_size=self.image_size // self.patch,
        )
        zeroed: list[nn.Module] = [model.proj_out, model.norm_out.linear]
        for block in model.transformer_blocks:
            zeroed += [block.norm1.linear, block.norm1_context.linear]
        for layer in zeroed:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        return model

    def build_judge(self) -> Judge:
        """An untrained judge, its lazy layer materialised."""
        judge = TrainedJudge(self.channels, self.num_logits, self.feature_dim).eval()
        judge(self.held_out_images[:1])
        return judge

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The sampler's."""
        return FlowMatchEulerDiscreteScheduler()

    def sampler(self, num_steps: int | None) -> Sampler:
        """How steps are taken: few ones (`TrainConfig.num_steps`) at 1, 1 - 1/n, ..., 1/n."""
        return Sampler(scheduler=self.scheduler(), asks_evenly=num_steps is not None)

    def pipeline(self, backbone: nn.Module) -> Any:
        """The stock SD3 pipeline around a backbone; `output_type="latent"` gives images.

        There is no autoencoder and no text model: pass `prompt_embeds` from `conditioning`.
        """
        text = [part + i for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
        nothing: dict[str, Any] = dict.fromkeys(["vae", *text])
        pipe = StableDiffusion3Pipeline(
            transformer=backbone,  # type: ignore[arg-type]
            scheduler=self.scheduler(),
            **nothing,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    # --- text -------------------------------------------------------------------------------

    def conditioning(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions to what the backbone's forward takes."""
        embeds, pooled = self.captions(captions)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def unconditional(self) -> dict[str, Tensor]:
        """Conditioning of the empty caption."""
        return {name: value[0] for name, value in self.conditioning([""]).items()}
