"""What the doctor says of this environment, of a poorer one, and of none."""

import importlib.metadata
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import shiva_dit
from shiva_dit import doctor
from shiva_dit.cli import main
from shiva_dit.core.soft_rank import soft_rank
from tests import tiny


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


def test_apples_and_intels_devices_are_told_and_that_nobody_tried_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if torch had found them; what it says of them can't be seen here."""
    assert main(["doctor"]) == 0
    assert not re.search("mps|xpu", capsys.readouterr().out)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 48 * 2**30)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda index: f"Arc B{580 + index}")
    properties = SimpleNamespace(total_memory=12 * 2**30)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: properties)
    assert main(["doctor"]) == 0
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "devices" in line)
    untried = "no test of shiva-dit has run on one"
    assert said.endswith(
        f"threads), xpu:0 (Arc B580, 12 GiB; {untried}), xpu:1 (Arc B581, 12 GiB; {untried}), "
        f"mps (48 GiB; {untried}; for training it lacks float64)"
    )


class NoDouble(TorchDispatchMode):
    """Within: a result in float64 is an error, as on Apple's GPUs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                raise TypeError(f"{func} gives float64")
        return found


def test_what_is_said_of_float64_is_so() -> None:
    """Serving needs none, training does."""
    model = tiny.sd3()
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts([[64, 5, 30, 17]])))
    with NoDouble():
        tiny.run(model, tiny.inputs())
    scores = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0))
    with NoDouble(), pytest.raises(TypeError, match="float64"):
        soft_rank(scores, tau=0.1)


def test_sources_that_are_not_installed_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "shiva-dit-nowhere")
    assert main(["doctor"]) == 2
    assert "isn't installed here" in capsys.readouterr().err
