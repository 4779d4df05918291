"""Where records of benchmarks lie."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shiva_dit.benchmark.config import BenchmarkConfig
from shiva_dit.benchmark.workloads import workload
from shiva_dit.ownership import check_folder
from shiva_dit.provenance import hardware_name, provenance, write_json


def record_path(record: dict[str, Any], folder: Path) -> Path:
    """Where a record of the benchmark belongs: what, how, on what, when."""
    config = record["config"]
    width, height = config["size"] or workload(config["model"]).size
    size = f"{width}" if width == height else f"{width}x{height}"
    if "sizes" in record:
        sides = [timed["config"]["size"][0] for timed in record["sizes"]]
        size = f"{sides[0]}to{sides[-1]}"
    tokens = [record["what"], size, f"batch{config['batch']}", config["dtype"], config["mode"]]
    if config.get("select_every"):
        tokens.append(f"every{config['select_every']}")
    if torch.device(config["device"]).type == "cpu":
        tokens.append(f"{record['provenance']['threads']}thread")
    stamp = datetime.date.today().isoformat()
    return folder / f"{'-'.join(tokens)}--{hardware_name(record['provenance'])}--{stamp}.json"


def record_what(config: BenchmarkConfig, sides: Sequence[int] = ()) -> str:
    """What a record is of: sizes (`sides`), training steps, pairs, or forwards."""
    if sides:
        return f"scaling-{config.model}"
    if config.train:
        return f"training-{config.model}-{config.train}"
    return f"pair-{config.beside}-{config.model}" if config.beside else f"speed-{config.model}"


def check_record_place(config: BenchmarkConfig, sides: Sequence[int], folder: Path) -> None:
    """Check, before anything is measured, that the record will have a place.

    Raises:
        ValueError: If the folder is none (`check_folder`), or a record of this name is there.
    """
    check_folder(folder)
    planned: dict[str, Any] = {
        "what": record_what(config, sides),
        "config": asdict(config),
        "provenance": provenance(),
    }
    if sides:
        planned["sizes"] = [{"config": {"size": (side, side)}} for side in sides]
    _check_free(record_path(planned, folder))


def _check_free(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} is there already: move it away, or write to another folder.")


def save_record(record: dict[str, Any], folder: Path) -> Path:
    """Write a record into a folder; one of the same name is never overwritten.

    Raises:
        ValueError: If one is there.
    """
    path = record_path(record, folder)
    _check_free(path)
    write_json(path, record)
    return path
