"""What router and updates share: the context term (Eq. 8), and weights by groups of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
    """Raise unless so many groups can share L blocks evenly.

    Raises:
        ValueError: Names the numbers of groups that can.
    """
    if not 1 <= num_groups <= num_blocks or num_blocks % num_groups:
        divisors = [g for g in range(1, num_blocks + 1) if num_blocks % g == 0]
        raise ValueError(
            f"num_groups must divide the number of blocks, {num_blocks}: one of {divisors}, "
            f"got {num_groups}."
        )


class DepthGroups(nn.Module):
    """Weights for every block, shared by adjacent ones: block l uses group l // (L / G).

    A layer embedding tells the blocks of one group apart.

    Args:
        make: Makes one group's module.
        num_blocks: L.
        num_groups: G in [1, L], a divisor of L.

    Raises:
        ValueError: If G does not divide L.
    """

    def __init__(self, make: Callable[[], ContextModule], num_blocks: int, num_groups: int) -> None:
        super().__init__()
        check_groups(num_blocks, num_groups)
        self.num_blocks, self.num_groups = num_blocks, num_groups
        self.groups = nn.ModuleList(make() for _ in range(num_groups))
        self.layer_embedding = nn.Embedding(num_blocks, LAYER_DIM)

    def group(self, block: int) -> Any:
        """The group's module that a block uses."""
        return self.groups[block * self.num_groups // self.num_blocks]

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
        groups: list[Any] = list(self.groups)  # all read the same inputs
        size, of_group = groups[0].size, self.num_blocks // self.num_groups
        with without_autocast(time.device):
            h = self.layer_embedding.weight.new_zeros(self.num_groups, len(time), size)
            for value, name in ((time, "project_time"), (context, "project_context")):
                layers = [getattr(group, name) for group in groups]
                if layers[0] is None:
                    continue
                read = groups[0].normalize(value).float()
                weight = torch.cat([layer.weight for layer in layers])  # (G * H, Dt or Dc)
                bias = torch.cat([layer.bias for layer in layers])
                h = h + F.linear(read, weight, bias).unflatten(-1, (-1, size)).movedim(1, 0)
            h = h.repeat_interleave(of_group, dim=0)  # (L, B, H)
            layers = [group.project_layer for group in groups]
            if layers[0] is not None:
                embedded = self.layer_embedding.weight.unflatten(0, (-1, of_group))
                weight = torch.stack([layer.weight for layer in layers])  # (G, H, Dl)
                bias = torch.stack([layer.bias for layer in layers])
                h = h + (embedded @ weight.mT + bias[:, None]).flatten(0, 1)[:, None]
            return h

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
