"""What is learned: the router, the ratio policy, and the update of rejected tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.schedule import Schedule, ratios_from_logits

LAYER_DIM = 64
ROUTER_INPUTS: tuple[str, ...] = ("time", "context", "layer")
"""What a router may read beside its token (Eq. 8)."""
POLICY_HIDDEN = 256


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within: products in the dtype of their arguments. The meta device knows no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class ContextModule(nn.Module):
    """What depends on time, context and layer: the context term of Eq. 8, of any size.

    Args:
        normalize_inputs: Layer-normalise tokens, time and context first.
    """

    def __init__(self, normalize_inputs: bool) -> None:
        super().__init__()
        self.normalize_inputs = normalize_inputs

    def _read_context(
        self,
        time_dim: int,
        context_dim: int,
        size: int,
        inputs: Collection[str] = ROUTER_INPUTS,
    ) -> None:
        """Make the projections, to vectors of `size`."""
        self.size = size
        self.project_time = nn.Linear(time_dim, size) if "time" in inputs else None
        self.project_context = nn.Linear(context_dim, size) if "context" in inputs else None
        self.project_layer = nn.Linear(LAYER_DIM, size) if "layer" in inputs else None

    def condition(
        self,
        time: Float[Tensor, "B Dt"],
        context: Float[Tensor, "B Dc"],
        layer: Float[Tensor, " Dl"],
    ) -> Float[Tensor, "B H"]:
        """The context term h (Eq. 8), in float32 also under autocast: inference has none."""
        with without_autocast(time.device):
            h = layer.new_zeros(len(time), self.size)
            if self.project_time is not None:
                h = h + self.project_time(self._normalize(time).float())
            if self.project_context is not None:
                h = h + self.project_context(self._normalize(context).float())
            return h if self.project_layer is None else h + self.project_layer(layer)

    def condition_flops(self) -> int:
        """FLOPs of `condition` per sample."""
        read = (self.project_time, self.project_context, self.project_layer)
        return sum(linear_flops(1, layer) for layer in read if layer is not None)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) if self.normalize_inputs else x


def linear_flops(num_tokens: int, layer: nn.Linear) -> int:
    """FLOPs of a linear layer on some tokens: 2 per multiply-add."""
    return 2 * num_tokens * layer.in_features * layer.out_features


def _in_dtype_of(x: Tensor, layer: nn.Linear) -> Tensor:
    """A float32 layer on tokens of any dtype, in theirs."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


class TokenScorer(ContextModule):
    r"""One group's router (Eq. 8, 9).

    .. math:: h = P_t t + P_p c + P_l l, \qquad s_i = w^T \mathrm{LN}(\mathrm{SiLU}(P_x x_i + h))

    Args:
        width: D of the tokens.
        time_dim: Width of the backbone's time embedding.
        context_dim: Width of the pooled text or class embedding.
        hidden: d'.
        normalize_inputs: Layer-normalise tokens, time and context first.
        inputs: Which of `ROUTER_INPUTS` are read.
    """

    def __init__(
        self,
        width: int,
        time_dim: int,
        context_dim: int,
        hidden: int,
        normalize_inputs: bool,
        inputs: Collection[str] = ROUTER_INPUTS,
    ) -> None:
        super().__init__(normalize_inputs)
        self.project_tokens = nn.Linear(width, hidden)
        self._read_context(time_dim, context_dim, hidden, inputs)
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
        projected = _in_dtype_of(self._normalize(x), self.project_tokens)
        hidden = F.silu(projected.float() + condition[:, None])  # (B, N, H)
        # Not a matrix product: autocast would round that to 16 bits.
        return (self.score_norm(hidden) * self.score.weight[0]).sum(-1)

    def flops(self, num_tokens: int) -> int:
        """FLOPs per sample: all tokens, and the context term."""
        tokens = linear_flops(num_tokens, self.project_tokens)
        return tokens + linear_flops(num_tokens, self.score) + self.condition_flops()


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
        self._read_context(time_dim, context_dim, 2 * rank)
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
        hidden = _in_dtype_of(self._normalize(x), self.down).float() + shift
        update = _in_dtype_of((hidden * (1.0 + scale)).to(x.dtype), self.up)
        return update * _size(x).to(x.dtype)

    def design(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "M E"]:
        """What the update is linear in without its context, one row per token; E = D + 1."""
        normed = self._normalize(x.float())
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
        """FLOPs per sample: all tokens, and the context term."""
        tokens = linear_flops(num_tokens, self.down) + linear_flops(num_tokens, self.up)
        return tokens + self.condition_flops()


def _size(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N 1"]:
    return x.float().std(-1, keepdim=True, correction=0)


class DepthGroups(nn.Module):
    """Weights for every block, shared by adjacent ones: block l uses group l // (L / G).

    A layer embedding tells the blocks of one group apart.

    Args:
        make: Makes one group's module.
        num_blocks: L.
        num_groups: G in [1, L], a divisor of L.

    Raises:
        ValueError: If G does not divide L.
    """

    def __init__(self, make: Callable[[], ContextModule], num_blocks: int, num_groups: int) -> None:
        super().__init__()
        if not 1 <= num_groups <= num_blocks or num_blocks % num_groups:
            divisors = [g for g in range(1, num_blocks + 1) if num_blocks % g == 0]
            raise ValueError(
                f"num_groups must divide the number of blocks, {num_blocks}: one of {divisors}, "
                f"got {num_groups}."
            )
        self.num_blocks, self.num_groups = num_blocks, num_groups
        self.groups = nn.ModuleList(make() for _ in range(num_groups))
        self.layer_embedding = nn.Embedding(num_blocks, LAYER_DIM)

    def group(self, block: int) -> Any:
        """The group's module that a block uses."""
        return self.groups[block * self.num_groups // self.num_blocks]

    def condition(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"], block: int
    ) -> Float[Tensor, "B H"]:
        """The context term of a block (Eq. 8), once per forward, whatever N.

        Args:
            time: The backbone's time embedding.
            context: Pooled text or class embedding.
            block: Index of the block.
        """
        layer = self.layer_embedding.weight[block]
        h: Tensor = self.group(block).condition(time, context, layer)
        return h

    def flops(self, num_tokens: int) -> int:
        """FLOPs that a pruned block pays for it, per sample."""
        flops: int = self.group(0).flops(num_tokens)
        return flops


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
        inputs: Collection[str] = ROUTER_INPUTS,
    ) -> None:
        if not set(inputs) <= set(ROUTER_INPUTS):
            raise ValueError(
                f"router inputs must be among {', '.join(ROUTER_INPUTS)}, got {', '.join(inputs)}."
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


class RejectedUpdates(DepthGroups):
    """A cheap learned update for the tokens that each block leaves out.

    The paper leaves them as they are. This is ours: a `TokenUpdate` per group of blocks,
    conditioned like the router.

    Args:
        width: D, width of the image tokens.
        time_dim: Width of the backbone's time embedding.
        context_dim: Width of the pooled text or class embedding.
        num_blocks: L.
        num_groups: G in [1, L], a divisor of L.
        rank: Width of the bottleneck. A block of width D costs at least 24 D^2 FLOPs per token,
            this 4 D times the rank: up to D / 9 it stays below 2%.

    Raises:
        ValueError: If G does not divide L.
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


class AdaptiveRatioPolicy(nn.Module):
    r"""How many tokens each block keeps at each time (Eq. 10, 11).

    .. math:: \mathrm{logit}\, r(t, l) = \Phi_t(\mathrm{MLP}(t)) + \Phi_l(e_l) + b

    Additive on purpose: time and depth are independent factors. It sees neither tokens nor
    prompts, so at inference it is a table (`schedule`). The last layers start at zero and b at
    logit(target): the policy starts exactly at the target ratio, everywhere.

    Args:
        num_blocks: L.
        target: Mean keep ratio asked for, in (0, 1).
        full_blocks: Blocks that are never pruned; their ratio is 1.
    """

    def __init__(self, num_blocks: int, target: float, full_blocks: Sequence[int] = (0,)) -> None:
        super().__init__()
        if not 0.0 < target < 1.0:
            raise ValueError(
                f"the policy's target must lie strictly between 0 and 1, got {target}; "
                "to keep every token, don't attach an adapter."
            )
        self.num_blocks, self.full_blocks = num_blocks, tuple(full_blocks)
        self.layer_embedding = nn.Embedding(num_blocks, POLICY_HIDDEN)
        self.layer_branch = _branch()
        self.time_branch = _branch()
        self.anchor = nn.Parameter(torch.tensor(math.log(target) - math.log1p(-target)))

    @property
    def prunable_blocks(self) -> tuple[int, ...]:
        """Blocks whose ratio is learned."""
        return tuple(b for b in range(self.num_blocks) if b not in self.full_blocks)

    def logits(self, t: Float[Tensor, " S"]) -> Float[Tensor, "S L"]:
        """Logits of the ratios at times t in [0, 1] (Eq. 10), for every block."""
        time = self.time_branch(_time_features(t.to(self.anchor)))  # (S, 1)
        layer = self.layer_branch(self.layer_embedding.weight).squeeze(-1)  # (L,)
        return time + layer + self.anchor

    def forward(
        self, t: Float[Tensor, " S"], noise: Float[Tensor, "S L"] | None = None
    ) -> Float[Tensor, "S L"]:
        """Keep ratios in (0, 1] at times t, 1 for blocks that are never pruned (Eq. 11).

        Args:
            t: Times in [0, 1].
            noise: Added to the logits during policy learning, N(0, 1) in the paper (Eq. 29).
        """
        logits = self.logits(t)
        ratios = torch.sigmoid(logits if noise is None else logits + noise)
        full = torch.zeros(self.num_blocks, dtype=torch.bool, device=ratios.device)
        full[list(self.full_blocks)] = True
        return torch.where(full, 1.0, ratios)

    def schedule(self, target: float, num_bins: int = 64) -> Schedule:
        """The policy as a table, its anchor shifted so that the mean is the target exactly.

        Args:
            target: Mean keep ratio over time and prunable blocks, in (0, 1].
            num_bins: Time bins.
        """
        centres = (torch.arange(num_bins, device=self.anchor.device) + 0.5) / num_bins
        with torch.no_grad():
            logits = self.logits(centres)
        ratios = ratios_from_logits(logits, target, self.full_blocks)
        return Schedule(ratios=ratios, full_blocks=self.full_blocks)


def _branch() -> nn.Sequential:
    branch = nn.Sequential(
        nn.Linear(POLICY_HIDDEN, POLICY_HIDDEN), nn.SiLU(), nn.Linear(POLICY_HIDDEN, 1)
    )
    for parameter in branch[-1].parameters():
        nn.init.zeros_(parameter)
    return branch


def _time_features(t: Float[Tensor, " S"]) -> Float[Tensor, "S F"]:
    """Sinusoidal embedding of 1000 t, as diffusion models embed timesteps."""
    half = POLICY_HIDDEN // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / half)
    angles = 1000.0 * t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
