"""Which tokens a selector keeps, recorded while the stock pipeline samples."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from shiva_dit.demo.task import DemoTask
from shiva_dit.experiments.held_out import masks, recorded
from shiva_dit.experiments.scoring import NUM_STEPS, Sampler, sample
from shiva_dit.models.attachment import Attachment


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
