"""DyDiT (Zhao et al. 2025, arXiv 2410.03456), from its formulas, for joint attention.

How many heads and hidden channels run goes by the time, and which tokens the feed-forward changes
by what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shiva_dit.methods.base import Lesson, Need, Where
from shiva_dit.methods.blocks import BlockReducer, BlockRun, Width
from shiva_dit.methods.settings import DyDiTConfig
from shiva_dit.modules.context import without_autocast

NOTHING = 1e-6
"""Uniform draws stay that far from 0 and 1."""


class DyDiT(BlockReducer):
    r"""Heads, hidden groups and tokens behind gates :math:`1[\sigma(z) > 1/2]`.

    Args:
        width: D.
        time_dim: Width of the model's time embedding.
        num_heads: H, also the number of hidden groups.
        num_blocks: L.
        keep_ratio: lambda, the share of the FLOPs of attention and feed-forward, in (0, 1].
        config: How it learns.
        generator: Source of first weights.
    """

    needs: tuple[Need, ...] = ("embedding",)
    objective: Mapping[str, float] = {"diffusion": 0.0, "distillation": 1.0, "output": 1.0}

    def __init__(
        self,
        width: int,
        time_dim: int,
        num_heads: int,
        num_blocks: int,
        keep_ratio: float,
        config: DyDiTConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.keep_ratio, self.num_heads = config, keep_ratio, num_heads
        small = max(1, width // config.bottleneck)

        def drawn(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(shape, generator=generator))

        gates = 2 * (num_heads - 1) if config.widths else 0
        self.width_weight = drawn(num_blocks, gates, time_dim, std=0.1 / math.sqrt(time_dim))
        self.width_bias = nn.Parameter(torch.full((num_blocks, gates), config.width_bias))
        self.token_in = drawn(num_blocks, small, width, std=1.0 / math.sqrt(width))
        self.token_in_bias = nn.Parameter(torch.zeros(num_blocks, small))
        self.token_out = drawn(num_blocks, small, std=0.1 / math.sqrt(small))
        self.token_bias = nn.Parameter(torch.full((num_blocks,), config.token_bias))

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Gates learn as routers do."""
        own = dict(self.named_parameters())
        return {"router": {name: p for name, p in own.items() if p.numel()}}

    def around(self, x: Float[Tensor, "B N D"], where: Where) -> BlockRun:
        """The block with its gates: masks in training, and what is off left out afterwards."""
        heads, hidden = self._widths(where)

        def kept(after: Float[Tensor, "B N D"]) -> Float[Tensor, "B N"] | Bool[Tensor, "B N"]:
            logits = self._token_logits(after, where.block)
            if where.lesson is None:
                return logits > 0
            mask = self._gate(logits, where.lesson)
            where.lesson.noted.append((_mean(heads), _mean(hidden), mask.mean(), x.shape[1:]))
            return mask

        return BlockRun(heads=heads, hidden=hidden, kept=kept)

    def _widths(self, where: Where) -> tuple[Width | None, Width | None]:
        """Which heads and hidden groups of a block are on; the first of each always is."""
        if not self.config.widths:
            return None, None
        assert where.within is not None
        assert where.embedded is not None
        if self not in where.within:  # of all blocks at once
            where.within[self] = self._masks(where.embedded, where.lesson)
        heads, hidden = where.within[self]
        return heads[where.block], hidden[where.block]

    def _masks(self, time: Float[Tensor, "B Dt"], lesson: Lesson | None) -> tuple[list[Width], ...]:
        with without_autocast(time.device):
            logits = torch.einsum("bt,lgt->lbg", time.float(), self.width_weight)
            logits = logits + self.width_bias[:, None]  # (L, B, 2 (H - 1))
        gates = (logits > 0).float() if lesson is None else self._gate(logits, lesson)
        masks = [F.pad(half, (1, 0), value=1.0) for half in gates.chunk(2, dim=-1)]  # (L, B, H)
        if lesson is not None or bool((gates != gates[:, :1]).any()):  # samples differ
            return tuple(list(mask) for mask in masks)
        on = [mask[:, 0].tolist() for mask in masks]
        return tuple([tuple(i for i, m in enumerate(row) if m) for row in rows] for rows in on)

    def _token_logits(self, x: Float[Tensor, "B N D"], block: int) -> Float[Tensor, "B N"]:
        with without_autocast(x.device):
            inner = F.relu(F.linear(x.float(), self.token_in[block], self.token_in_bias[block]))
            logits = F.linear(inner, self.token_out[block][None], self.token_bias[block][None])
            return logits[..., 0]

    def _gate(self, logits: Tensor, lesson: Lesson) -> Tensor:
        """1 where the soft gate is above 1/2, whose gradient it has; with noise."""
        drawn = torch.rand(logits.shape, generator=lesson.generator)
        drawn = drawn.clamp(NOTHING, 1.0 - NOTHING)
        noise = torch.log(drawn) - torch.log1p(-drawn)  # the difference of two Gumbel variables
        soft = ((logits + noise.to(logits)) / self.config.tau).sigmoid()
        return (soft > 0.5).to(soft) + (soft - soft.detach())

    def loss(self, lesson: Lesson) -> Float[Tensor, ""]:
        """The squared distance of the share of FLOPs from its target, which falls from 1."""
        fallen = min(1.0, lesson.progress / max(self.config.anneal, 1e-9))
        target = 1.0 + fallen * (self.keep_ratio - 1.0)
        runs, whole = torch.zeros(()), 0
        for heads, hidden, tokens, (count, width) in lesson.noted:
            attention = 4 * width * width * count + 2 * count * count * width
            feed_forward = 8 * width * width * count
            runs = runs + attention * heads + feed_forward * hidden * tokens
            whole += attention + feed_forward
        return self.config.flops_weight * (runs / whole - target).square()


def _mean(width: Width | None) -> Tensor | float:
    """Share of what is on, in training."""
    return width.mean() if isinstance(width, Tensor) else 1.0
