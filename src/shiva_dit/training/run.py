"""A whole training run: resume or start, train, save the adapter."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from shiva_dit.training.checkpoint import latest_checkpoint
from shiva_dit.training.data import TrainingData
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import Trainer


def train(config: TrainConfig, model: nn.Module, data: TrainingData, *, resume: bool) -> Path:
    """Train by a recipe and write the adapter into `config.out`/adapter.

    Args:
        config: The recipe; its method must be "shiva" (controls have no adapter to save).
        model: The backbone, on its device.
        data: Training samples.
        resume: Go on from the last checkpoint in `config.out`, if there is one.

    Returns:
        The adapter's folder, for `shiva_dit.apply`.

    Raises:
        ValueError: If the folder holds another run and `resume` is false.
    """
    if config.method != "shiva":
        raise ValueError(
            f"method {config.method!r} is a control and gives no adapter; "
            "`shiva-dit quickstart --all-controls` trains and judges the controls."
        )
    found = latest_checkpoint(config.out / "checkpoints")
    if found is not None and not resume:
        raise ValueError(
            f"{config.out} holds a run already (last checkpoint {found.name}): go on with it by "
            "--resume, or train into another folder with out=..."
        )
    trainer = Trainer(config, model, data)
    try:
        if resume:
            trainer.resume()
        trained = trainer.run()
        trainer.save()
    finally:
        trainer.close()
    assert trained.adapter is not None
    folder = config.out / "adapter"
    trained.adapter.save_pretrained(folder)
    return folder
