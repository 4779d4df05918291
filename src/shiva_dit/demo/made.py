"""The folder of a backbone that is made: its files, written last, and what it goes on from."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from shiva_dit.demo.base import backbone_file, judge_file, record_file
from shiva_dit.demo.judge import Judge
from shiva_dit.demo.task import DemoTask
from shiva_dit.ownership import owned
from shiva_dit.provenance import provenance, read_json, write_atomically, write_json
from shiva_dit.signals import undisturbed
from shiva_dit.training.checkpoint import latest_checkpoint, tidy

CHECKPOINTS, REMOVED = "checkpoints", ".removed-checkpoints"


@dataclass(frozen=True, slots=True)
class Made:
    """A backbone, its judge, and the record of how both were made."""

    record: dict[str, Any]
    backbone: nn.Module
    judge: Judge


def make_base(
    task: DemoTask, out: Path, make: Callable[[Path], Made], *, resume: bool
) -> dict[str, Any]:
    """Make a backbone in a folder of its own: two safetensors files (fp16) and their record.

    Args:
        task: Names the files.
        out: The folder; made if needed.
        make: Makes them, with the folder of the checkpoints, from the latest of which it goes on.
        resume: Go on from the last checkpoint; from the beginning if there is none.

    Returns:
        The record.

    Raises:
        ValueError: If the folder holds a backbone already, or without `resume` checkpoints, or
            another process is at work in it.
    """
    names = (backbone_file(task), judge_file(task), record_file(task))
    checkpoints = out / CHECKPOINTS
    with owned(out):
        tidy(checkpoints)
        if (out / REMOVED).is_dir():  # of a run that was killed when all was written
            shutil.rmtree(out / REMOVED)
        found = latest_checkpoint(checkpoints)
        for name in names if found is None else ():
            if (out / name).exists():
                raise ValueError(
                    f"{out} holds {name} already: train into another folder, or move it away."
                )
        if found is not None and not resume:
            raise ValueError(
                f"{out} holds a run already ({found.name}): go on with it by --resume, or train "
                "into another folder."
            )
        if found is None and resume:
            tqdm.write(f"{out} holds no checkpoint: the run starts.", file=sys.stderr)
        _write(out, names, make(checkpoints))
        checkpoints.rename(out / REMOVED)
        shutil.rmtree(out / REMOVED)
        return read_json(out / names[-1])


def _write(out: Path, names: tuple[str, str, str], made: Made) -> None:
    """Write all files, or none."""
    backbone, judge, record = names
    try:
        for name, module in ((backbone, made.backbone), (judge, made.judge)):
            write_atomically(out / name, partial(save_file, _half(module)))
        write_json(out / record, {**made.record, "provenance": provenance()})
    except BaseException:
        with undisturbed():
            for name in names:
                (out / name).unlink(missing_ok=True)
        raise


def _half(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state in half precision, to save."""
    return {
        key: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for key, value in sorted(module.state_dict().items())
    }
