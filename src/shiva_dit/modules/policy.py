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

    One that knows its target has a shape of its own at each mean R (ours; p starts at zero):

    .. math:: \mathrm{logit}\, r(t, l) = \Phi_t(\mathrm{MLP}(t) + \rho\, p_t)
              + \Phi_l(e_l + \rho\, p_l) + b, \qquad
              \rho = \mathrm{logit}\, R

    Args:
        num_blocks: L.
        target: Mean keep ratio asked for, in (0, 1).
        full_blocks: Blocks that are never pruned; their ratio is 1.
        knows_target: Whether the ratios' shape depends on the mean that is asked for.
    """

    def __init__(
        self,
        num_blocks: int,
        target: float,
        full_blocks: Sequence[int] = (0,),
        knows_target: bool = False,
    ) -> None:
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
        self.target = target
        self.anchor = nn.Parameter(torch.tensor(_logit(target)))
        self.time_by_target = self.layer_by_target = None
        if knows_target:
            self.time_by_target = nn.Parameter(torch.zeros(TIME_FEATURES))
            self.layer_by_target = nn.Parameter(torch.zeros(POLICY_HIDDEN))

    @property
    def prunable_blocks(self) -> tuple[int, ...]:
        """Blocks whose ratio is learned."""
        return tuple(b for b in range(self.num_blocks) if b not in self.full_blocks)

    def logits(self, t: Float[Tensor, " S"], target: float | None = None) -> Float[Tensor, "S L"]:
        """Logits of the ratios at times t in [0, 1] (Eq. 10), for every block.

        Args:
            t: Times in [0, 1].
            target: The mean keep ratio that they are for, in (0, 1), to a policy that knows it; by
                default the one that it starts at.
        """
        times, layers = time_features(t.to(self.anchor)), self.layer_embedding.weight
        if self.time_by_target is not None:
            assert self.layer_by_target is not None
            rho = _logit(self.target if target is None else target)
            times = times + rho * self.time_by_target
            layers = layers + rho * self.layer_by_target
        time = self.time_branch(times)  # (S, 1)
        layer = self.layer_branch(layers).squeeze(-1)  # (L,)
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
        return self.ratios(logits if noise is None else logits + noise)

    def ratios(self, logits: Float[Tensor, "S L"]) -> Float[Tensor, "S L"]:
        """Keep ratios of logits, 1 for blocks that are never pruned (Eq. 11)."""
        ratios = torch.sigmoid(logits)
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
            logits = self.logits(centres, target if target < 1.0 else None)
        ratios = ratios_from_logits(logits, target, self.full_blocks, law.weights(num_bins))
        return Schedule(ratios=ratios, full_blocks=self.full_blocks, law=law)


def _logit(ratio: float) -> float:
    return math.log(ratio) - math.log1p(-ratio)


def _branch() -> nn.Sequential:
    branch = nn.Sequential(
        nn.Linear(TIME_FEATURES, POLICY_HIDDEN), nn.SiLU(), nn.Linear(POLICY_HIDDEN, 1)
    )
    for parameter in branch[-1].parameters():
        nn.init.zeros_(parameter)
    return branch
