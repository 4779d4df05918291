"""What a method is: something that plans which tokens run, at some site of every block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.core.selection import best_tokens
from shiva_dit.methods.plans import GatherPlan, Plan

Site = Literal["block", "attention", "cross_attention", "feed_forward", "heads", "hidden"]
"""What a plan lies around: the whole block, a part of it, or the last layer of attention ("heads")
or of the feed-forward ("hidden"), whose inputs have the heads' or the hidden channels."""

Need = Literal["passes", "steps", "guidance"]
"""What a reducer asks of a run: which pass of guidance a call is, where that is known; at which
step it is; what guidance added to the prediction before. The last two are given or refused."""


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


class Reducer(nn.Module, ABC):
    """Makes a module run on fewer tokens, or on less of them.

    It keeps no state between forwards, so that requests cannot disturb each other: what has to be
    remembered goes into the run's own memory (`Where.memory`).
    """

    sites: tuple[Site, ...] = ("block",)
    """Where it works, in every block."""
    needs: tuple[Need, ...] = ()
    """What it has to be told of the run."""

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

    def scorer(self, block: int) -> Callable[[Tensor, Any], Tensor]:
        """`scores` of one block, made once when the selector is attached.

        Where it is one function for all, compiled blocks share one graph.
        """
        return partial(self.scores, block=block)
