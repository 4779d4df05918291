"""What rejected tokens get instead of a block: a cheap learned update. Not in the paper."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.modules.context import (
    ContextModule,
    DepthGroups,
    linear_flops,
    linear_in_dtype_of,
)


class TokenUpdate(ContextModule):
    r"""A cheap stand-in for a block, for the tokens that it doesn't run: one group's weights.

    .. math:: u_i = \sigma_i \, W_\uparrow \left[(1 + b) \odot
              (W_\downarrow \mathrm{LN}(x_i) + d + a)\right], \qquad
              (a, b) = P_t t + P_p c + P_l l

    with :math:`\sigma_i` the standard deviation of x_i over its channels: linear in x_i save for
    the context's part, so that one learning rate serves blocks whose tokens differ in size by
    orders of magnitude, and least squares give a start (`fit`). It starts at zero: the tokens then
    pass by unchanged, as in the paper.

    Args:
        width: D of the tokens.
        time_dim: Width of the backbone's time embedding.
        context_dim: Width of the pooled text or class embedding.
        rank: Width of the bottleneck, at most D.

    Raises:
        ValueError: If the rank is larger than the width.
    """

    def __init__(self, width: int, time_dim: int, context_dim: int, rank: int) -> None:
        super().__init__(normalize_inputs=True)
        if rank > width:
            raise ValueError(f"rejected_rank must be at most the width, {width}, got {rank}.")
        self.down = nn.Linear(width, rank)
        self.read_context(time_dim, context_dim, 2 * rank)
        self.up = nn.Linear(rank, width, bias=False)
        for layer in (self.project_time, self.project_context, self.project_layer, self.up):
            assert layer is not None
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B H"]
    ) -> Float[Tensor, "B N D"]:
        """What to add to each token, in the tokens' dtype."""
        shift, scale = condition[:, None].chunk(2, dim=-1)
        hidden = linear_in_dtype_of(self.normalize(x), self.down).float() + shift
        update = linear_in_dtype_of((hidden * (1.0 + scale)).to(x.dtype), self.up)
        return update * _size(x).to(x.dtype)

    def design(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "M E"]:
        """What the update is linear in without its context, one row per token; E = D + 1."""
        normed = self.normalize(x.float())
        rows = torch.cat([normed, torch.ones_like(normed[..., :1])], dim=-1) * _size(x)
        return rows.flatten(0, 1)

    @torch.no_grad()
    def fit(self, gram: Float[Tensor, "E E"], cross: Float[Tensor, "E D"]) -> None:
        """Set the weights by reduced-rank regression on the block's own updates.

        Args:
            gram: Sum over tokens of a' a, a the rows of `design`.
            cross: Sum of a' F, F the updates.
        """
        penalty = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        weights = torch.linalg.solve(gram + penalty, cross)  # (E, D), full rank
        # The best rank-r map keeps the r main directions of what the full one predicts.
        directions = torch.linalg.eigh(weights.T @ gram @ weights).eigenvectors
        up = directions[:, -self.up.in_features :]  # (D, r)
        down = (weights @ up).T  # (r, E)
        self.down.weight.copy_(down[:, :-1])
        self.down.bias.copy_(down[:, -1])
        self.up.weight.copy_(up)

    def flops(self, num_tokens: int) -> int:
        """FLOPs of all tokens of a sample."""
        return linear_flops(num_tokens, self.down) + linear_flops(num_tokens, self.up)


def _size(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N 1"]:
    return x.float().std(-1, keepdim=True, correction=0)


class RejectedUpdates(DepthGroups):
    """A cheap learned update for the tokens that each block leaves out.

    The paper leaves them as they are. This is ours: a `TokenUpdate` per group of blocks,
    conditioned like the router.

    Args:
        width: D, width of the image tokens.
        time_dim: Width of the backbone's time embedding.
        context_dim: Width of the pooled text or class embedding.
        num_blocks: L.
        num_groups: G in [1, L].
        rank: Width of the bottleneck. A block of width D costs at least 24 D^2 FLOPs per token,
            this 4 D times the rank: up to D / 9 it stays below 2%.

    Raises:
        ValueError: If G lies outside that.
    """

    def __init__(
        self,
        width: int,
        time_dim: int,
        context_dim: int,
        num_blocks: int,
        num_groups: int,
        rank: int,
    ) -> None:
        super().__init__(
            lambda: TokenUpdate(width, time_dim, context_dim, rank), num_blocks, num_groups
        )
