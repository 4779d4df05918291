"""A training recipe: everything that decides a run, with the paper's values as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shiva_dit.adapter.config import BackboneKind, RejectedKind
from shiva_dit.adapter.parts import Expert
from shiva_dit.config import LARGEST_SEED, check_types, whole_number
from shiva_dit.core.estimators import EstimatorConfig
from shiva_dit.methods.registry import METHODS
from shiva_dit.methods.settings import DiffCRConfig, DyDiTConfig, SparseDiTConfig
from shiva_dit.models.base_dtype import BaseDtype
from shiva_dit.models.references import check_reference_ratio
from shiva_dit.training.settings import (
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RouterConfig,
    TrajectoryConfig,
    WatchConfig,
)

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[*METHODS]
StageName = Literal["warmup", "policy", "joint"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run of `shiva-dit train`."""

    task: str | None = "digits"
    """Where model and data come from: "digits", "scenes", "scenes64" or "emoji"; None in the record
    of a run with other data."""
    out: Path = Path("runs/train")
    """Folder for checkpoints, log and adapter."""
    seed: int = 0
    """Of initial weights, data order and noise; in [0, 2^32)."""
    expert: Expert | None = None
    """Which of a pipeline's two transformers is trained (Wan 2.2), on its share of times: "high",
    `transformer`, from the pipeline's `boundary_ratio` on, or "low", `transformer_2`, below it;
    `shiva-dit join` makes one adapter of both. None: the pipeline has one."""
    start: Path | None = None
    """Folder of an adapter whose router, ratios and tuned weights the training starts from; the
    teacher stays the model as it is given. None starts untrained. Ours only."""
    start_base: Path | None = None
    """Weights of the model that `start` was trained for, where that is another than this one: a
    safetensors file, or the folder of a transformer. Weights tuned as a whole then start as this
    model's own, moved by what they differ from that one's."""
    method: MethodName = "shiva"
    """What runs on fewer tokens: ours, or one of `methods/registry.py`: "random", "norm", "centre"
    (a fixed map of the middle), "fixed_map" (a learned one), "dense" (no pruning), a published one
    that is trained: "diffcr", "dydit", "sparsedit", or one that runs without training: "tomesd"
    (Token Merging), "tofu", "ibtm", "toma", "sdtm", "refresh" (ours)."""
    keep_ratio: float = 0.6
    """Target of the mean keep ratio over the sampler's steps and prunable blocks, in (0, 1); of
    "dydit" the share of FLOPs, of "sparsedit" that of the tokens in sparse blocks."""
    reference_keep_ratio: float | None = None
    """Share kept of the tokens of references (pictures to go by, `REFERENCES` of a batch; clean
    frames) in every prunable block, in (0, 1], or 0 for frames, which pass by then: a budget of
    their own, flat over time and depth, beside `keep_ratio`, which is then the target's; routers
    read which role a token has. Data with references need it. Ours only."""
    clean_frames: int = 0
    """So many first frames of every video's latents are given as they are, at time 0, as from image
    to video: references, of which the losses on predictions know nothing. For classes that take
    times by token or frame (`ModelSpec.token_times`); 0: all are noisy."""
    backbone: BackboneKind = "dora"
    """What the joint stage does to the backbone: "frozen", "lora", "dora" or "full"."""
    base_dtype: BaseDtype = "as_given"
    """What the model's own weights are turned into while a LoRA, a DoRA or nothing of them is
    trained: "as_given", "float32", "bfloat16"; or linear layers of blocks in "int8" (torchao) or
    "nf4" (bitsandbytes) and all else in bfloat16. They are the teacher's as well."""
    shard: bool = False
    """For "full": several processes share the weights of student and teacher, gradients, moments
    and averages (FSDP2) instead of each holding all. A process that is alone holds all."""
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
    times_per_sample: int = 1
    """Times at which each sample of a part is seen, with the same noise: `loss.drift` is about what
    their errors have in common. Divides the samples of a part."""
    shared_bin: bool = False
    """Give all samples of a part the very time bin that its k is for. Exact, but each step then
    sees only as many times as there are parts, and its gradient is noisier."""
    warmup_ratios: tuple[float, float] = (0.2, 0.9)
    """Range of the stratified keep ratios of the warm-up, within (0, 1]."""
    time_sampling: Literal["logit_normal", "uniform", "sampler"] = "uniform"
    """Law of t in training. Where the policy learns it must not be "logit_normal": its losses are
    an integral over t, and the budget counts each t by the steps that the sampler takes there. How
    much a time counts for the losses is `loss.time_weighting`'s to say. "sampler": the times of the
    sampler's `num_steps` steps and no others, alike, one for each part of a batch: for a backbone
    that was distilled to few steps. The mean keep ratio is over these, then."""
    num_steps: int | None = None
    """Steps of the sampler, where `time_sampling` is "sampler"."""
    guidance: tuple[float, float] | None = None
    """Lowest and highest guidance scale, at least 1, that the adapter is for: one is drawn evenly
    for each sample. Every sample then runs with and without its caption, in two halves that keep
    the same tokens as when sampling, and the error of the guided prediction is a loss
    (`loss.guided`). A model that is told its guidance (Flux) is told the scale instead. None: for
    sampling without guidance."""
    caption_dropout: float = 0.1
    """Probability of training a sample without its caption; unused where each runs both ways."""
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
    trajectories: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    """States of the unpruned model's own samplings, to train on as well."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the losses."""
    objective: Literal["method", "recipe"] = "method"
    """Whose weights these are where the method was published with its own: its, or `loss`'s."""
    diffcr: DiffCRConfig = field(default_factory=DiffCRConfig)
    """How "diffcr" learns."""
    dydit: DyDiTConfig = field(default_factory=DyDiTConfig)
    """How "dydit" learns."""
    sparsedit: SparseDiTConfig = field(default_factory=SparseDiTConfig)
    """What the blocks of "sparsedit" do."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Learning rates, clipping and averaging."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """Looks at the run while it goes on: held-out error, pictures, early stop."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("seed", self.seed, least=0, most=LARGEST_SEED)
        if not 0.0 < self.keep_ratio < 1.0:
            raise ValueError(f"keep_ratio must lie in (0, 1), got {self.keep_ratio}.")
        for name in ("batch_size", "micro_batches", "times_per_sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size must be a multiple of micro_batches, got {self.batch_size} and "
                f"{self.micro_batches}."
            )
        part = self.batch_size // self.micro_batches
        if part % self.times_per_sample:
            raise ValueError(
                f"batch_size / micro_batches, {part}, must be a multiple of times_per_sample, "
                f"got {self.times_per_sample}."
            )
        if self.loss.drift and self.times_per_sample == 1:
            raise ValueError("loss.drift needs times_per_sample of 2 at least.")
        low, high = self.warmup_ratios
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"warmup_ratios must be low <= high in (0, 1], got {low}, {high}.")
        if self.guidance is not None and not 1.0 <= self.guidance[0] <= self.guidance[1] <= 100.0:
            raise ValueError(
                "guidance must be lowest <= highest scale, both in [1, 100], got "
                f"{self.guidance[0]}, {self.guidance[1]}."
            )
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must lie in [0, 1], got {self.caption_dropout}.")
        self._check_steps()
        self._check_combination()
        self._check_memory()
        self._check_sampler()
        self._check_watch()

    def _check_steps(self) -> None:
        for name in ("warmup_steps", "policy_steps", "joint_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.total_steps == 0:
            raise ValueError("all stages have 0 steps: there is nothing to train.")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}.")

    def _check_references(self) -> None:
        if self.reference_keep_ratio is not None:
            check_reference_ratio(self.reference_keep_ratio)
            if self.method != "shiva":
                raise ValueError(
                    f'reference_keep_ratio is for method = "shiva", not "{self.method}": leave it '
                    "out."
                )
        whole_number("clean_frames", self.clean_frames, least=0)
        if self.clean_frames and self.reference_keep_ratio is None:
            raise ValueError(
                "clean_frames are references, whose tokens need a budget of their own: set "
                "reference_keep_ratio, 1.0 to keep them all."
            )
        if self.clean_frames and self.trajectories.count:
            raise ValueError(
                "trajectories are samplings of all frames from noise, and clean_frames come without"
                " any: set trajectories.count = 0."
            )

    def _check_combination(self) -> None:
        self._check_references()
        if self.start is not None and self.method != "shiva":
            raise ValueError(
                f'start is an adapter\'s folder, and method = "{self.method}" has none.'
            )
        if self.start_base is not None and (self.start is None or self.backbone != "full"):
            raise ValueError(
                'start_base is the model of an adapter to start from that has backbone = "full".'
            )
        tuned = self.backbone != "frozen" or self.rejected != "identity"
        if tuned and not METHODS[self.method].tunes:
            raise ValueError(
                f'method = "{self.method}" runs without training: set backbone = "frozen" and '
                'rejected = "identity".'
            )
        if self.rejected != "identity" and not METHODS[self.method].rejects:
            raise ValueError(
                f'method = "{self.method}" leaves no tokens out of whole blocks: set rejected = '
                '"identity".'
            )
        if self.trajectories.count and self.expert is not None:
            raise ValueError(
                "trajectories are samplings of one model from noise to picture, and an expert "
                "makes a part of them: set trajectories.count = 0."
            )
        if self.trajectories.count and not (self.loss.output or self.loss.distillation):
            raise ValueError(
                "trajectories are states to follow the unpruned model from: they need loss.output "
                "or loss.distillation."
            )
        if self.learns_policy and self.time_sampling == "logit_normal":
            raise ValueError(
                'a learned policy needs time_sampling = "uniform": its losses are an integral over '
                't. To count some times more, set loss.time_weighting = "logit_normal", or '
                "policy.adaptive = false to train with other laws of t."
            )

    def _check_watch(self) -> None:
        if self.watch.every and self.method != "shiva":
            raise ValueError(
                f'watch is for adapters, not for method = "{self.method}": set watch.every = 0.'
            )
        if self.watch.guidance is not None and self.guidance is None:
            raise ValueError(
                "watch.guidance is for recipes that train for guidance: set guidance = [low, high]."
            )

    def _check_memory(self) -> None:
        if self.backbone == "full" and self.base_dtype not in ("as_given", "float32"):
            raise ValueError(
                f'backbone = "full" trains the model\'s own weights, which must be float32, not '
                f'base_dtype = "{self.base_dtype}": train a LoRA or DoRA, or set precision = '
                '"bfloat16".'
            )
        if self.shard and self.backbone != "full":
            raise ValueError(
                f'shard is for backbone = "full": with "{self.backbone}" the model\'s own weights '
                'take less by base_dtype = "bfloat16", "int8" or "nf4".'
            )
        if self.backbone == "frozen" and self.optimizer.eight_bit:
            raise ValueError(
                'optimizer.eight_bit is about the backbone, and backbone = "frozen" trains none '
                "of it: set optimizer.eight_bit = false."
            )

    def _check_sampler(self) -> None:
        if (self.num_steps is not None) != (self.time_sampling == "sampler"):
            raise ValueError(
                'time_sampling = "sampler" and num_steps go together, the number of its steps; got '
                f"{self.time_sampling!r} and {self.num_steps}."
            )
        if self.num_steps is None:
            return
        whole_number("num_steps", self.num_steps, least=1)
        if self.shared_bin or self.times_per_sample > 1:
            raise ValueError(
                'time_sampling = "sampler" gives each part of a batch one time: leave shared_bin '
                "and times_per_sample as they are by default."
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
