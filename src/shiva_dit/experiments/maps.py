"""Which tokens a selector keeps, recorded while the stock pipeline samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shiva_dit.demo.task import DemoTask
from shiva_dit.experiments.contestants import SHOWN
from shiva_dit.experiments.held_out import masks, recorded
from shiva_dit.experiments.scoring import NUM_STEPS, Sampler, sample
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.families import model_spec


def kept_maps(
    task: DemoTask,
    attachment: Attachment,
    count: int,
    *,
    seed: int,
    num_steps: int = NUM_STEPS,
    sampler: Sampler = "euler",
    guidance: float = 1.0,
) -> Bool[Tensor, "L T B N"]:
    """Kept tokens per block, sampler step (noisiest first), image and token.

    Args:
        task: Gives the prompts.
        attachment: What is attached to the backbone.
        count: Images of the first prompts, as `sample` makes them.
        seed: Of the initial noise.
        num_steps: Sampler steps.
        sampler: How they are made.
        guidance: Guidance scale; both halves of a batch keep the same tokens.
    """
    with recorded(attachment) as chosen:
        sample(
            task,
            attachment.model,
            count,
            seed=seed,
            num_steps=num_steps,
            sampler=sampler,
            guidance=guidance,
        )
    kept = torch.ones(len(attachment.blocks), num_steps, count, task.num_tokens, dtype=torch.bool)
    step, seen = 0, set()
    for (block, _), mask in zip(chosen, masks(chosen, task.num_tokens), strict=True):
        if block in seen:  # the first block comes again: the next step
            step, seen = step + 1, set()
        seen.add(block)
        kept[block, step] = mask[:count]
    return kept


class KeptShares:
    """How often each token of the first pictures was kept, over blocks, steps and halves.

    Args:
        count: Pictures of a call.
    """

    def __init__(self, count: int) -> None:
        self._count, self._passes = count, 0
        self._kept: Float[Tensor, "B N"] | None = None
        self.num_tokens = 0

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A model's hook: how many tokens its forward has."""
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.num_tokens = model_spec(module).tokens(module, latents)

    def add(self, block: int, chosen: Int[Tensor, "R k"]) -> None:
        """An attachment's observer; halves stand one after the other."""
        del block
        halves = chosen.unflatten(0, (-1, self._count))[:, :SHOWN].cpu()  # (halves, B, k)
        if self._kept is None:
            self._kept = torch.zeros(halves.shape[1], self.num_tokens)
        for half in halves:
            self._kept.scatter_add_(1, half, torch.ones(half.shape))
        self._passes += len(halves)

    @property
    def shares(self) -> Float[Tensor, "B N"] | None:
        """In [0, 1]; None where nothing was chosen."""
        return None if self._kept is None else self._kept / self._passes


@contextmanager
def kept_shares(model: nn.Module, count: int) -> Iterator[KeptShares]:
    """Within: a model's forwards, each of so many pictures, are watched."""
    found = KeptShares(count)
    attachment = attachment_of(model)
    handle = model.register_forward_pre_hook(found.look, with_kwargs=True)
    if attachment is not None:
        attachment.forwards.observer = found.add
    try:
        yield found
    finally:
        handle.remove()
        if attachment is not None:
            attachment.forwards.observer = None
