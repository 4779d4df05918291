"""What is installed here, and what of shiva-dit it is enough for (`shiva-dit doctor`)."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import diffusers
import torch
from packaging.requirements import Requirement

from shiva_dit import __version__
from shiva_dit.api.supported import supported

DISTRIBUTION = "shiva-dit"
EXTRAS = {"train": "training", "demo": "the demo tasks"}
"""Those that are reported, and what they are for."""
UNTRIED = "no test of shiva-dit has run on one"
"""What is to be said of devices that torch knows and nobody had."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A package that shiva-dit asks for."""

    requirement: Requirement
    found: str | None
    """The installed version; None if there is none."""
    extra: str | None = None
    """The extra that asks for it; None for what is always needed."""

    @property
    def is_met(self) -> bool:
        """Whether the installed version is one that is asked for."""
        return self.found is not None and self.requirement.specifier.contains(
            self.found, prereleases=True
        )


def findings() -> list[Finding]:
    """All packages that shiva-dit asks for, those of its extras `EXTRAS` last.

    Raises:
        ValueError: If shiva-dit runs from its sources without being installed.
    """
    try:
        asked = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{DISTRIBUTION} isn't installed here, it runs from its sources: what it needs can't "
            "be looked up. Install it by `pip install .` first."
        ) from error
    found = []
    for extra in (None, *EXTRAS):
        for requirement in map(Requirement, asked):
            marker = requirement.marker
            applies = marker is None if extra is None else _is_for(requirement, extra)
            known = {DISTRIBUTION, *(finding.requirement.name for finding in found)}
            if applies and requirement.name not in known:  # an extra may hold another
                found.append(Finding(requirement, _version(requirement.name), extra))
    return found


def _is_for(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def diagnosis() -> tuple[str, bool]:
    """The report as text, and whether all that is always needed is there."""
    packages = findings()
    lines = [f"{DISTRIBUTION} {__version__}, Python {platform.python_version()}", ""]
    for finding in packages:
        state = "ok" if finding.is_met else f"needs {finding.requirement.specifier}"
        note = "" if finding.extra is None else f" (for {EXTRAS[finding.extra]})"
        version = finding.found or "missing"
        lines.append(f"{finding.requirement.name:14} {version:12} {state}{note}")
    lines += ["", f"devices: {', '.join(_devices())}", ""]
    here = [model for model in supported() if hasattr(diffusers, model.model_class)]
    lines.append(f"models: {', '.join(model.name for model in here)}")
    missing = [model.name for model in supported() if model not in here]
    if missing:
        lines.append(f"not in this diffusers: {', '.join(missing)}")
    wrong = [finding for finding in packages if not finding.is_met]
    if wrong:
        extras = [extra for extra in EXTRAS if extra in {finding.extra for finding in wrong}]
        target = f"{DISTRIBUTION}[{','.join(extras)}]" if extras else DISTRIBUTION
        lines += ["", f'to mend it: pip install --upgrade "{target}"']
    return "\n".join(lines), all(finding.is_met for finding in packages if finding.extra is None)


def _devices() -> list[str]:
    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {memory:.0f} GiB)")
    for index in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        memory = torch.xpu.get_device_properties(index).total_memory / 2**30
        name = torch.xpu.get_device_name(index)
        found.append(f"xpu:{index} ({name}, {memory:.0f} GiB; {UNTRIED})")
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory() / 2**30
        found.append(f"mps ({memory:.0f} GiB; {UNTRIED}; for training it lacks float64)")
    return found
