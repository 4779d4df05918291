"""What the doctor says of this environment, of a poorer one, and of none."""

import importlib.metadata
import re

import pytest

import shiva_dit
from shiva_dit import doctor
from shiva_dit.cli import main


def test_this_environment_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "needs" not in said
    assert "to mend it" not in said
    assert f"torch          {importlib.metadata.version('torch'):12} ok" in said
    assert "devices: cpu (" in said
    assert all(model.name in said for model in shiva_dit.supported())
    extras = {finding.requirement.name: finding.extra for finding in doctor.findings()}
    assert extras["diffusers"] is None
    assert extras["matplotlib"] == "train"
    assert extras["scikit-learn"] == "demo"
    assert len(extras) == len(doctor.findings())
    assert "ruff" not in extras


@pytest.mark.parametrize(
    ("package", "version", "status", "target"),
    [
        ("diffusers", "0.30.0", 1, "shiva-dit"),
        ("safetensors", None, 1, "shiva-dit"),
        ("peft", None, 0, "shiva-dit[train]"),
        ("scikit-learn", None, 0, "shiva-dit[demo]"),
    ],
)
def test_what_is_missing_or_old_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    version: str | None,
    status: int,
    target: str,
) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version if n == package else real(n))
    assert main(["doctor"]) == status
    said = capsys.readouterr().out
    assert re.search(f"{package:14} {version or 'missing':12} needs .*>=", said)
    assert said.count("needs") == 1
    assert said.endswith(f'to mend it: pip install --upgrade "{target}"\n')


def test_a_model_that_this_diffusers_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Older:
        SD3Transformer2DModel = None

    monkeypatch.setattr(doctor, "diffusers", Older)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "models: Stable Diffusion 3 and 3.5\n" in said
    assert "not in this diffusers: AuraFlow, CogView4," in said


def test_sources_that_are_not_installed_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "shiva-dit-nowhere")
    assert main(["doctor"]) == 2
    assert "isn't installed here" in capsys.readouterr().err
