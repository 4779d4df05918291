"""The fast tests at the lowest and at the highest versions that pyproject.toml allows.

`python -m tests.versions FOLDER` is what `make versions` runs: it makes two environments in a
folder, which may be used again, and writes a record into results/. torch is pinned in both.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shiva_dit.provenance import hardware_name, provenance, write_json

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
TOLD = ("diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow")
"""Packages whose versions the record holds."""
EXTRAS = "emoji,data"
TOOLS = (
    "beartype",
    "hypothesis",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "tensorboard",
    "torchsde",
)
FAST = "not slow and not matrix and not bits"


def lowest(project: dict[str, Any]) -> list[str]:
    """A pin for each requirement of the package and its extras, at its lower bound.

    >>> lowest({"dependencies": ["torch>=2.11", "peft>=0.21,<0.22", "b==1.0"]})
    ['peft==0.21', 'b==1.0']
    """
    extras: Iterable[list[str]] = project.get("optional-dependencies", {}).values()
    pins = {}
    for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        found = re.fullmatch(r"([\w.-]+)(?:>=|==)([\w.]+)(?:,.*)?", requirement)
        if found is not None and found[1] not in ("torch", "torchvision"):
            pins[found[1]] = found[2]
    return [f"{name}=={version}" for name, version in pins.items()]


def environment(folder: Path, which: str) -> Path:
    """An environment of the lowest or highest versions; its Python."""
    python = folder / which / "bin" / "python"
    if (folder / f"{which}.made").is_file():
        return python

    def install(*words: str) -> None:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True)

    subprocess.run([sys.executable, "-m", "venv", "--clear", folder / which], check=True)
    install(TORCH)
    if which == "lowest":
        pins = folder / "lowest.txt"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        pins.write_text("\n".join(lowest(project)))
        install("--constraint", str(pins), f"{ROOT}[{EXTRAS}]")
    else:
        install("--upgrade", "--upgrade-strategy", "eager", f"{ROOT}[{EXTRAS}]", TORCH)
    install(*TOOLS)
    (folder / f"{which}.made").touch()
    return python


def tried(python: Path, words: list[str]) -> dict[str, Any]:
    """What an environment holds, and what became of the tests in it."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True
    )
    held = {one["name"].lower(): one["version"] for one in json.loads(listed.stdout)}
    paths = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    run = [python, "-m", "pytest", "-n", "2", "-m", FAST, *(words or ["tests"])]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=paths, cwd=ROOT) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
    counts = {name: int(many) for many, name in re.findall(r"(\d+) (\w+)", lines[-1])}
    return {
        "versions": {name: held[name] for name in TOLD},
        "outcomes": {
            name: counts[name] for name in ("passed", "failed", "error") if name in counts
        },
    }


def main() -> int:
    """Make both environments, run the tests, write the record."""
    folder, words = Path(sys.argv[1]).absolute(), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    found = {which: tried(environment(folder, which), words) for which in ("lowest", "highest")}
    record = {"what": "versions", "tests": words or FAST, **found, "provenance": provenance()}
    stamp = datetime.date.today().isoformat()
    path = ROOT / "results" / f"versions--{hardware_name(record['provenance'])}--{stamp}.json"
    write_json(path, record)
    sys.stdout.write(f"{path}\n")
    return int(any(one["outcomes"].keys() != {"passed"} for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
