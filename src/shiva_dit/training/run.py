"""A whole training run: resume or start, train, save the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from shiva_dit.training.checkpoint import latest_checkpoint
from shiva_dit.training.data import TrainingData
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import LOG_FILE, Trainer


def train(
    config: TrainConfig,
    model: nn.Module,
    data: TrainingData,
    *,
    resume: bool,
    scheduler: Any = None,
) -> Path:
    """Train by a recipe and write the adapter into `config.out`/adapter.

    Args:
        config: The recipe; its method must be "shiva" (controls have no adapter to save).
        model: The backbone, on its device.
        data: Training samples.
        resume: Go on from the last checkpoint in `config.out`.
        scheduler: That of the model's pipeline: the mean keep ratio is over its steps (over evenly
            spread ones without it). Needed where it is a diffusion schedule (PixArt, DiT).

    Returns:
        The adapter's folder, for `shiva_dit.apply`.

    Raises:
        ValueError: If the folder holds another run and `resume` is false, or no checkpoint and
            `resume` is true; if a diffusion model comes without its scheduler.
    """
    if config.method != "shiva":
        raise ValueError(
            f"method {config.method!r} is a control and gives no adapter; "
            "`shiva-dit quickstart --all-controls` trains and judges the controls."
        )
    folder = config.out / "adapter"
    found = latest_checkpoint(config.out / "checkpoints")
    if not resume:
        for path in (found, folder, config.out / LOG_FILE):
            if path is not None and path.exists():
                raise ValueError(
                    f"{config.out} holds a run already ({path.name}): go on with it by --resume, "
                    "or train into another folder with out=..."
                )
    trainer = Trainer(config, model, data, scheduler)
    try:
        if resume:
            trainer.resume()
        trained = trainer.run()
    finally:
        trainer.close()
    assert trained.adapter is not None
    trained.adapter.save_pretrained(folder)
    return folder
