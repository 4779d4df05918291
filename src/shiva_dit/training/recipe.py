"""A training recipe: everything that decides a run, with the paper's values as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shiva_dit.adapter.config import MOST_BINS, BackboneKind, RejectedKind
from shiva_dit.config import LARGEST_SEED, check_types, whole_number
from shiva_dit.core.budget import BudgetConfig
from shiva_dit.core.estimators import EstimatorConfig
from shiva_dit.methods.registry import METHODS

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[*METHODS]
StageName = Literal["warmup", "policy", "joint"]


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

    adaptive: bool = True
    """Learn the ratios; if not, `shape` gives them."""
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    """The fixed schedule; by default every block keeps the target ratio at all times."""
    logit_noise: float = 1.0
    """Standard deviation of the noise on the logits in the policy stage (Eq. 29)."""
    num_bins: int = 64
    """Time bins of the table."""
    target_range: tuple[float, float] | None = None
    """Mean ratios, lowest and highest in (0, 1), that the joint stage trains for: every part moves
    the anchor to one of them, drawn evenly, as running at another ratio does. None: for
    `keep_ratio` alone."""
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
                raise ValueError("policy.target_range is for learned ratios, not for fixed ones.")
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
    time_weighting: Literal["uniform", "logit_normal"] = "uniform"
    """How much each time counts in all losses. "logit_normal": by the density of that law, whose
    mean over time is 1: the middle of the way decides what a picture shows. Times are drawn
    evenly and tokens budgeted by the sampler's steps as before, so that a learned policy spends
    its tokens where it counts."""

    def __post_init__(self) -> None:
        check_types(self)
        if min(self.diffusion, self.distillation, self.output) < 0:
            raise ValueError("loss weights must be at least 0.")
        if self.diffusion + self.distillation + self.output == 0:
            raise ValueError("all losses have weight 0: there is nothing to learn from.")
        if self.distill_every < 1:
            raise ValueError(f"distill_every must be at least 1, got {self.distill_every}.")


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
    """Of the backbone; nothing else has any."""
    warmup_steps: int = 200
    """Steps over which the rates rise, in each stage."""
    decay_share: float = 0.0
    """Share of the joint stage, at its end, over which the rates fall linearly to 0, in [0, 1]; the
    policy's over the same share of its own part of it."""
    grad_clip: float = 1.0
    """Largest norm of the gradient, of each part by itself."""
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
class TrainConfig:
    """One run of `shiva-dit train`."""

    task: str | None = "digits"
    """Where model and data come from: "digits", "scenes" or "scenes64"; None in the record of a run
    with other data."""
    out: Path = Path("runs/train")
    """Folder for checkpoints, log and adapter."""
    seed: int = 0
    """Of initial weights, data order and noise; in [0, 2^32)."""
    method: MethodName = "shiva"
    """What runs on fewer tokens: ours, or one of `methods/registry.py`: "random", "norm", "centre"
    (a fixed map of the middle), "fixed_map" (a learned one), "dense" (no pruning), or one that runs
    without training: "tomesd" (Token Merging), "tofu", "ibtm", "toma", "sdtm"."""
    keep_ratio: float = 0.6
    """Target of the mean keep ratio over the sampler's steps and prunable blocks, in (0, 1)."""
    backbone: BackboneKind = "dora"
    """What the joint stage does to the backbone: "frozen", "lora", "dora" or "full"."""
    lora_rank: int = 32
    """Rank, for "lora" and "dora"."""
    rejected: RejectedKind = "identity"
    """What a token gets from a block that leaves it out: "identity", nothing, as in the paper;
    "low_rank", a learned update (`RejectedUpdates`)."""
    rejected_rank: int = 16
    """Rank of that update. D / 9 costs 2% of a block of width D."""
    warmup_steps: int = 2000
    """Router warm-up: stratified ratios, frozen backbone. Ours only."""
    policy_steps: int = 2000
    """Policy learning: the policy is on, with noise; frozen backbone. Ours only."""
    joint_steps: int = 4000
    """Joint tuning of router, policy and backbone, without noise on the logits. A control trains
    its backbone for all three stages' steps, so that steps are equal."""
    batch_size: int = 16
    """Samples per step."""
    micro_batches: int = 4
    """Parts of a batch; the samples of one part have neighbouring times and share every k."""
    shared_bin: bool = False
    """Give all samples of a part the very time bin that its k is for. Exact, but each step then
    sees only as many times as there are parts, and its gradient is noisier."""
    warmup_ratios: tuple[float, float] = (0.2, 0.9)
    """Range of the stratified keep ratios of the warm-up, within (0, 1]."""
    time_sampling: Literal["logit_normal", "uniform"] = "uniform"
    """Law of t in training. Where the policy learns it must be "uniform": its losses are an
    integral over t, and the budget counts each t by the steps that the sampler takes there. How
    much a time counts for the losses is `loss.time_weighting`'s to say."""
    caption_dropout: float = 0.1
    """Probability of training a sample without its caption."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the model's forward; scores, ranks and policy are float32 always."""
    gradient_checkpointing: bool = False
    """Recompute blocks in backward to save memory."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    backbone_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """How a tuned backbone is saved with the adapter."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """Size of the routers, noise and temperatures."""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    """How the scores get a gradient."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """How the keep ratios are learned."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the losses."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Learning rates, clipping and averaging."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("seed", self.seed, least=0, most=LARGEST_SEED)
        if not 0.0 < self.keep_ratio < 1.0:
            raise ValueError(f"keep_ratio must lie in (0, 1), got {self.keep_ratio}.")
        for name in ("batch_size", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size must be a multiple of micro_batches, got {self.batch_size} and "
                f"{self.micro_batches}."
            )
        low, high = self.warmup_ratios
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"warmup_ratios must be low <= high in (0, 1], got {low}, {high}.")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must lie in [0, 1], got {self.caption_dropout}.")
        self._check_steps()
        self._check_combination()

    def _check_steps(self) -> None:
        for name in ("warmup_steps", "policy_steps", "joint_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.total_steps == 0:
            raise ValueError("all stages have 0 steps: there is nothing to train.")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}.")

    def _check_combination(self) -> None:
        tuned = self.backbone != "frozen" or self.rejected != "identity"
        if tuned and not METHODS[self.method].tunes:
            raise ValueError(
                f'method = "{self.method}" runs without training: set backbone = "frozen" and '
                'rejected = "identity".'
            )
        if self.learns_policy and self.time_sampling != "uniform":
            raise ValueError(
                'a learned policy needs time_sampling = "uniform": its losses are an integral over '
                't. To count some times more, set loss.time_weighting = "logit_normal", or '
                "policy.adaptive = false to train with other laws of t."
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return self.warmup_steps + self.policy_steps + self.joint_steps

    @property
    def trains_nothing(self) -> bool:
        """Whether there is nothing to train: some controls with a frozen backbone."""
        fixed = not METHODS[self.method].learns and self.rejected == "identity"
        return self.backbone == "frozen" and (fixed or self.method == "dense")

    @property
    def learns_policy(self) -> bool:
        """Whether the keep ratios are learned."""
        return self.method == "shiva" and self.policy.adaptive

    def stage_at(self, step: int) -> tuple[StageName, int, int]:
        """The stage of a step: its name, the step within it, and its length."""
        if self.method != "shiva":
            return "joint", step, self.total_steps
        stages: tuple[tuple[StageName, int], ...] = (
            ("warmup", self.warmup_steps),
            ("policy", self.policy_steps),
            ("joint", self.joint_steps),
        )
        for name, length in stages:
            if step < length:
                return name, step, length
            step -= length
        raise ValueError("there is no stage after the last step.")
