"""Tokens that are split among processes (diffusers' context parallelism), chosen among them all.

Each of R processes has N / R of a block's image tokens. Scores are gathered, so that all choose
the same k; each runs k / R of them, whosever they are, and gives what came out to their owners.
Attention among processes is diffusers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from shiva_dit.core.selection import gather_tokens
from shiva_dit.methods.plans import GatherPlan
from shiva_dit.models.families import model_spec
from shiva_dit.models.parallelism import context_parallel

CLASSES = frozenset(
    {
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "QwenImageTransformer2DModel",
        "WanTransformer3DModel",
        "ChronoEditTransformer3DModel",
    }
)
"""Models whose image tokens diffusers splits in all blocks (`_cp_plan`), and that tests have run.

LTX-Video has a plan as well, but 0.42.1 fails on its mask of the text by Ulysses, adapter or not.
"""


class Shards:
    """Who has which of a forward's image tokens: each process as many, in the order of ranks.

    Args:
        group: The processes.
        num_tokens: N.
    """

    def __init__(self, group: Any, num_tokens: int) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.num_tokens, self.num_own = num_tokens, num_tokens // self.size
        """N and N / R."""
        self._rows: dict[str, tuple[Any, Any]] = {}

    def whole(self, own: Shaped[Tensor, "B n ..."]) -> Shaped[Tensor, "B m ..."]:
        """What all processes have, one after the other: m = R n."""
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, dim=1)

    def part(self, values: Shaped[Tensor, "B m ..."]) -> Shaped[Tensor, "B n ..."]:
        """This process's share of such."""
        length = values.shape[1] // self.size
        return values.narrow(1, self.rank * length, length)

    def rows(self, name: str, value: Any, take: Any) -> Any:
        """A block's argument with the rows of all image tokens.

        Args:
            name: The argument's; where it is the same object as for the block before, nothing is
                gathered again.
            value: With this process's rows.
            take: What takes rows of it (`Rows`).
        """
        known = self._rows.get(name)
        if known is None or known[0] is not value:
            known = self._rows[name] = value, take.whole(value, self.num_own, self.whole)
        return known[1]

    def check(self, tokens: int) -> None:
        """Raise unless a block was called with this process's image tokens."""
        if tokens != self.num_own:
            raise ValueError(
                f"a block was called with {tokens} image tokens, where each of {self.size} "
                f"processes has {self.num_own}: call enable_parallelism without a cp_plan."
            )


@dataclass(frozen=True, slots=True)
class ShardedPlan(GatherPlan):
    """Of all processes' tokens keep k; each process runs k / R of them."""

    shards: Shards

    @property
    def own(self) -> Int[Tensor, "B m"]:
        """The chosen tokens that run here, m = k / R, by their places among all N."""
        return self.shards.part(self.chosen)

    def reduce(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B m D"]:
        """Those tokens."""
        return gather_tokens(self.shards.whole(x), self.own)

    def restore(
        self, y: Float[Tensor, "B m D"], rest: Float[Tensor, "B n D"]
    ) -> Float[Tensor, "B n D"]:
        """`rest`, this process's tokens, with those replaced that ran anywhere."""
        batch, k = self.chosen.shape
        order = torch.arange(k, device=y.device).expand(batch, k)
        slots = order.new_full((batch, self.shards.size * self.shards.num_own), -1)
        slots = self.shards.part(slots.scatter(1, self.chosen, order))  # (B, n)
        ran = gather_tokens(self.shards.whole(y), slots.clamp_min(0)).to(rest.dtype)
        return torch.where((slots >= 0)[..., None], ran, rest)


def refuse_context_parallel(attachment: Any, *more: str) -> None:
    """Raise where tokens are split among processes in a way that no choice among all can have.

    Args:
        attachment: A selector on a model (`Attachment`).
        more: What shall be put on besides, in words.

    Raises:
        ValueError: Names it, and says what to do.
    """
    model, selector = attachment.model, attachment.selector
    config = context_parallel(model)
    if config is None:
        return
    if model_spec(model).model_class not in CLASSES:
        raise ValueError(
            f"context parallelism of {type(model).__name__} can't be had with an adapter: it can "
            "for Flux.1, Flux.2, Qwen-Image, Wan and ChronoEdit. Run it in one process."
        )
    if config.ring_degree > 1 or config.ulysses_anything:
        raise ValueError(
            "with an adapter context parallelism runs by Ulysses in equal parts alone: call "
            "enable_parallelism with ulysses_degree, without ring_degree and ulysses_anything."
        )
    if not selector.scores_alone:
        raise ValueError(
            f"{type(selector).__name__} looks at all tokens to score one, which context "
            "parallelism splits among processes: run it in one process."
        )
    on = {
        "shiva_dit.compile": attachment.compiled,
        "shiva_dit.correct": attachment.whole_steps,
        "a graph of forwards": attachment.forwards.graphs,
    }
    found = [*more, *(name for name, each in on.items() if each is not None)]
    if found:
        raise ValueError(
            f"{found[0]} can't be had with context parallelism and an adapter on: leave it off, "
            "or run in one process."
        )


def shards_of(
    model: nn.Module,
    counts: Sequence[int],
    num_tokens: int,
    *,
    timestep: Any,
    has_roles: bool,
    learns: bool,
) -> Shards | None:
    """How the tokens of a forward are split among processes; None: they aren't.

    Args:
        model: The transformer.
        counts: k of every block.
        num_tokens: N.
        timestep: As the call has it.
        has_roles: Whether some tokens have a budget of their own.
        learns: Whether the forward carries gates.

    Raises:
        ValueError: If it can't run so; says what to do.
    """
    config = context_parallel(model)
    if config is None:
        return None
    if learns or torch.is_grad_enabled():
        raise ValueError(
            "an adapter under context parallelism has no gradients: run it within "
            "torch.no_grad(), and train without."
        )
    by_token = isinstance(timestep, Tensor) and timestep.ndim > 1
    if by_token or has_roles:
        raise ValueError(
            f"{'times by token' if by_token else 'reference_keep_ratio'} can't be had with an "
            "adapter under context parallelism: leave it off, or run in one process."
        )
    shards = Shards(config._flattened_mesh.get_group(), num_tokens)
    odd = sorted({n for n in (num_tokens, *counts) if n % shards.size})
    if odd:
        raise ValueError(
            f"{shards.size} processes take equal parts of a block's tokens, and {odd[0]} of "
            f"{num_tokens} don't divide: apply with multiple={shards.size} (and images whose "
            "tokens divide)."
        )
    return shards
