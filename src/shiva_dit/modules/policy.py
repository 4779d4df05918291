"""The ratio policy: how many tokens each block keeps at each time (Eq. 10, 11, 29)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.anchor import ratios_from_logits
from shiva_dit.core.schedule import Schedule
from shiva_dit.core.time_law import UNIFORM, TimeLaw
from shiva_dit.modules.context import TIME_FEATURES, time_features

POLICY_HIDDEN = TIME_FEATURES  # the layer embedding is as wide, and both branches are alike


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
        time = self.time_branch(time_features(t.to(self.anchor)))  # (S, 1)
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

    def schedule(self, target: float, num_bins: int = 64, law: TimeLaw = UNIFORM) -> Schedule:
        """The policy as a table, its anchor shifted so that the mean is the target exactly.

        Args:
            target: Mean keep ratio over steps and prunable blocks, in (0, 1].
            num_bins: Time bins.
            law: Whose steps the mean is over; the uniform law by default.
        """
        centres = (torch.arange(num_bins, device=self.anchor.device) + 0.5) / num_bins
        with torch.no_grad():
            logits = self.logits(centres)
        ratios = ratios_from_logits(logits, target, self.full_blocks, law.weights(num_bins))
        return Schedule(ratios=ratios, full_blocks=self.full_blocks, law=law)


def _branch() -> nn.Sequential:
    branch = nn.Sequential(
        nn.Linear(TIME_FEATURES, POLICY_HIDDEN), nn.SiLU(), nn.Linear(POLICY_HIDDEN, 1)
    )
    for parameter in branch[-1].parameters():
        nn.init.zeros_(parameter)
    return branch
