"""Where records of benchmarks lie."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch

from shiva_dit.benchmark.workloads import workload
from shiva_dit.provenance import hardware_name, write_json


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


def save_record(record: dict[str, Any], folder: Path) -> Path:
    """Write a record into a folder; one of the same name is never overwritten.

    Raises:
        ValueError: If one is there.
    """
    path = record_path(record, folder)
    if path.exists():
        raise ValueError(f"{path} is there already: move it away, or write to another folder.")
    write_json(path, record)
    return path
