"""The plugin of vLLM-Omni, against its interface (`tests/omni.py`)."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tomllib
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shiva_dit
from shiva_dit.engines import vllm_omni
from tests import load, omni

HERE = "0.42.1"


def test_the_plugin_is_an_entry_point_and_imports_nothing_heavy() -> None:
    groups = tomllib.loads((load.RESULTS.parent / "pyproject.toml").read_text())["project"]
    group = "vllm_omni.general_plugins"
    plugin = EntryPoint("shiva_dit", groups["entry-points"][group]["shiva_dit"], group)
    assert plugin.load() is vllm_omni.register
    code = (
        "import sys, shiva_dit.engines.vllm_omni; "
        "sys.exit(bool({'torch', 'diffusers', 'vllm_omni', 'vllm'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("engine", "diffusers", "said"),
    [
        ("0.30.0", HERE, None),
        ("0.30.2.dev3", HERE, None),
        ("0.28.0", HERE, r"vLLM-Omni <0.31,>=0.30 is served, and 0.28.0 is installed"),
        ("0.32.0", HERE, r"vLLM-Omni <0.31,>=0.30 is served, and 0.32.0 is installed"),
        ("0.30.0", "0.40.0", r"diffusers <0.43,>=0.42.1 is needed, and 0.40.0 is installed"),
        ("0.30.0", "0.43.0", r"diffusers <0.43,>=0.42.1 is needed, and 0.43.0 is installed"),
    ],
)
def test_another_version_is_one_line_and_nothing_is_offered(
    engine: str,
    diffusers: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    versions = {"vllm-omni": engine, "diffusers": diffusers}
    monkeypatch.setattr(vllm_omni, "version", versions.__getitem__)
    with omni.engine(omni.Wrapper) as registered, caplog.at_level(logging.WARNING, "shiva_dit"):
        vllm_omni.register()
        vllm_omni.register()  # every process may call it again
    name = "ShivaDiffusersPipeline"
    if said is None:
        assert registered == {name: ("shiva_dit.engines.vllm_omni", name)}
        assert caplog.messages == []
    else:
        assert registered == {}
        assert said in caplog.messages[0]
        assert caplog.messages[0].startswith("shiva_dit: nothing is attached: ")
        assert "\n" not in caplog.messages[0]


def test_the_engines_pictures_are_the_pipelines(tmp_path: Path) -> None:
    config, pipe, adapter = omni.saved(tmp_path)
    given = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    given["max_sequence_length"] = load.TEXT_TOKENS

    def request() -> Any:
        seeded = torch.Generator().manual_seed(1)
        return types.SimpleNamespace(prompt="a fox", generator=seeded, **given)

    dense = pipe(**vars(request())).images
    with omni.engine(omni.Wrapper):
        served = vllm_omni.ShivaDiffusersPipeline(od_config=config)
        served.load_weights(iter(()))
        picture = served.forward(request()).output
    shiva_dit.apply(pipe, adapter, keep_ratio=0.5)
    assert np.array_equal(picture, pipe(**vars(request())).images)
    assert not np.array_equal(picture, dense)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (None, 'must hold "shiva_dit", such as {"shiva_dit": {"adapter": "FOLDER"}}; got None'),
        ({"shiva_dit": "folder"}, 'must hold "shiva_dit"'),
        ({"shiva_dit": {"keep_ratio": 0.5}}, 'must hold "shiva_dit"'),
        ({"shiva_dit": {"adapter": "a", "ratio": 1, "target": 2}}, "apply has no ratio, target; "),
    ],
)
def test_what_cant_be_applied_is_said_before_anything_is_loaded(arguments: Any, said: str) -> None:
    with omni.engine(omni.Wrapper), pytest.raises(ValueError, match=re.escape(said)):
        vllm_omni.ShivaDiffusersPipeline(od_config=omni.Config("/nowhere", arguments))


def test_no_other_name_is_made() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = vllm_omni.Pipeline
