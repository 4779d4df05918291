"""Which tokens a selector keeps, recorded while the stock pipeline samples."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from shiva_dit.demo.digits import DigitsTask
from shiva_dit.demo.scoring import sample
from shiva_dit.models.attach import Attachment


def kept_maps(
    task: DigitsTask, attachment: Attachment, count: int, *, seed: int
) -> Bool[Tensor, "L T B N"]:
    """Kept tokens per block, sampler step (noisiest first), image and token.

    Args:
        task: The digits.
        attachment: What is attached to the backbone.
        count: Images, by digit as `sample` makes them.
        seed: Of the initial noise.
    """
    num_blocks = len(attachment.blocks)
    num_tokens = (task.image_size // 2) ** 2
    steps: list[dict[int, Tensor]] = []

    def observe(block: int, chosen: Tensor) -> None:
        if not steps or block in steps[-1]:
            steps.append({})
        steps[-1][block] = chosen

    attachment.observer = observe
    try:
        sample(task, attachment.model, count, seed=seed)
    finally:
        attachment.observer = None
    kept = torch.ones(num_blocks, len(steps), count, num_tokens, dtype=torch.bool)
    for step, chosen_by_block in enumerate(steps):
        for block, chosen in chosen_by_block.items():
            row = torch.zeros(count, num_tokens, dtype=torch.bool)
            kept[block, step] = row.scatter(1, chosen, True)
    return kept
