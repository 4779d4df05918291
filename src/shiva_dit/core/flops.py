"""True FLOPs of a diffusion transformer at k tokens: 2 per multiply-add, attention included.

Linear layers and attention products are counted, as `torch.utils.flop_counter` counts them;
norms, activations, softmax and the sort are not. For image tokens a, text tokens T, width D:

- projections of a stream of n tokens: queries, keys, values 3 n D^2; output n D^2; feed-forward
  (expansion 4) 8 n D^2 multiply-adds;
- joint attention over S = a + T tokens: S^2 D for the scores and S^2 D for the values;
- adaLN-zero modulations: 6 D^2 per stream and sample, whatever a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class BlockShape(Protocol):
    """What the cost of a block depends on, beside the number of tokens."""

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample with `image_tokens` tokens in the block."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class JointBlockShape:
    """A block with a stream of image and one of text, and attention over both (SD3, Flux)."""

    width: int
    """D."""
    text_tokens: int
    """T."""
    dual_attention: bool = False
    """Whether a second attention runs over the image tokens alone (SD3.5)."""
    context_pre_only: bool = False
    """Whether the text stream ends here (last block)."""
    modulation: int | None = None
    """Multiply-adds of the modulations, per sample; those of adaLN-zero by default."""
    feed_forward: int | None = None
    """Multiply-adds of the feed-forward, per token; 8 D^2 by default."""

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample with `image_tokens` tokens in the block."""
        d2 = self.width * self.width
        a, text = image_tokens, self.text_tokens
        macs = (9 if self.dual_attention else 6) * d2 + (2 if self.context_pre_only else 6) * d2
        if self.modulation is not None:
            macs = self.modulation
        feed_forward = 8 * d2 if self.feed_forward is None else self.feed_forward
        macs += 4 * a * d2 + 3 * text * d2 + 2 * (a + text) ** 2 * self.width
        macs += a * feed_forward
        if not self.context_pre_only:
            macs += text * d2 + text * feed_forward
        if self.dual_attention:
            macs += 4 * a * d2 + 2 * a * a * self.width
        return 2 * macs


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBlockShape:
    """A block that treats image and text by the same weights (Flux's single ones, CogView4)."""

    width: int
    """D."""
    text_tokens: int
    """T."""
    modulation: int
    """Multiply-adds of its modulations, per sample."""
    feed_forward: int | None = None
    """Multiply-adds of the feed-forward, per token; 8 D^2 by default."""
    projections: int | None = None
    """Multiply-adds of queries, keys, values and output, per token; 4 D^2 by default."""

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample."""
        d2, tokens = self.width * self.width, image_tokens + self.text_tokens
        feed_forward = 8 * d2 if self.feed_forward is None else self.feed_forward
        projections = 4 * d2 if self.projections is None else self.projections
        macs = self.modulation + tokens * (projections + feed_forward)
        macs += 2 * tokens**2 * self.width
        return 2 * macs


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossBlockShape:
    """A block with self-attention and cross attention to text (PixArt, Wan, LTX).

    Its modulation comes from outside.
    """

    width: int
    """D."""
    text_tokens: int
    """T."""
    text_width: int
    """Width of the text tokens that it reads."""
    feed_forward: int
    """Inner width of the feed-forward."""

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample with `image_tokens` tokens in the block."""
        d2, a, text = self.width * self.width, image_tokens, self.text_tokens
        macs = 4 * a * d2 + 2 * a * a * self.width
        macs += 2 * a * d2 + 2 * text * self.text_width * self.width + 2 * a * text * self.width
        return 2 * (macs + 2 * a * self.width * self.feed_forward)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassBlockShape:
    """A block with self-attention, and an embedder of time of its own (DiT)."""

    width: int
    """D."""

    def flops(self, image_tokens: int) -> int:
        """FLOPs of one sample: 256 sinusoids of time, the modulation, attention, feed-forward."""
        d2, a = self.width * self.width, image_tokens
        macs = 256 * self.width + d2 + 6 * d2
        return 2 * (macs + 4 * a * d2 + 2 * a * a * self.width + 8 * a * d2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of one forward pass of one sample, as a function of the tokens kept."""

    blocks: tuple[BlockShape, ...]
    """The blocks in order."""
    constant: int
    """Everything outside the blocks: embedders, final norm and projection."""
    num_tokens: int
    """N image tokens."""

    def dense(self) -> int:
        """The unpruned model."""
        return self.constant + sum(block.flops(self.num_tokens) for block in self.blocks)

    def pruned(self, counts: Sequence[int], extra: int = 0) -> int:
        """The pruned model.

        Args:
            counts: k of each block.
            extra: What a block with k < N pays beside its own work: router, update of the rest.
        """
        total = self.constant
        for block, k in zip(self.blocks, counts, strict=True):
            total += block.flops(k) + (extra if k < self.num_tokens else 0)
        return total
