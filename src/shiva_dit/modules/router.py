"""The router: which tokens a block runs (Eq. 8, 9)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.modules.context import (
    CONTEXT_INPUTS,
    ContextModule,
    DepthGroups,
    is_autocast,
    linear_flops,
)

LN_EPS = 1e-5
"""Of LN in Eq. 9."""


class ScoreTerms(NamedTuple):
    """What a block's scores are made of beside its tokens (Eq. 9)."""

    shift: Float[Tensor, "B H"]
    """h, with the bias of P_x."""
    weight: Float[Tensor, "H D"]
    """P_x, in the dtype of the tokens or in float32."""
    read: Float[Tensor, " H"]
    """w, with the gain of LN."""
    lift: Float[Tensor, ""] | None
    """What the bias of LN adds to all scores; None where nothing learns from that."""


def token_scores(
    x: Float[Tensor, "B N D"], terms: ScoreTerms, *, normalize_inputs: bool
) -> Float[Tensor, "B N"]:
    """Scores of all tokens (Eq. 9), in float32; larger is better.

    The projection, which reads all tokens, runs in their dtype; the score layer in float32 always:
    4,096 scores in bfloat16 take a third as many distinct values.

    Args:
        x: Tokens.
        terms: What else the scores are made of.
        normalize_inputs: Layer-normalise tokens first, without parameters.
    """
    shift, weight, read, lift = terms
    if normalize_inputs:
        x = F.layer_norm(x, x.shape[-1:])
    weight = weight.to(x.dtype)
    rounds = is_autocast(x.device)
    if x.shape[0] == 1 and x.dtype == torch.float32 and not rounds:
        hidden = F.linear(x, weight, shift[0])  # (B, N, H)
    else:
        hidden = (F.linear(x, weight) + shift[:, None]).float()
    hidden = F.layer_norm(F.silu(hidden), read.shape, eps=LN_EPS)
    scores = (hidden * read).sum(-1) if rounds else F.linear(hidden, read)
    return scores if lift is None else scores + lift


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
        num_roles: Roles of tokens that it tells apart.
    """

    def __init__(
        self,
        width: int,
        time_dim: int,
        context_dim: int,
        hidden: int,
        normalize_inputs: bool,
        inputs: Collection[str] = CONTEXT_INPUTS,
        num_roles: int = 1,
    ) -> None:
        super().__init__(normalize_inputs)
        self.project_tokens = nn.Linear(width, hidden)
        self.read_context(time_dim, context_dim, hidden, inputs)
        self.score_norm = nn.LayerNorm(hidden, eps=LN_EPS)
        # Its bias moves all scores alike, so that its gradient is rounding, which Adam blows up.
        self.score_norm.bias.requires_grad_(False)
        # No bias: it would move all scores alike, and the selection not at all.
        self.score = nn.Linear(hidden, 1, bias=False)
        self.roles: nn.Parameter | None = None
        """What is added to h for tokens of each role but the usual one, (R - 1, H)."""
        if num_roles > 1:
            self.roles = nn.Parameter(torch.zeros(num_roles - 1, hidden))

    def bias(self) -> Float[Tensor, " H"]:
        """That of the token projection, the same for all tokens, is part of the context term."""
        return super().bias() + self.project_tokens.bias

    def terms(self, shift: Float[Tensor, "B H"]) -> ScoreTerms:
        """These, with the context term."""
        norm, read = self.score_norm, self.score.weight[0]
        return ScoreTerms(shift, self.project_tokens.weight, read * norm.weight, read @ norm.bias)

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B H"]
    ) -> Float[Tensor, "B N"]:
        """Scores of all tokens (Eq. 9), in float32; larger is better.

        Args:
            x: Tokens.
            condition: h with the bias of P_x, as `ShivaRouter.condition` gives it.
        """
        return token_scores(x, self.terms(condition), normalize_inputs=self.normalize_inputs)

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
        num_groups: G in [1, L]: routers with weights of their own.
        hidden: d'.
        normalize_inputs: Layer-normalise x, t and c first (without parameters). Tokens of deep
            blocks differ in size by orders of magnitude; Eq. 9 has no such norm.
        inputs: Which of "time", "context" and "layer" are read beside the token; all in Eq. 8.
        num_roles: Roles of tokens (`core.roles`) that it tells apart, at least 1: for those of any
            but the usual one h has a term more, a learned vector that starts at 0.

    Raises:
        ValueError: If G lies outside that, or an input is unknown.
    """

    frozen_tokens: Float[Tensor, "G H D"] | None
    frozen_reads: Float[Tensor, "G H"] | None
    frozen_roles: Float[Tensor, "R L 1 H"] | None

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
        num_roles: int = 1,
    ) -> None:
        if not set(inputs) <= set(CONTEXT_INPUTS):
            raise ValueError(
                f"router inputs must be among {', '.join(CONTEXT_INPUTS)}, got {', '.join(inputs)}."
            )
        super().__init__(
            lambda: TokenScorer(
                width, time_dim, context_dim, hidden, normalize_inputs, inputs, num_roles
            ),
            num_blocks,
            num_groups,
        )
        self.num_roles = num_roles
        self.normalize_inputs = normalize_inputs
        self.register_buffer("frozen_tokens", None, persistent=False)
        self.register_buffer("frozen_reads", None, persistent=False)
        self.register_buffer("frozen_roles", None, persistent=False)

    def terms(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"]
    ) -> list[ScoreTerms]:
        """What the scores of every block are made of beside its tokens, once per forward."""
        shifts = self.condition(time, context).unbind()
        tokens, reads = self.frozen_tokens, self.frozen_reads
        if tokens is None or reads is None or torch.is_grad_enabled():
            return [self.group(block).terms(shift) for block, shift in enumerate(shifts)]
        frozen = list(zip(tokens.unbind(), reads.unbind(), strict=True))
        return [
            ScoreTerms(shift, *frozen[group], None)
            for shift, group in zip(shifts, self.group_of, strict=True)
        ]

    def of_role(self, terms: Sequence[ScoreTerms], role: int) -> Sequence[ScoreTerms]:
        """These terms of all blocks for tokens of a role; the same for one that it doesn't know."""
        if not 0 < role < self.num_roles:
            return terms
        frozen = self.frozen_roles
        own = self._role_vectors() if frozen is None or torch.is_grad_enabled() else frozen
        shifts = torch.stack([each.shift for each in terms]) + own[role - 1]  # (L, B, H)
        return [
            each._replace(shift=shift) for each, shift in zip(terms, shifts.unbind(), strict=True)
        ]

    def _role_vectors(self) -> Float[Tensor, "R L 1 H"]:
        """Those of every block, for each role but the usual one."""
        vectors: list[Any] = [group.roles for group in self.groups]
        return torch.stack([vectors[group] for group in self.group_of], dim=1)[:, :, None]

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype) -> None:
        """Stack and cast the weights for good.

        Args:
            dtype: Of the tokens.
        """
        super().freeze(dtype)
        groups: list[TokenScorer] = list(self.groups)  # type: ignore[arg-type]
        self.frozen_tokens = torch.stack([g.project_tokens.weight for g in groups]).to(dtype)
        self.frozen_reads = torch.stack([g.score.weight[0] * g.score_norm.weight for g in groups])
        self.frozen_roles = self._role_vectors() if self.num_roles > 1 else None

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B H"], block: int
    ) -> Float[Tensor, "B N"]:
        """Scores of all tokens of a block (Eq. 9), in float32; larger is better."""
        scores: Tensor = self.group(block)(x, condition)
        return scores
