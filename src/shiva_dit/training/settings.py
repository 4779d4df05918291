"""Parts of a training recipe: routers, ratios, losses, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from shiva_dit.adapter.config import MOST_BINS
from shiva_dit.config import check_types, whole_number
from shiva_dit.core.budget import BudgetConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Size of the routers (Eq. 8, 9)."""

    num_groups: int | None = None
    """G, routers with weights of their own; pairs of blocks by default."""
    hidden: int = 64
    """d'."""
    normalize_inputs: bool = True
    """Layer-normalise what the router reads."""
    inputs: tuple[Literal["time", "context", "layer"], ...] = ("time", "context", "layer")
    """What the router reads beside its token (Eq. 8)."""
    select_every: int = 1
    """So many prunable blocks in a row share the scores of their first."""
    noise_std: float = 0.3
    """Noise on the standardised scores in training, at least 0."""
    tau_rank: tuple[float, float] = (0.2, 0.02)
    """Temperature of the soft ranks at the start and the end, in standard deviations."""
    tau_select: tuple[float, float] = (0.1, 0.02)
    """Temperature of the inclusion scores at the start and the end, as a share of N."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.select_every < 1:
            raise ValueError(f"router select_every must be at least 1, got {self.select_every}.")
        if self.noise_std < 0:
            raise ValueError(f"router noise_std must be at least 0, got {self.noise_std}.")
        for name in ("tau_rank", "tau_select"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"router {name} must be positive, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeConfig:
    """A schedule by hand (`shiva_dit.core.hand_made.hand_made`), where none is learned."""

    depth: float = 0.0
    """How the logit of the ratio goes with depth, from -depth in the first prunable block to
    +depth in the last."""
    time: float = 0.0
    """How it goes with time, from -time at t = 0 to +time at t = 1."""
    form: Literal["linear", "step"] = "linear"
    """Evenly, or in two levels."""

    def __post_init__(self) -> None:
        if not (abs(self.depth) <= 20.0 and abs(self.time) <= 20.0):
            raise ValueError("policy.shape: depth and time must lie in [-20, 20].")
        check_types(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """How the ratio policy learns (Eq. 10-13, 29)."""

    adaptive: bool = False
    """Learn the ratios; if not, `shape` gives them. Not by default: learned ratios have less error
    than flat ones of equal FLOPs on two demo tasks, and more on the third, at 1,024 tokens."""
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    """The fixed schedule; by default every block keeps the target ratio at all times."""
    logit_noise: float = 1.0
    """Standard deviation of the noise on the logits in the policy stage (Eq. 29)."""
    num_bins: int = 64
    """Time bins of the table."""
    target_range: tuple[float, float] | None = None
    """Mean ratios, lowest and highest in (0, 1), that the joint stage trains for: every part has
    one of them, drawn evenly in 1 / ratio (low ones are harder), and meets it as running does.
    The policy knows it, and so has a shape of its own for each. None: for `keep_ratio` alone."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """The pull to the target."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.logit_noise < 0:
            raise ValueError(f"policy logit_noise must be at least 0, got {self.logit_noise}.")
        whole_number("policy num_bins", self.num_bins, least=1, most=MOST_BINS)
        if self.target_range is not None:
            low, high = self.target_range
            if not 0.0 < low < high < 1.0:
                raise ValueError(
                    f"policy target_range must rise within (0, 1), got {self.target_range}."
                )
            if not self.adaptive:
                raise ValueError(
                    "policy.target_range is for learned ratios: set policy.adaptive = true."
                )
        if self.adaptive and self.shape != ShapeConfig():
            raise ValueError("policy.shape is for fixed schedules: set policy.adaptive = false.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the losses (Eq. 14, 31)."""

    diffusion: float = 1.0
    """Flow matching against the data."""
    distillation: float = 1.0
    """Normalised features against the teacher's (Eq. 31)."""
    distill_every: int = 4
    """Every so many blocks; the last block always."""
    output: float = 1.0
    """Squared error of the prediction against the teacher's."""
    guided: float = 1.0
    """Squared error of the guided prediction u + g (c - u) against the teacher's, divided by g:
    where `guidance` has each sample run with its caption (c) and without (u)."""
    drift: float = 0.0
    """Squared error of the mean over a sample's times (`times_per_sample`), as often as it has
    times: on a straight path that mean is what a picture is off by. Of the prediction and, where
    samples are guided, of the guided one, each by its own weight."""
    time_weighting: Literal["uniform", "logit_normal"] = "uniform"
    """How much each time counts in all losses. "logit_normal": by the density of that law, whose
    mean over time is 1: the middle of the way decides what a picture shows. Times are drawn
    evenly and tokens budgeted by the sampler's steps as before, so that a learned policy spends
    its tokens where it counts."""

    def __post_init__(self) -> None:
        check_types(self)
        parts = self.diffusion, self.distillation, self.output, self.guided, self.drift
        if min(parts) < 0:
            raise ValueError("loss weights must be at least 0.")
        if self.diffusion + self.distillation + self.output == 0:
            raise ValueError("all losses have weight 0: there is nothing to learn from.")
        if self.distill_every < 1:
            raise ValueError(f"distill_every must be at least 1, got {self.distill_every}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryConfig:
    """The unpruned model's own samplings (`Trajectories`), seen in training beside noised samples.

    They are drawn before the first step, with the guidance that the recipe trains for, and kept in
    the run's folder at 2 bytes a value. `loss.diffusion` has no part in them.
    """

    count: int = 0
    """How many; 0 trains on noised samples alone."""
    steps: int = 24
    """Steps of UniPC in each; between two of them states go evenly."""
    share: float = 0.5
    """Share of the parts of batches that are taken from them, in (0, 1]."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("trajectories count", self.count, least=0)
        whole_number("trajectories steps", self.steps, least=2, most=1000)
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"trajectories share must lie in (0, 1], got {self.share}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, per part; rates rise linearly at the start of each stage and fall at the end."""

    router: float = 3e-4
    """Learning rate of the router."""
    policy: float = 1e-4
    """Learning rate of the policy."""
    policy_share: float = 1.0
    """Share of the joint stage, at its start, in which the policy learns, in [0, 1]; then its
    ratios are held."""
    backbone: float = 1e-4
    """Learning rate of the backbone (joint stage)."""
    updates: float = 1e-3
    """Learning rate of the rejected tokens' updates."""
    weight_decay: float = 0.01
    """Of the backbone, to its weights as the model was given; nothing else has any. What it pulls
    back in a step is this times the rate."""
    warmup_steps: int = 200
    """Steps over which the rates rise, in each stage."""
    decay_share: float = 0.0
    """Share of the joint stage, at its end, over which the rates fall linearly to 0, in [0, 1]; the
    policy's over the same share of its own part of it."""
    grad_clip: float = 1.0
    """Largest norm of the gradient, of each part by itself."""
    eight_bit: bool = False
    """Hold Adam's moments of the backbone in 8 bits (torchao): a quarter of their memory."""
    ema: float = 0.999
    """Decay of the moving average of what is trained, in [0, 1); it is what is saved."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("router", "policy", "backbone", "updates", "weight_decay"):
            if not 0.0 <= getattr(self, name) <= 1e3:
                raise ValueError(
                    f"optimizer {name} must lie in [0, 1000], got {getattr(self, name)}."
                )
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer warmup_steps must be at least 0, got {self.warmup_steps}.")
        for name in ("policy_share", "decay_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"optimizer {name} must lie in [0, 1], got {getattr(self, name)}.")
        if not 0.0 < self.grad_clip < math.inf:
            raise ValueError(f"optimizer grad_clip must be positive, got {self.grad_clip}.")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"optimizer ema must lie in [0, 1), got {self.ema}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """Looks at a run while it goes on (`Looks`). They change nothing of what is trained."""

    every: int = 0
    """Steps from one look to the next; the last step has one, too. 0: never. A look measures the
    held-out error, and writes `watch/step-....png` and `curves.png` into the run's folder."""
    held_out: int = 32
    """Samples that the held-out error is of, at most. It is the squared error of the prediction to
    the unpruned model's, over fixed noise and times; of the guided prediction, where the recipe has
    `guidance`."""
    held_out_share: float = 0.05
    """Share of the data, in (0, 1), that is held back for this and never trained on. What a picture
    shows decides by itself whether it is, so that adding others moves none. A demo task has
    held-out pictures beside those that it trains on, and holds back nothing."""
    times: int = 8
    """Times of each of these samples, spread as the sampler's steps are."""
    prompts: int = 4
    """Pictures at each look: dense, pruned, and which tokens were kept. A demo task has prompts; of
    other data, captions of held-out samples. 0: none."""
    steps: int | None = None
    """Sampler steps of the pictures; the recipe's `num_steps` by default, or 20."""
    guidance: float | None = None
    """Their guidance scale, at least 1; the middle of the recipe's by default."""
    patience: int = 0
    """Looks of the joint stage without a better held-out error, after which the run ends; 0: it
    runs to its end, and what is saved is its end. Otherwise the best that was seen is."""
    tracker: Literal["tensorboard", "wandb"] | None = None
    """What scalars and pictures are sent to as well; "tensorboard" writes into the run's folder."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("every", "prompts", "patience"):
            whole_number(f"watch {name}", getattr(self, name), least=0)
        for name in ("held_out", "times"):
            whole_number(f"watch {name}", getattr(self, name), least=1)
        if not 0.0 < self.held_out_share < 1.0:
            raise ValueError(f"watch held_out_share must lie in (0, 1), got {self.held_out_share}.")
        if self.steps is not None:
            whole_number("watch steps", self.steps, least=1, most=1000)
        if self.guidance is not None and self.guidance < 1.0:
            raise ValueError(f"watch guidance must be at least 1, got {self.guidance}.")
        if self.patience and not self.every:
            raise ValueError("watch.patience counts looks, and there are none: set watch.every.")
