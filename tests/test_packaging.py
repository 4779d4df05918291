"""An installation without extras serves: with torch, diffusers and what these bring, no more."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import shiva_dit
from tests import serving

DISTRIBUTION = "shiva-dit"
SOURCES = Path(shiva_dit.__file__).parents[1]
SERVE = """
from pathlib import Path
from tests.serving import serve
serve(Path({folder!r}))
"""
IMPORTS = """
import resource, sys
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
import torch
before = cpu()
import shiva_dit
print(cpu() - before, "diffusers" in sys.modules)
"""


def needed(extra: str = "") -> set[str]:
    """Distributions that an installation holds, by the requirements of what is here."""
    found: set[str] = set()
    waiting = [(DISTRIBUTION, extra)]
    while waiting:
        name, wanted = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        found.add(key)
        for asked in map(Requirement, importlib.metadata.requires(name) or []):
            if asked.marker is None or asked.marker.evaluate({"extra": wanted}):
                waiting.append((asked.name, ""))
    return found - {DISTRIBUTION}


def parts_of(name: str) -> Iterator[Path]:
    """What a distribution has put beside the others."""
    distribution = importlib.metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or ()}
    for top in tops - {"..", "__pycache__"}:
        yield Path(str(distribution.locate_file(top)))


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what an installation without extras does."""
    folder = tmp_path_factory.mktemp("site")
    for name in needed():
        for part in parts_of(name):
            if not (folder / part.name).exists():
                (folder / part.name).symlink_to(part)
    return folder


def run(code: str, site: Path) -> str:
    """Output of a process that knows no other packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": f"{SOURCES}:{SOURCES.parent}:{site}", "HOME": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_what_training_needs_is_not_needed_for_serving() -> None:
    extras = {"accelerate", "peft", "transformers", "matplotlib", "scikit-learn"}
    assert not needed() & extras


def test_adapters_serve_where_nothing_but_torch_and_diffusers_is(
    poor: Path, tmp_path: Path
) -> None:
    serving.make(tmp_path)
    said = run(SERVE.format(folder=str(tmp_path)), poor)
    assert said.count("SD3Transformer2DModel: ") == len(serving.METHODS)


def test_a_command_that_needs_an_extra_says_which(poor: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "shiva_dit.cli", "train", "recipes/digits.toml"],
        env={"PYTHONPATH": f"{SOURCES}:{poor}", "HOME": str(poor)},
        cwd=SOURCES.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(
        r"is not installed, and this needs it: pip install 'shiva-dit\[\w+\]'", done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_package_brings_its_types_and_imports_little(poor: Path) -> None:
    assert (SOURCES / "shiva_dit" / "py.typed").is_file()
    seconds, has_diffusers = run(IMPORTS, poor).split()
    assert float(seconds) < 0.2
    assert has_diffusers == "False"
