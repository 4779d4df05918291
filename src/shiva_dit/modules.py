"""What is learned: the router that scores tokens, and the policy that says how many to keep."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

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


class TokenScorer(nn.Module):
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
        super().__init__()
        self.normalize_inputs = normalize_inputs
        self.hidden = hidden
        self.project_tokens = nn.Linear(width, hidden)
        self.project_time = nn.Linear(time_dim, hidden) if "time" in inputs else None
        self.project_context = nn.Linear(context_dim, hidden) if "context" in inputs else None
        self.project_layer = nn.Linear(LAYER_DIM, hidden) if "layer" in inputs else None
        self.score_norm = nn.LayerNorm(hidden)
        # No bias: it would move all scores alike, and the selection not at all.
        self.score = nn.Linear(hidden, 1, bias=False)

    def condition(
        self,
        time: Float[Tensor, "B Dt"],
        context: Float[Tensor, "B Dc"],
        layer: Float[Tensor, " Dl"],
    ) -> Float[Tensor, "B H"]:
        """The context term h (Eq. 8), in float32 also under autocast: inference has none."""
        with without_autocast(time.device):
            h = layer.new_zeros(len(time), self.hidden)
            if self.project_time is not None:
                h = h + self.project_time(self._normalize(time).float())
            if self.project_context is not None:
                h = h + self.project_context(self._normalize(context).float())
            return h if self.project_layer is None else h + self.project_layer(layer)

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B H"]
    ) -> Float[Tensor, "B N"]:
        """Scores of all tokens (Eq. 9), in float32; larger is better.

        Weights are float32. The projection, which reads all tokens, runs in their dtype; the score
        layer in float32 always: 4,096 scores in bfloat16 take a third as many distinct values.
        """
        projection = self.project_tokens
        projected = F.linear(
            self._normalize(x), projection.weight.to(x.dtype), projection.bias.to(x.dtype)
        )
        hidden = F.silu(projected.float() + condition[:, None])  # (B, N, H)
        # Not a matrix product: autocast would round that to 16 bits.
        return (self.score_norm(hidden) * self.score.weight[0]).sum(-1)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) if self.normalize_inputs else x


class ShivaRouter(nn.Module):
    """Scores the tokens of every block from token, time, text and layer (Eq. 8, 9).

    Adjacent blocks share one set of weights (block l uses group l // (L / G)); the layer embedding
    tells them apart.

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
        super().__init__()
        if not set(inputs) <= set(ROUTER_INPUTS):
            raise ValueError(
                f"router inputs must be among {', '.join(ROUTER_INPUTS)}, got {', '.join(inputs)}."
            )
        if not 1 <= num_groups <= num_blocks or num_blocks % num_groups:
            divisors = [g for g in range(1, num_blocks + 1) if num_blocks % g == 0]
            raise ValueError(
                f"num_groups must divide the number of blocks, {num_blocks}: one of {divisors}, "
                f"got {num_groups}."
            )
        self.num_blocks, self.num_groups = num_blocks, num_groups
        self.hidden = hidden
        self.normalize_inputs = normalize_inputs
        self.groups = nn.ModuleList(
            TokenScorer(width, time_dim, context_dim, hidden, normalize_inputs, inputs)
            for _ in range(num_groups)
        )
        self.layer_embedding = nn.Embedding(num_blocks, LAYER_DIM)

    def scorer(self, block: int) -> TokenScorer:
        """The group's weights that a block uses."""
        scorer = self.groups[block * self.num_groups // self.num_blocks]
        assert isinstance(scorer, TokenScorer)
        return scorer

    def condition(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"], block: int
    ) -> Float[Tensor, "B H"]:
        """The context term h of a block (Eq. 8), once per forward, whatever N.

        Args:
            time: The backbone's time embedding.
            context: Pooled text or class embedding.
            block: Index of the block.
        """
        return self.scorer(block).condition(time, context, self.layer_embedding.weight[block])

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B H"], block: int
    ) -> Float[Tensor, "B N"]:
        """Scores of all tokens of a block (Eq. 9), in float32; larger is better."""
        return self.scorer(block)(x, condition)


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
