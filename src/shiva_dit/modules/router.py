"""The router: which tokens a block runs (Eq. 8, 9)."""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit import kernels
from shiva_dit.modules.context import (
    CONTEXT_INPUTS,
    ContextModule,
    DepthGroups,
    linear_flops,
    linear_in_dtype_of,
)


class TokenScorer(ContextModule):
    r"""One group's router (Eq. 8, 9).

    .. math:: h = P_t t + P_p c + P_l l, \qquad s_i = w^T \mathrm{LN}(\mathrm{SiLU}(P_x x_i + h))

    Args:
        width: D of the tokens.
        time_dim: Width of the backbone's time embedding.
        context_dim: Width of the pooled text or class embedding.
        hidden: d'.
        normalize_inputs: Layer-normalise tokens, time and context first.
        inputs: Which of `CONTEXT_INPUTS` are read.
    """

    def __init__(
        self,
        width: int,
        time_dim: int,
        context_dim: int,
        hidden: int,
        normalize_inputs: bool,
        inputs: Collection[str] = CONTEXT_INPUTS,
    ) -> None:
        super().__init__(normalize_inputs)
        self.project_tokens = nn.Linear(width, hidden)
        self.read_context(time_dim, context_dim, hidden, inputs)
        self.score_norm = nn.LayerNorm(hidden)
        # No bias: it would move all scores alike, and the selection not at all.
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B H"]
    ) -> Float[Tensor, "B N"]:
        """Scores of all tokens (Eq. 9), in float32; larger is better.

        Weights are float32. The projection, which reads all tokens, runs in their dtype; the score
        layer in float32 always: 4,096 scores in bfloat16 take a third as many distinct values.
        """
        layer, norm, read = self.project_tokens, self.score_norm, self.score.weight[0]
        weights = (layer.weight, layer.bias, norm.weight, norm.bias, read)
        if kernels.should_use("router_scores", x, condition, *weights):
            from shiva_dit.kernels import router  # noqa: PLC0415  (imports triton)

            return router.router_scores(
                x, condition, *weights, normalize_inputs=self.normalize_inputs, eps=norm.eps
            )
        projected = linear_in_dtype_of(self.normalize(x), layer)
        hidden = F.silu(projected.float() + condition[:, None])  # (B, N, H)
        # Not a matrix product: autocast would round that to 16 bits.
        return (norm(hidden) * read).sum(-1)

    def flops(self, num_tokens: int) -> int:
        """FLOPs of all tokens of a sample."""
        tokens = linear_flops(num_tokens, self.project_tokens)
        return tokens + linear_flops(num_tokens, self.score)


class ShivaRouter(DepthGroups):
    """Scores the tokens of every block from token, time, text and layer (Eq. 8, 9).

    Args:
        width: D, width of the image tokens.
        time_dim: Width of the backbone's time embedding.
        context_dim: Width of the pooled text or class embedding.
        num_blocks: L.
        num_groups: G in [1, L], a divisor of L: routers with weights of their own.
        hidden: d'.
        normalize_inputs: Layer-normalise x, t and c first (without parameters). Tokens of deep
            blocks differ in size by orders of magnitude; Eq. 9 has no such norm.
        inputs: Which of "time", "context" and "layer" are read beside the token; all in Eq. 8.

    Raises:
        ValueError: If G does not divide L, or an input is unknown.
    """

    def __init__(
        self,
        width: int,
        time_dim: int,
        context_dim: int,
        num_blocks: int,
        num_groups: int,
        hidden: int = 64,
        normalize_inputs: bool = True,
        inputs: Collection[str] = CONTEXT_INPUTS,
    ) -> None:
        if not set(inputs) <= set(CONTEXT_INPUTS):
            raise ValueError(
                f"router inputs must be among {', '.join(CONTEXT_INPUTS)}, got {', '.join(inputs)}."
            )
        super().__init__(
            lambda: TokenScorer(width, time_dim, context_dim, hidden, normalize_inputs, inputs),
            num_blocks,
            num_groups,
        )

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B H"], block: int
    ) -> Float[Tensor, "B N"]:
        """Scores of all tokens of a block (Eq. 9), in float32; larger is better."""
        scores: Tensor = self.group(block)(x, condition)
        return scores
