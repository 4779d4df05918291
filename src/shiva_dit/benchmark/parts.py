"""What the parts of a selection take, each timed by itself on a block's real tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shiva_dit.benchmark.timing import interleaved
from shiva_dit.core.selection import gather_tokens, scatter_tokens, select_top_k
from shiva_dit.models.attachment import Attachment

PARTS = ("router", "selection", "gather", "scatter")


def time_parts(
    attachment: Attachment,
    forward: Callable[[], object],
    *,
    k: int,
    repeats: int,
    compiled: bool,
) -> dict[str, float]:
    """Milliseconds that a pruned block spends on each of `PARTS`, medians.

    Each is timed alone, compiled alone where the blocks are: fused into a block they may take less.

    Args:
        attachment: Runs pruned.
        forward: One forward of its model, from which the tokens are taken.
        k: Tokens kept.
        repeats: Times taken of each.
        compiled: Whether the parts are compiled.
    """
    scoring = attachment.schedule.prunable_blocks[:: attachment.counts.select_every]
    block = scoring[len(scoring) // 2]
    hook = attachment.hooks[block]
    x, terms = _seen_by(attachment, block, forward)
    scores = hook.scores(x, terms)
    chosen = select_top_k(scores, k)
    rows = gather_tokens(x, chosen)
    made: dict[str, Callable[..., Any]] = {
        "router": hook.scores,
        "selection": select_top_k,
        "gather": gather_tokens,
        "scatter": scatter_tokens,
    }
    arguments = {
        "router": (x, terms),
        "selection": (scores, k),
        "gather": (x, chosen),
        "scatter": (x, chosen, rows),
    }
    if compiled:
        made = {part: torch.compile(call, fullgraph=True) for part, call in made.items()}
    calls = {part: (lambda part=part: made[part](*arguments[part])) for part in PARTS}
    for _ in range(3):
        for call in calls.values():
            call()
    # Alone they are short: enough of them in a row that the clock's own time does not matter.
    samples = interleaved(calls, repeats=repeats, device=x.device, calls=20)
    return {part: samples[part].median_ms for part in PARTS}


def _seen_by(
    attachment: Attachment, block: int, forward: Callable[[], object]
) -> tuple[Tensor, Any]:
    """Tokens and context term that a block's router reads in a forward."""
    hook = attachment.hooks[block]
    seen: list[tuple[Tensor, Any]] = []
    before = hook.scores

    def watch(x: Tensor, terms: Any) -> Tensor:
        seen.append((x, terms))
        return before(x, terms)

    hook.scores = watch
    attachment.forwards.observer = lambda block, chosen: None  # who is watched isn't replayed
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        hook.scores, attachment.forwards.observer = before, None
    return seen[0]
