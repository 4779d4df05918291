"""Adapters whose configs lie about their files: each is refused before the process grows.

Run as `python -m tests.hostile FOLDER`; writes, per case, MiB of growth and the refusal into a JSON
file (`test_adapter.py`).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.provenance import file_digest
from shiva_dit.saved_folder import BACKBONE_FILE, LORA_FILE, WEIGHTS_FILE
from tests import tiny

HUGE = 2**39


def lies(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name of the case: what is changed at the config's top."""

    def sizes(**changes: Any) -> dict[str, Any]:
        return {"config": {**config, **changes}}

    wide = {"full_blocks": [0], "ratios": [[1.0, 0.5, 0.5, 0.5]] * 50_000}
    return {
        **{
            name: sizes(**{name: HUGE})
            for name in ("num_blocks", "num_groups", "width", "hidden", "time_dim", "context_dim")
        },
        "lora_rank": sizes(lora_rank=HUGE),
        "num_bins": sizes(num_bins=10**9),
        "rejected_rank": sizes(rejected_rank=HUGE, rejected="low_rank", width=2**40),
        "all_at_once": sizes(num_blocks=10_000, num_groups=10_000, hidden=HUGE, width=HUGE),
        "blocks_as_in_the_schedule": {
            **sizes(num_blocks=9_600, num_groups=9_600, full_blocks=[0]),
            "schedule": {"full_blocks": [0], "ratios": [[1.0] * 9_600]},
        },
        "digits": sizes(width=10**4000),
        "bool": sizes(width=True),
        "float": sizes(lora_rank=3.0),
        "negative": sizes(num_groups=-(2**62)),
        "full_blocks": sizes(full_blocks=list(range(100_000))),
        "full_blocks_of_the_schedule": {
            "schedule": {"full_blocks": [0] * 200_000, "ratios": [[1.0, 0.5, 0.5, 0.5]]}
        },
        "bins_of_the_schedule": {"schedule": {**wide, "ratios": wide["ratios"] * 10}},
        "ratio": {"schedule": {"full_blocks": [0], "ratios": [[1.0, 10**400, 0.5, 0.5]]}},
        "string": sizes(base_model="x" * 2**22),
        "keys": {"training": {str(i): [] for i in range(400_000)}},
    }


def edited(source: Path, folder: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(source, folder)
    tiny.edit_config(folder, **changes)


def many(path: Path, number: int) -> None:
    """A safetensors file of many tensors; safetensors itself takes seconds to write it."""
    header = {
        f"router.groups.{i}.x": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(number)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * number))


def damaged(source: Path, folder: Path, name: str) -> None:
    """Files that lie, in folders whose digests are right."""
    shutil.copytree(source, folder)
    config = folder / "config.json"
    weights = folder / WEIGHTS_FILE
    if name == "deep":
        config.write_text('{"_class_name": "ShivaAdapter", "x": ' + "[" * 10**5 + "]" * 10**5 + "}")
        return
    if name == "lists":
        config.write_text("[" + "[]," * 10**6 + "[]]")
        return
    if name == "nan":
        config.write_text(config.read_text().replace("0.6", "NaN"))
        return
    if name == "header":
        weights.write_bytes((2**40).to_bytes(8, "little") + b"{")
    elif name == "tensors":
        many(weights, 100_000)
    elif name == "groups":
        many(weights, 15_000)
    elif name == "rank":
        lora = load_file(folder / LORA_FILE)
        with safe_open(folder / LORA_FILE, "pt") as file:
            metadata = file.metadata()
        save_file({k: v[:1] if "lora_A" in k else v for k, v in lora.items()}, folder / LORA_FILE,
                  metadata=metadata)  # fmt: skip
    elif name == "int8":
        lora = load_file(folder / LORA_FILE)
        save_file({k: v.to(torch.int8) for k, v in lora.items()}, folder / LORA_FILE)
    elif name == "empty":
        save_file({}, folder / LORA_FILE)
    files = {n: file_digest(folder / n) for n in (WEIGHTS_FILE, LORA_FILE, BACKBONE_FILE)
             if (folder / n).exists()}  # fmt: skip
    tiny.edit_config(folder, files=files)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


KINDS = ("deep", "lists", "nan", "header", "tensors", "groups", "rank", "int8", "empty")


def prepare(folder: Path) -> None:
    """A good adapter, and the others made of it."""
    source = folder / "good"
    made = tiny.adapter(tiny.sd3(), backbone="lora", lora_rank=tiny.LORA_RANK)
    made.backbone_weights, _ = tiny.tuned("lora")
    made.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())["config"]
    sys.set_int_max_str_digits(0)
    for name, changes in lies(config).items():
        edited(source, folder / name, changes)
    for name in KINDS:
        damaged(source, folder / name, name)


def read(folder: Path) -> None:
    """Read an adapter; write beside it how many MiB that took beyond its files, and the error."""
    ShivaAdapter.from_pretrained(folder.parent / "good")  # libraries, too, are read into memory
    files = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    before, said = peak(), None
    try:
        ShivaAdapter.from_pretrained(folder)
    except ValueError as error:
        said = str(error)
    found = [round(peak() - before - files, 1), said]
    folder.with_suffix(".json").write_text(json.dumps(found))


def in_a_child(work: Callable[[Path], None], folder: Path) -> None:
    """A forked process begins with its parent's memory as its peak."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(folder)
            status = 0
        finally:
            traceback.print_exc() if status else None
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, folder


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    in_a_child(prepare, folder)
    for path in sorted(folder.iterdir()):
        in_a_child(read, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
