"""A whole training run: own its folder, resume or start, train, save the adapter."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from shiva_dit.config import to_dict
from shiva_dit.models import base_dtype
from shiva_dit.ownership import owned
from shiva_dit.provenance import provenance, read_json, write_json
from shiva_dit.saved_folder import check_place, weights_files
from shiva_dit.training import eight_bit
from shiva_dit.training.checkpoint import latest_checkpoint, tidy
from shiva_dit.training.data import TrainingData
from shiva_dit.training.log import LOG_FILE
from shiva_dit.training.looks import trackers
from shiva_dit.training.origin import check_recipe
from shiva_dit.training.processes import ALONE, Processes
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.recipe_file import write_recipe
from shiva_dit.training.result import finish
from shiva_dit.training.trainer import CHECKPOINTS, Trainer

RUN_FILE = "run.json"
"""What a run began with: its recipe, backbone and data."""


def train(
    config: TrainConfig,
    model: nn.Module,
    data: TrainingData,
    *,
    resume: bool,
    scheduler: Any = None,
    processes: Processes = ALONE,
    device: torch.device | None = None,
) -> Path:
    """Train by a recipe and write the adapter into `config.out`/adapter.

    The folder belongs to this process until the end, or to the first of several, whose folder all
    must see. A run that was killed before its first
    checkpoint starts again by itself, with or without `resume`.

    Args:
        config: The recipe; its method must be "shiva" (controls have no adapter to save).
        model: The backbone, on its device.
        data: Training samples.
        resume: Go on from the last checkpoint in `config.out`; from the beginning if there is none.
        scheduler: That of the model's pipeline, or how that takes its steps (`Sampler`): the mean
            keep ratio is over these (over evenly spread ones without it). Needed where it is a
            diffusion schedule (PixArt, DiT).
        processes: Those that train together (`training.processes.joined`).
        device: Where the model is trained; where it is by default.

    Returns:
        The adapter's folder, for `shiva_dit.apply`. The model is as it came then; after an error it
        stays sharded where it was (`shard`), and has to be loaded anew.

    Raises:
        ValueError: If another process trains into the folder, or it holds another run, or a damaged
            adapter; if a diffusion model comes without its scheduler; if a library that the recipe
            needs isn't installed.
        TrainingInterrupted: After Ctrl-C or SIGTERM, when all was saved.
    """
    check_possible(config)
    folder = config.out / "adapter"

    def prepared() -> bool:
        stack.enter_context(owned(config.out))
        tidy(config.out / CHECKPOINTS)
        goes_on = _goes_on(config, folder, resume)
        # Better now than after the training: what an earlier end of it has left may be damaged.
        remedy = f"Move {folder} away and go on by --resume: it is written anew."
        check_place(folder, weights_files(config.backbone), remedy)
        return goes_on

    with ExitStack() as stack:
        goes_on = processes.from_first(prepared)
        trainer = Trainer(config, model, data, scheduler, processes, device)

        def begun() -> None:
            trainer.checkpoints.mkdir(exist_ok=True)  # tells a begun run from what is left of one
            about = {"recipe": to_dict(trainer.config), **trainer.origin}
            write_json(config.out / RUN_FILE, {**about, "provenance": provenance()})

        try:
            if goes_on:
                trainer.resume()
            else:
                processes.from_first(begun)
            processes.from_first(lambda: write_recipe(trainer.config, config.out))
            trained = trainer.run()
            processes.from_first(lambda: finish(trainer, trained, folder))
        finally:
            trainer.close()
        trainer.student.unshard()  # after a failure of one, the others wouldn't join in
    return folder


def check_possible(config: TrainConfig) -> None:
    """Raise unless a recipe gives an adapter, and the libraries that it needs are there.

    Raises:
        ValueError: Says what is wrong, and what to do.
    """
    if config.method != "shiva":
        raise ValueError(
            f"method {config.method!r} is a control and gives no adapter; "
            "`shiva-dit quickstart --all-controls` trains and judges the controls."
        )
    trackers.check_installed(config.watch)
    base_dtype.check_library(config.base_dtype)
    if config.optimizer.eight_bit:
        eight_bit.check_library()


def _goes_on(config: TrainConfig, adapter: Path, resume: bool) -> bool:
    """Whether a run goes on from a checkpoint, or starts.

    Raises:
        ValueError: If it may do neither.
    """
    out = config.out
    found = latest_checkpoint(out / CHECKPOINTS)
    if found is None and adapter.exists() and resume:
        raise ValueError(
            f"{out} holds an adapter, but no checkpoint to go on from: train into another folder "
            "(out=...)."
        )
    for path in (found, adapter):
        if path is not None and path.exists() and not resume:
            raise ValueError(
                f"{out} holds a run already ({path.name}): go on with it by --resume, "
                "or train into another folder with out=..."
            )
    if found is not None:
        return True
    begun = (out / RUN_FILE).is_file() and (resume or (out / CHECKPOINTS).is_dir())
    if begun:
        _check_beginning(config, out / RUN_FILE)
        say = "a run without a checkpoint: it starts again"
    elif (out / LOG_FILE).exists() and not resume:
        raise ValueError(
            f"{out} holds a run already ({LOG_FILE}), whose checkpoints are gone: start it again "
            "by --resume, or train into another folder with out=..."
        )
    else:
        say = "no checkpoint to resume from: the run starts"
    if resume or begun:
        tqdm.write(f"{out} holds {say} from the beginning.", file=sys.stderr)
    return False


def _check_beginning(config: TrainConfig, path: Path) -> None:
    begun = read_json(path)
    if not isinstance(begun, dict) or not isinstance(begun.get("recipe"), dict):
        raise ValueError(f"{path} is not the beginning of a run: remove it to start one here.")
    check_recipe(config, begun["recipe"], path)
