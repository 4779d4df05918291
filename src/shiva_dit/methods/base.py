"""What a method is: something that plans which tokens run, at some site of every block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.schedule import Schedule
from shiva_dit.core.selection import best_tokens
from shiva_dit.core.time_law import TimeLaw
from shiva_dit.methods.plans import GatherPlan, Plan

Site = Literal["block", "attention", "cross_attention", "feed_forward", "heads", "hidden"]
"""What a plan lies around: the whole block, a part of it, or the last layer of attention ("heads")
or of the feed-forward ("hidden"), whose inputs have the heads' or the hidden channels."""

Need = Literal["passes", "steps", "guidance", "embedding"]
"""What a reducer asks of a run: which pass of guidance a call is, where that is known; at which
step it is; what guidance added to the prediction before. These two are given or refused. And the
model's embedding of the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """One training forward of a method that brings a loss of its own."""

    progress: float
    """Share of the training done, in [0, 1]."""
    generator: torch.Generator
    """Source of chance."""
    noted: list[Any] = field(default_factory=list)
    """What the method's plans leave for its `Reducer.loss`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Where and when a plan is asked for."""

    site: Site
    block: int
    """Its index."""
    num_blocks: int | None = None
    """L."""
    place: str = ""
    """The module's path in its block: some sites are several modules."""
    grid: tuple[int, int] | None = None
    """Height and width of the image in tokens."""
    time: Float[Tensor, ""] | None = None
    """The model's timestep, of the first sample, on the device of the tokens."""
    times: Float[Tensor, " S"] | None = None
    """Times t in [0, 1] of all samples, 1 = pure noise; one where all share it."""
    embedded: Float[Tensor, "S Dt"] | None = None
    """The model's embedding of the time, by sample (`Reducer.needs`)."""
    within: dict[Any, Any] | None = None
    """Lives as long as the forward: what is to be had again in later blocks."""
    lesson: Lesson | None = None
    """Of a training forward."""
    earlier: Plan | None = None
    """What was planned before in the same block and forward, if anything."""
    step: int | None = None
    """Place of the call in its run, from 0 (`Reducer.needs`)."""
    num_steps: int | None = None
    """Steps of the run."""
    memory: dict[Any, Any] | None = None
    """Lives as long as the run, one for each pass of guidance: what is to be had again in later
    calls. Nobody else writes to it; a new run begins with an empty one."""
    is_both: bool = False
    """Whether the batch holds both passes of guidance, as halves."""
    guidance: Float[Tensor, "b N"] | None = None
    """Mean size, by token, of the difference of the two passes' predictions at the step before;
    one row per image. None at the first step."""
    k: int | None = None
    """How many tokens shall run, where a schedule says it (selectors)."""
    terms: Any = None
    """What `Selector.terms` gave for the block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """A block run several times in training, with other numbers of tokens, and mixed."""

    counts: tuple[int, ...]
    """k of each time, in [1, N]; N is the block as it is."""
    weights: Float[Tensor, " M"]
    """Of what each gave; they sum to 1."""


class Reducer(nn.Module, ABC):
    """Makes a module run on fewer tokens, or on less of them.

    It keeps no state between forwards, so that requests cannot disturb each other: what has to be
    remembered goes into the run's own memory (`Where.memory`).
    """

    sites: tuple[Site, ...] = ("block",)
    """Where it works, in every block."""
    needs: tuple[Need, ...] = ()
    """What it has to be told of the run."""
    num_bins: int | None = None
    """Equal bins of time within which it runs alike: training gives all samples of a forward one of
    them. None: any times go together."""
    objective: Mapping[str, float] = {}
    """Weights of the losses that the method was published with, by name (`LossConfig`): they stand
    in the place of the recipe's."""

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """What training updates of its own, by the part of the optimizer whose rate it has.

        Those that learn by gates (`Selector.learns_from_gates`) needn't say it.
        """
        return {}

    def loss(self, lesson: Lesson) -> Float[Tensor, ""] | None:
        """The method's own loss on one training forward, beside the objective's; None: none."""
        del lesson

    @abstractmethod
    def plan(self, x: Float[Tensor, "B N D"], where: Where) -> Plan | None:
        """What happens around one module in one forward; None leaves the module as it is.

        Args:
            x: What the module is called with.
            where: Which module it is.
        """

    def count(self, num_tokens: int) -> int:
        """Tokens that its modules run on, of N; where a schedule says it, or it varies: N."""
        return num_tokens

    def seeded(self, seed: int) -> Reducer:
        """The same with choices of chance that start from a seed; itself where there are none."""
        del seed
        return self


class Selector(Reducer):
    """Scores tokens; the k best run through the block, the others pass it by."""

    learns_from_gates: bool = False
    """Whether training gives its scores a gradient (`shiva_dit.methods.gates`)."""
    scores_alone: bool = False
    """Whether a token's score takes no other token of its sample."""
    weighs: Literal["feed_forward", "block"] | None = None
    """What of a pruned block is multiplied by `weights`: its update by the feed-forward, or the
    whole one; None: nothing."""

    def terms(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"]
    ) -> Sequence[Any] | None:
        """What the scores of each block need beside its tokens, computed once per forward.

        Args:
            time: The backbone's time embedding.
            context: Pooled text or class embedding.
        """
        del time, context
        return None

    def of_role(self, terms: Sequence[Any], role: int) -> Sequence[Any]:
        """What `terms` gave, for tokens of a role (`core.roles`); alike for all by default."""
        del role
        return terms

    def freeze(self, dtype: torch.dtype) -> None:
        """Prepare for forwards without gradients; weights don't change any more.

        Args:
            dtype: Of the tokens.
        """
        del dtype

    def condition_flops(self) -> int:
        """FLOPs of `terms` for one sample."""
        return 0

    def flops(self, num_tokens: int) -> int:
        """FLOPs that the scores of one block cost, per sample; 0 where nothing is multiplied."""
        del num_tokens
        return 0

    @abstractmethod
    def scores(self, x: Float[Tensor, "B N D"], terms: Any, block: int) -> Float[Tensor, "B N"]:
        """Scores of all tokens of a block, float32; larger is better.

        Args:
            x: Its tokens.
            terms: What `terms` gave for this block, or None.
            block: Its index.
        """

    def plan(self, x: Float[Tensor, "B N D"], where: Where) -> GatherPlan:
        """The k best by `scores`."""
        k = x.shape[1] if where.k is None else where.k
        return GatherPlan(best_tokens(self.scores(x, where.terms, where.block), k))

    def weights(self, x: Float[Tensor, "B k D"], block: int) -> Float[Tensor, "B k"]:
        """What the updates of the chosen tokens are multiplied by (`weighs`).

        Args:
            x: These tokens, as they come into the block.
            block: Its index.
        """
        del block
        return x.new_ones(x.shape[:2])

    def weight_flops(self, num_tokens: int) -> int:
        """FLOPs of `weights` for one sample of so many tokens."""
        del num_tokens
        return 0

    def mixtures(self, time_bin: int, num_tokens: int) -> Mapping[int, Mixture]:
        """How training runs the blocks whose numbers of tokens the method learns by itself.

        Args:
            time_bin: In [0, num_bins).
            num_tokens: N.
        """
        del time_bin, num_tokens
        return {}

    def learned_schedule(self, law: TimeLaw) -> Schedule | None:
        """The numbers of tokens that it has learned by itself; None: those that it is given.

        Args:
            law: Whose steps the mean ratio is over.
        """
        del law

    def scorer(self, block: int) -> Callable[[Tensor, Any], Tensor]:
        """`scores` of one block, made once when the selector is attached.

        Where it is one function for all, compiled blocks share one graph.
        """
        return partial(self.scores, block=block)
