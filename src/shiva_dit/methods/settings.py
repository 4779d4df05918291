"""Settings of the published methods that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shiva_dit.config import check_types, whole_number


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffCRConfig:
    """How DiffCR learns."""

    regions: int = 4
    """Equal regions of time, each with ratios of its own."""
    budget_weight: float = 0.3
    """Of the squared distance of the mean ratio from its target."""
    weight_site: Literal["feed_forward", "block"] = "feed_forward"
    """What of a block's update is multiplied by the router's weight: its feed-forward's part, or
    all of it."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("diffcr regions", self.regions, least=1, most=1000)
        if not 0.0 <= self.budget_weight <= 1e6:
            raise ValueError(
                f"diffcr budget_weight must lie in [0, 1e6], got {self.budget_weight}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DyDiTConfig:
    """How DyDiT learns."""

    tau: float = 5.0
    """Temperature of the gates in training."""
    width_bias: float = 15.0
    """First logit of heads and hidden groups."""
    token_bias: float = 35.0
    """First logit of tokens, about."""
    bottleneck: int = 16
    """Token gates are D / this wide, 1 at least."""
    flops_weight: float = 2.0
    """Of the squared distance of the FLOPs' share from its target."""
    anneal: float = 0.05
    """Share of the training in which the target falls from 1."""
    widths: bool = True
    """Whether heads and hidden channels have gates; if not, tokens alone."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("dydit bottleneck", self.bottleneck, least=1, most=10_000)
        if not 0.0 < self.tau <= 1e6:
            raise ValueError(f"dydit tau must be positive, got {self.tau}.")
        if not 0.0 <= self.flops_weight <= 1e6:
            raise ValueError(f"dydit flops_weight must lie in [0, 1e6], got {self.flops_weight}.")
        if not 0.0 <= self.anneal <= 1.0:
            raise ValueError(f"dydit anneal must lie in [0, 1], got {self.anneal}.")
        if not (abs(self.width_bias) <= 100.0 and abs(self.token_bias) <= 100.0):
            raise ValueError("dydit: width_bias and token_bias must lie in [-100, 100].")


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseDiTConfig:
    """Which block does what, and how the number of tokens grows."""

    pool: int = 1
    """Blocks at the bottom that attend to all tokens alike."""
    modules: int | None = None
    """K, how often tokens are merged and recovered; by default one for every six blocks."""
    groups: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Blocks of a module that merge, run sparse, recover, and run dense."""
    growth: float = 0.17
    """By how much the share of tokens is larger at the end than at the start; less where it would
    leave [0, 1]."""
    bins: int = 8
    """Equal bins of time, each with a number of tokens."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("sparsedit pool", self.pool, least=0, most=1000)
        whole_number("sparsedit bins", self.bins, least=1, most=1000)
        if self.modules is not None:
            whole_number("sparsedit modules", self.modules, least=1, most=1000)
        if min(self.groups) < 0 or not self.groups[0] or not self.groups[2]:
            raise ValueError(
                f"sparsedit groups: a module merges and recovers, got {list(self.groups)}."
            )
        if not 0.0 <= self.growth < 1.0:
            raise ValueError(f"sparsedit growth must lie in [0, 1), got {self.growth}.")

    def roles(self, num_blocks: int) -> str:
        """What each of L blocks does: P(ool), M(erge), S(parse), R(ecover), D(ense).

        Raises:
            ValueError: If there are too few of them.
        """
        modules = self.modules or max(1, num_blocks // 6)
        module = "".join(r * n for r, n in zip("MSRD", self.groups, strict=True))
        roles = "P" * self.pool + module * modules
        if len(roles) > num_blocks:
            raise ValueError(
                f"sparsedit: {self.pool} blocks that pool and {modules} modules of {len(module)} "
                f"are more than the model's {num_blocks}: set pool, modules or groups."
            )
        return roles.ljust(num_blocks, "D")
