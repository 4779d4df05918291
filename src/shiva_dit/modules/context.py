"""What router and updates share: the context term (Eq. 8), and weights by groups of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

LAYER_DIM = 64
CONTEXT_INPUTS: tuple[str, ...] = ("time", "context", "layer")
"""What the context term is made of (Eq. 8)."""


TIME_FEATURES = 256
"""Width of `time_features`."""


def time_features(t: Float[Tensor, " S"]) -> Float[Tensor, "S F"]:
    """Sinusoidal embedding of 1000 t, t in [0, 1], as diffusion models embed timesteps."""
    half = TIME_FEATURES // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / half)
    angles = 1000.0 * t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within: products in the dtype of their arguments. The meta device knows no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_autocast(device: torch.device) -> bool:
    """Whether products are rounded to 16 bits, whatever their arguments."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class ContextModule(nn.Module):
    """What depends on time, context and layer (Eq. 8), by a context term of any size.

    `DepthGroups.condition` computes that term, for all blocks together.

    Args:
        normalize_inputs: Layer-normalise tokens, time and context first.
    """

    def __init__(self, normalize_inputs: bool) -> None:
        super().__init__()
        self.normalize_inputs = normalize_inputs

    def read_context(
        self,
        time_dim: int,
        context_dim: int,
        size: int,
        inputs: Collection[str] = CONTEXT_INPUTS,
    ) -> None:
        """Make the projections, to vectors of `size`.

        Apart from the constructor: a module decides in which order its weights are drawn.
        """
        self.size = size
        self.project_time = nn.Linear(time_dim, size) if "time" in inputs else None
        self.project_context = nn.Linear(context_dim, size) if "context" in inputs else None
        self.project_layer = nn.Linear(LAYER_DIM, size) if "layer" in inputs else None

    def bias(self) -> Float[Tensor, " H"]:
        """What is added to the context term whatever time and context are."""
        layers = (self.project_time, self.project_context, self.project_layer)
        biases: list[Tensor] = [layer.bias for layer in layers if layer is not None]
        return (
            torch.stack(biases).sum(0) if biases else next(self.parameters()).new_zeros(self.size)
        )

    def normalize(self, x: Tensor) -> Tensor:
        """Layer-normalised, without parameters, where that is asked for."""
        return F.layer_norm(x, x.shape[-1:]) if self.normalize_inputs else x


def linear_flops(num_tokens: int, layer: nn.Linear) -> int:
    """FLOPs of a linear layer on some tokens: 2 per multiply-add."""
    return 2 * num_tokens * layer.in_features * layer.out_features


def linear_in_dtype_of(x: Tensor, layer: nn.Linear) -> Tensor:
    """A float32 layer on tokens of any dtype, in theirs."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def check_groups(num_blocks: int, num_groups: int) -> None:
    """Raise a ValueError unless L blocks can be put into so many groups."""
    if not 1 <= num_groups <= num_blocks:
        raise ValueError(
            f"num_groups must lie between 1 and the number of blocks, {num_blocks}, got "
            f"{num_groups}."
        )


class DepthGroups(nn.Module):
    """Weights for every block, shared by adjacent ones: block l uses group floor(l G / L).

    A layer embedding tells the blocks of one group apart.

    Args:
        make: Makes one group's module.
        num_blocks: L.
        num_groups: G in [1, L].

    Raises:
        ValueError: If G lies outside that.
    """

    frozen_index: Int[Tensor, " L"] | None
    frozen_weight: Float[Tensor, "M D"] | None
    frozen_shift: Float[Tensor, "L 1 H"] | None

    def __init__(self, make: Callable[[], ContextModule], num_blocks: int, num_groups: int) -> None:
        super().__init__()
        check_groups(num_blocks, num_groups)
        self.num_blocks, self.num_groups = num_blocks, num_groups
        self.groups = nn.ModuleList(make() for _ in range(num_groups))
        self.layer_embedding = nn.Embedding(num_blocks, LAYER_DIM)
        self.group_of = [block * num_groups // num_blocks for block in range(num_blocks)]
        """Of each block."""
        for name in ("frozen_index", "frozen_weight", "frozen_shift"):
            self.register_buffer(name, None, persistent=False)

    def group(self, block: int) -> Any:
        """The group's module that a block uses."""
        return self.groups[self.group_of[block]]

    def condition(
        self, time: Float[Tensor, "B Dt"], context: Float[Tensor, "B Dc"]
    ) -> Float[Tensor, "L B H"]:
        """The context term h of every block (Eq. 8), in float32 also under autocast.

        Once per forward, whatever N, and for all blocks at once: block by block, launching its
        small products took most of the time that selection takes a host.

        Args:
            time: The backbone's time embedding.
            context: Pooled text or class embedding.
        """
        first: Any = self.groups[0]
        read = [
            first.normalize(value).float()
            for value, layer in ((time, first.project_time), (context, first.project_context))
            if layer is not None
        ]
        with without_autocast(time.device):
            index, weight, shift = self.stacked()
            if weight is None:
                return shift.expand(-1, len(time), -1)
            h = F.linear(torch.cat(read, dim=-1), weight)  # (B, G * H)
            by_group = h.unflatten(-1, (self.num_groups, -1)).movedim(0, 1)  # (G, B, H)
            return by_group[index] + shift

    def stacked(
        self,
    ) -> tuple[Int[Tensor, " L"], Float[Tensor, "M D"] | None, Float[Tensor, "L 1 H"]]:
        """The group of each block, weights of all groups on time and context, and the layer's part.

        Where no gradient is wanted and weights stay as they are: made once, by `freeze`.
        """
        index, shift = self.frozen_index, self.frozen_shift
        if index is not None and shift is not None and not torch.is_grad_enabled():
            return index, self.frozen_weight, shift
        index = torch.tensor(self.group_of, device=self.layer_embedding.weight.device)
        groups: list[Any] = list(self.groups)
        used = [
            name
            for name in ("project_time", "project_context")
            if getattr(groups[0], name) is not None
        ]
        weight = None
        if used:
            weight = torch.cat(
                [torch.cat([getattr(g, name).weight for name in used], dim=1) for g in groups]
            )
        shift = torch.stack([group.bias() for group in groups])[index]  # (L, H)
        if groups[0].project_layer is not None:
            layers = torch.stack([group.project_layer.weight for group in groups])  # (G, H, Dl)
            embedded = self.layer_embedding.weight[:, None]
            shift = shift + (embedded @ layers[index].mT)[:, 0]
        return index, weight, shift[:, None]

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype) -> None:
        """Stack the weights for good: those of the groups are not read again without gradients.

        Args:
            dtype: Of the tokens.
        """
        del dtype  # the context is read in float32
        self.frozen_index = None
        self.frozen_index, self.frozen_weight, self.frozen_shift = self.stacked()

    def flops(self, num_tokens: int) -> int:
        """FLOPs that a pruned block pays for its tokens, per sample."""
        flops: int = self.group(0).flops(num_tokens)
        return flops

    def condition_flops(self, batch: int = 1) -> int:
        """FLOPs of `condition`; the layer's part does not grow with the batch."""
        group: ContextModule = self.groups[0]  # type: ignore[assignment]
        total = 0
        for layer in (group.project_time, group.project_context):
            total += 0 if layer is None else batch * self.num_groups * linear_flops(1, layer)
        if group.project_layer is not None:
            total += self.num_blocks * linear_flops(1, group.project_layer)
        return total
