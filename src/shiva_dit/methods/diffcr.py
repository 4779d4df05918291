"""DiffCR (You et al. 2025, arXiv 2412.16822), from its formulas.

A linear router per block chooses the tokens that run through it; how many these are is learned for
each block and region of time, by mixing what the two nearest of ten ratios give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.schedule import Schedule
from shiva_dit.core.time_law import TimeLaw
from shiva_dit.methods.base import Lesson, Mixture, Selector
from shiva_dit.methods.settings import DiffCRConfig

LEVELS = 10
"""Ratios that run: 0.1, 0.2, ..., 1."""


class DiffCR(Selector):
    r"""The k best tokens by :math:`s = \sigma(w_l^T x)`, whose update is multiplied by s.

    Args:
        width: D.
        num_blocks: L.
        keep_ratio: Target of the mean ratio over regions and blocks, in (0, 1].
        config: How it learns.
        full_blocks: Blocks that keep all tokens, and have no router.
        generator: Source of the routers' first weights.
    """

    objective: Mapping[str, float] = {"diffusion": 1.0, "distillation": 0.0, "output": 0.0}

    def __init__(
        self,
        width: int,
        num_blocks: int,
        keep_ratio: float,
        config: DiffCRConfig,
        *,
        full_blocks: Sequence[int] = (0,),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.keep_ratio, self.num_blocks = config, keep_ratio, num_blocks
        self.num_bins, self.weighs = config.regions, config.weight_site
        self.places = {
            b: i for i, b in enumerate(sorted(set(range(num_blocks)) - set(full_blocks)))
        }
        self.full_blocks = tuple(full_blocks)
        bound = 1.0 / math.sqrt(width)
        first = torch.rand(len(self.places), width, generator=generator)
        self.routers = nn.Parameter(bound * (2.0 * first - 1.0))
        self.ratios = nn.Parameter(torch.ones(config.regions, len(self.places)))

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Routers learn as routers do, ratios as a policy does."""
        return {"router": {"routers": self.routers}, "policy": {"ratios": self.ratios}}

    def kept(self) -> Float[Tensor, "S l"]:
        """Ratios in [0.1, 1] by region and pruned block; the gradient passes the bounds."""
        return self.ratios + (self.ratios.clamp(1.0 / LEVELS, 1.0) - self.ratios).detach()

    def _logits(self, x: Float[Tensor, "B n D"], block: int) -> Float[Tensor, "B n"]:
        if block not in self.places:
            raise ValueError(
                f"DiffCR was made with block {block} unpruned: it has no router there."
            )
        with torch.autocast(x.device.type, enabled=False):
            return x.float() @ self.routers[self.places[block]]

    def scores(self, x: Float[Tensor, "B N D"], terms: None, block: int) -> Float[Tensor, "B N"]:
        """The routers' logits."""
        del terms
        return self._logits(x, block)

    def weights(self, x: Float[Tensor, "B k D"], block: int) -> Float[Tensor, "B k"]:
        """s, in (0, 1)."""
        return self._logits(x, block).sigmoid()

    def flops(self, num_tokens: int) -> int:
        """FLOPs of a router."""
        return 2 * num_tokens * self.routers.shape[1]

    def weight_flops(self, num_tokens: int) -> int:
        """Likewise, of the chosen tokens once more."""
        return self.flops(num_tokens)

    def mixtures(self, time_bin: int, num_tokens: int) -> dict[int, Mixture]:
        r"""Two runs at the ratios :math:`q_a < q_b` next to q.

        .. math:: w_a = (q_b - q) / (q_b - q_a), \qquad w_b = 1 - w_a
        """
        kept = self.kept()[time_bin]  # (l,)
        levels = [min(max(math.ceil(LEVELS * q) - 1, 1), LEVELS - 1) for q in kept.tolist()]
        lower = (kept.new_tensor(levels) + 1.0) - LEVELS * kept  # (l,)
        return {
            block: Mixture(
                counts=(_count(levels[i], num_tokens), _count(levels[i] + 1, num_tokens)),
                weights=torch.stack([lower[i], 1.0 - lower[i]]),
            )
            for block, i in self.places.items()
        }

    def learned_schedule(self, law: TimeLaw) -> Schedule:
        """The nearest of the ten ratios, by region and block."""
        blocks = range(self.num_blocks)
        levels = (self.kept().detach() * LEVELS).round().tolist()
        rows = [
            [row[self.places[b]] / LEVELS if b in self.places else 1.0 for b in blocks]
            for row in levels
        ]
        return Schedule.from_ratios(rows, self.full_blocks, law)

    def loss(self, lesson: Lesson) -> Float[Tensor, ""]:
        """The budget: the squared distance of the mean ratio from the target."""
        del lesson
        return self.config.budget_weight * (self.kept().mean() - self.keep_ratio).square()


def _count(level: int, num_tokens: int) -> int:
    """Tokens of a ratio, rounded up, as published."""
    return -(-level * num_tokens // LEVELS)
