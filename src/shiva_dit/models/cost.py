"""What a forward costs with something attached."""

from __future__ import annotations

from collections.abc import Sequence

from shiva_dit.models.attachment import Attachment
from shiva_dit.models.counted import counted


def pruned_flops(
    attachment: Attachment,
    num_tokens: int,
    text_tokens: int,
    counts: Sequence[int],
    by_frame: bool = False,
) -> int:
    """FLOPs of one forward of one sample, with router, updates and what lies beside layers.

    Args:
        attachment: What is on the model.
        num_tokens: Image tokens N.
        text_tokens: Text tokens T.
        counts: k of every block (a row of `Counts.table`).
        by_frame: Whether the model is told a time for each frame or token (`counted`).
    """
    selector, updates = attachment.selector, attachment.updates
    costs = counted(attachment.model, text_tokens, by_frame)
    update = 0 if updates is None else updates.flops(num_tokens)
    total = costs.flops(num_tokens).pruned(counts, update)
    for beside in () if attachment.backbone is None else attachment.backbone.beside:
        total += beside.flops(costs.linear_rows(beside.path, num_tokens, counts))
    pruned = [block for block, k in enumerate(counts) if k < num_tokens]
    if pruned:
        total += sum(part.condition_flops() for part in attachment.learned)
    leaders = [attachment.counts.leader(block, counts, num_tokens) for block in pruned]
    if selector.weighs is not None:
        total += sum(selector.weight_flops(counts[block]) for block in pruned)
    return total + leaders.count(None) * selector.flops(num_tokens)
