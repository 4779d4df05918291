"""A run's whole recipe as a file that `shiva-dit train` takes again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiva_dit.config import NONE, to_dict
from shiva_dit.provenance import write_atomically
from shiva_dit.training.recipe import TrainConfig

RECIPE_FILE = "recipe.toml"
HEAD = "# All settings of this run, defaults included: shiva-dit train recipe.toml out=...\n"


def write_recipe(config: TrainConfig, folder: Path) -> None:
    """Write a recipe into a run's folder, over an earlier one.

    Args:
        config: The recipe.
        folder: The run's.
    """
    text = (HEAD + to_toml(to_dict(config))).encode("utf-8", "surrogateescape")
    write_atomically(folder / RECIPE_FILE, lambda path: path.write_bytes(text))


def to_toml(data: Mapping[str, Any], table: str = "") -> str:
    """Nested plain data as TOML; None, which that hasn't, as "none".

    >>> print(to_toml({"out": "runs/a", "guidance": [1.0, 7.0], "task": None, "loss": {"x": 1e-5}}))
    out = "runs/a"
    guidance = [1.0, 7.0]
    task = "none"
    <BLANKLINE>
    [loss]
    x = 1e-05
    <BLANKLINE>
    """
    plain = [f"{key} = {_value(v)}\n" for key, v in data.items() if not isinstance(v, Mapping)]
    head = f"\n[{table}]\n" if table and plain else ""
    below = [
        to_toml(value, f"{table}.{key}" if table else key)
        for key, value in data.items()
        if isinstance(value, Mapping)
    ]
    return head + "".join(plain) + "".join(below)


def _value(value: Any) -> str:
    if value is None:
        return json.dumps(NONE)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # TOML's escapes are JSON's, and it wants one more
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
