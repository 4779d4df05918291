"""SparseDiT (Chang et al. 2025, arXiv 2412.06028), from its formulas, for joint attention.

The lowest blocks attend to all tokens alike, the middle ones run by turns on few tokens and on all,
and the top ones on all. How few they are goes by the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.keep_table import nearest_bin
from shiva_dit.methods.base import Where
from shiva_dit.methods.blocks import BlockReducer, BlockRun
from shiva_dit.methods.settings import SparseDiTConfig

HELD = 0.25
"""Share of the way from noise to data at which the number of tokens begins to grow."""


class SparseDiT(BlockReducer):
    r"""Few tokens in some blocks, by pooling, and :math:`z = W_1 \mathrm{Up}(x_s) + W_2 x` to all.

    Args:
        width: D.
        num_blocks: L.
        keep_ratio: Mean share of the tokens in sparse blocks over all times, in (0, 1]; 1 leaves
            the model as it is, pooling blocks included.
        config: Which block does what.

    Raises:
        ValueError: If the model has too few blocks.
    """

    objective: Mapping[str, float] = {"diffusion": 1.0, "distillation": 0.0, "output": 0.0}
    resizes = True

    def __init__(
        self, width: int, num_blocks: int, keep_ratio: float, config: SparseDiTConfig
    ) -> None:
        super().__init__()
        self.roles = config.roles(num_blocks) if keep_ratio < 1.0 else "D" * num_blocks
        self.num_bins = self.bins = config.bins
        # The mean of a share that is held and then grows evenly is the given one.
        below = (1.0 - HELD) / 2.0
        growth = min(config.growth, keep_ratio / below, (1.0 - keep_ratio) / (1.0 - below))
        self.least = keep_ratio - growth * below
        self.most = self.least + growth
        count = len(self._recovers())
        self.up = nn.Parameter(torch.zeros(count, width, width))  # W1
        self.through = nn.Parameter(torch.eye(width).repeat(count, 1, 1))  # W2

    def _recovers(self) -> dict[int, int]:
        """Blocks that begin to recover, and the number of their module."""
        found = [b for b, r in enumerate(self.roles) if r == "R" and self.roles[b - 1] != "R"]
        return {block: module for module, block in enumerate(found)}

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """W1 and W2 learn as updates do."""
        return {"updates": {"up": self.up, "through": self.through}}

    def share(self, time_bin: int) -> float:
        """Share of the tokens in sparse blocks, at the middle of a bin of time."""
        done = 1.0 - (time_bin + 0.5) / self.bins
        return self.least + (self.most - self.least) * max(0.0, (done - HELD) / (1.0 - HELD))

    def size(self, grid: tuple[int, int], time_bin: int) -> tuple[int, int]:
        """Height and width of the few tokens, of a grid's shape."""
        side = math.sqrt(self.share(time_bin))
        return max(1, round(side * grid[0])), max(1, round(side * grid[1]))

    def around(self, x: Float[Tensor, "B n D"], where: Where) -> BlockRun | None:
        """The block by its role; dense and sparse ones are left as they are."""
        role, before = self.roles[where.block], self.roles[: where.block][-1:]
        assert where.grid is not None
        assert where.within is not None
        if role == "P":
            return BlockRun(is_pooled=True)
        if role == "M" and before != "M":
            where.within[self] = x
            few = F.adaptive_avg_pool2d(_as_map(x, where.grid), self._size(where))
            return BlockRun(tokens=few.flatten(2).transpose(1, 2), keys=x)
        if role not in "MR":
            return None
        whole = where.within.get(self)
        if whole is None:
            raise ValueError("sparsedit: a block that merges was skipped; skip no layers.")
        if role == "M":
            return BlockRun(keys=whole)
        if before == "R":
            return BlockRun(keys=where.within["few"])
        where.within["few"] = x
        module = self._recovers()[where.block]
        wide = F.interpolate(_as_map(x, self._size(where)), where.grid, mode="nearest")
        z = F.linear(wide.flatten(2).transpose(1, 2), self.up[module].to(x.dtype))
        z = z + F.linear(whole, self.through[module].to(x.dtype))
        return BlockRun(tokens=z, keys=x)

    def _size(self, where: Where) -> tuple[int, int]:
        """The size at the forward's time, which is read from the device once."""
        assert where.within is not None
        assert where.grid is not None
        assert where.times is not None
        if "size" not in where.within:
            times = [min(1.0, max(0.0, t)) for t in where.times.tolist()]
            bins = {nearest_bin(t, self.bins) for t in times}
            if len(bins) > 1:
                raise ValueError(
                    "sparsedit: the samples of one forward must share their time bin, so that "
                    f"they have equally many tokens; got times {sorted(set(times))}."
                )
            where.within["size"] = self.size(where.grid, bins.pop())
        return where.within["size"]


def _as_map(x: Float[Tensor, "B n D"], grid: tuple[int, int]) -> Float[Tensor, "B D h w"]:
    return x.transpose(1, 2).unflatten(2, grid)
