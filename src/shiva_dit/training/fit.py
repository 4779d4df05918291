"""A start by least squares for the rejected tokens' updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiva_dit.core.budget import stratified
from shiva_dit.models.features import record_blocks
from shiva_dit.training.data import Feed, TrainingData
from shiva_dit.training.experts import WHOLE, TimeShare
from shiva_dit.training.student import Student

NUM_BATCHES = 16


@torch.no_grad()
def fit_updates(student: Student, data: TrainingData, share: TimeShare = WHOLE) -> None:
    """Fit every group's update to what its blocks do to all tokens of the unpruned model.

    Sixteen micro-batches on the model's own path, at times spread over the share, or at a
    sampler's few steps; sums alone are kept, in float64. The training's own randomness is left
    alone.
    """
    updates = student.updates
    if updates is None:
        return
    config = student.config
    size = config.batch_size // config.micro_batches
    generator = torch.Generator().manual_seed(config.seed)
    indices = Feed(data, config.seed)
    schedule = student.adapter.schedule
    blocks = schedule.prunable_blocks
    sums: dict[Any, tuple[Tensor, Tensor]] = {}
    for _ in range(NUM_BATCHES):
        batch = data.batch(indices.take(size), generator).to(student.device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(student.device)
        t = share.of_law(schedule.law, stratified(size, generator)).to(student.device)
        num_tokens = student.spec.tokens(student.model, batch.latents) + batch.num_references
        noisy = student.path.noisy(batch.latents, noise, t)
        with (
            student.as_teacher(),
            student.autocast(),
            record_blocks(
                student.teacher, inputs=blocks, outputs=blocks, num_tokens=num_tokens
            ) as features,
        ):
            student.teacher(**student.calls.plain(noisy, t, batch))
        for block in blocks:
            group = updates.group(block)
            rows = group.design(features.inputs[block]).double()
            changes = features.update(block).flatten(0, 1).double()
            new = rows.T @ rows, rows.T @ changes
            old = sums.get(group)
            sums[group] = new if old is None else (old[0] + new[0], old[1] + new[1])
    for group, (gram, cross) in sums.items():
        group.fit(gram, cross)
