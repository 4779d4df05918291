"""Programs of a run: what the model gives, run where neither it nor this package is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import shiva_dit
from shiva_dit.cli import main
from shiva_dit.export import Programs, export_program, export_run
from shiva_dit.models.attach import attachment_of
from tests import families, tiny
from tests.test_folder import pipeline
from tests.test_generate import adapter as saved_adapter

__all__ = ["pipeline", "saved_adapter"]

COUNTS = [[64, 40, 40, 40], [64, 33, 12, 48], [64, 63, 20, 9]]
SHORT = [[64, 40], [64, 12], [64, 63]]  # of two blocks, which hold every kind of block
TOLERANCE = 1e-5  # asked for; traced programs were equal to the bit, a compiled one was 2.6e-7 off

# A sampling loop over files alone: Euler, guided in halves.
LOOP = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
folder, given, out = map(Path, sys.argv[1:])
sys.path.insert(0, str(folder))
from programs import Programs
run, inputs = Programs(folder), load_file(given)
latents, sigmas = inputs.pop("latents"), inputs.pop("sigmas").tolist()
for call, timestep in enumerate(run.timesteps):
    both = torch.cat([latents] * 2)
    times = torch.full((len(both),), timestep)
    without, with_text = run(hidden_states=both, timestep=times, **inputs).chunk(2)
    latents = latents + (sigmas[call + 1] - sigmas[call]) * (without + 5 * (with_text - without))
for name in ("diffusers", "transformers", "shiva_dit"):
    assert name not in sys.modules, name
save_file({"latents": latents}, out)
"""


def piped(backbone: str = "frozen", rows: int = 3, **options: Any) -> Any:
    """A pipeline whose adapter keeps another row at every third of the time, or fewer rows."""
    model = tiny.sd3(num_layers=2)
    adapter = tiny.adapter(model, tiny.from_counts(SHORT[:rows]), backbone=backbone)
    adapter.backbone_weights = tiny.tuned(backbone, num_layers=2)[0]
    return shiva_dit.apply(tiny.pipeline(model), adapter, **options)


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= TOLERANCE * expected.norm())


class Given:
    """What the calls of a run were given."""

    def __init__(self, model: Any) -> None:
        self.calls: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append({n: v for n, v in kwargs.items() if isinstance(v, Tensor)})


@pytest.mark.parametrize(
    ("backbone", "rows", "calls", "options"),
    # A run's own counts, whose mean is met over its four steps, differ within a third as well.
    [("frozen", 3, [1] * 4, {}), ("full", 1, [4], {}), ("lora", 1, [4], {"merge": False})],
)
def test_a_sampling_by_files_alone_is_the_pipelines(
    backbone: str, rows: int, calls: list[int], options: dict[str, Any], tmp_path: Path
) -> None:
    pipe = piped(backbone, rows, **options)
    expected = tiny.generate(pipe, 5.0)
    folder = tmp_path / "run"
    given = Given(pipe.transformer)
    done = export_run(pipe, lambda: tiny.generate(pipe, 5.0), folder)
    assert [each.calls for each in done] == calls
    assert all(each.off_by <= TOLERANCE for each in done)
    first = given.calls[0]
    latents = first["hidden_states"].chunk(2)[0]
    text = {name: first[name] for name in ("encoder_hidden_states", "pooled_projections")}
    sigmas = pipe.scheduler.sigmas
    save_file({**text, "latents": latents.clone(), "sigmas": sigmas}, tmp_path / "given")
    words = [sys.executable, "-c", LOOP, folder, tmp_path / "given", tmp_path / "out"]
    alone = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(words, check=True, cwd=tmp_path, env=alone)
    assert near(load_file(tmp_path / "out")["latents"], expected)
    # The model is as it was, to the bit.
    assert torch.equal(tiny.generate(pipe, 5.0), expected)
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{place}.pt2" for place in range(len(calls))),
        *("manifest.json", "programs.py", "weights.safetensors"),
    ]


def test_the_manifest_says_which_program_is_for_which_call(tmp_path: Path) -> None:
    model = tiny.sd3(num_layers=2)
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts(SHORT[:2])))
    times = (0.9, 0.8, 0.1)

    def run() -> None:
        for t in times:
            tiny.run(model, tiny.inputs(t=t))

    export_run(model, run, tmp_path)
    about = json.loads((tmp_path / "manifest.json").read_text())
    assert [call["program"] for call in about["calls"]] == [0, 0, 1]
    assert [each["counts"] for each in about["programs"]] == SHORT[1::-1]
    assert {each["pass"] for each in about["programs"]} == {"alone"}
    programs = Programs(tmp_path)
    assert programs.timesteps == pytest.approx([1000 * t for t in times])
    for t in times:  # other values than it was traced with
        case = tiny.inputs(t=t, seed=5)
        assert near(programs(**case), tiny.run(model, case))
    with pytest.raises(ValueError, match=r"no program is for timestep 300"):
        programs(**tiny.inputs(t=0.3))
    with pytest.raises(ValueError, match=r"hidden_states is .*\(1, 7, 24\).*\(2, 7, 24\)"):
        programs(**tiny.inputs(batch=1, t=0.1))
    with pytest.raises(ValueError, match="a call needs a tensor 'timestep'"):
        programs(hidden_states=torch.zeros(1))
    with pytest.raises(ValueError, match="for cpu, and cuda was asked for"):
        Programs(tmp_path, "cuda")
    with pytest.raises(ValueError, match=r"'0\.pt2' already: export into an empty folder"):
        export_run(model, run, tmp_path)
    with pytest.raises(ValueError, match="holds no exported programs"):
        Programs(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["flux-dev"])
def test_a_program_holds_its_weights_and_any_row(name: str) -> None:
    model = families.made(name)
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts(COUNTS)))
    case = families.arguments(name, t=0.5)
    program = export_program(model, case)
    assert near(program.module()(**case), families.run(model, case))
    row = [64, 17, 5, 64]
    attachment = attachment_of(model)
    assert attachment is not None
    other = export_program(model, case, counts=row).module()(**case)
    attachment.counts.use(tiny.from_counts([row]))
    assert near(other, families.run(model, case))
    with pytest.raises(ValueError, match=r"k must lie in \[1, N\] = \[1, 64\], got 65"):
        export_program(model, case, counts=[65, 1, 1, 1])


@pytest.mark.matrix  # a C++ compiler at work for half a minute
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_compiled_ahead_it_gives_the_same(name: str, tmp_path: Path) -> None:
    """By AOTInductor, compiled here and now: SD3 with two blocks, which are of all kinds."""
    model = tiny.sd3(num_layers=2) if name == "sd3" else families.made(name)
    row = [64, 20] if name == "sd3" else [64, 20, 30, 40]
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts([row])))
    case, other = (
        (tiny.inputs(seed=seed) if name == "sd3" else families.arguments(name, t=0.1 * seed))
        for seed in (2, 3)
    )
    (done,) = export_run(model, lambda: families.run(model, case), tmp_path, engine="inductor")
    assert done.off_by <= TOLERANCE
    assert near(Programs(tmp_path)(call=0, **other), families.run(model, other))


def broken(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        pipe = piped()
        change(pipe)
        export_run(pipe, lambda: tiny.generate(pipe, 5.0), folder)

    return attempt


def in_turn(folder: Path) -> None:
    model = families.made("flux")
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts(COUNTS)))
    with shiva_dit.guided(model, "cond"):
        export_run(model, lambda: families.run(model, families.arguments("flux")), folder)


def a_list(folder: Path) -> None:
    model = families.made("z-image")
    shiva_dit.apply(model, tiny.adapter(model, families.schedule(model, COUNTS)))
    export_run(model, lambda: families.run(model, families.arguments("z-image")), folder)


def a_number(folder: Path) -> None:
    model = piped().transformer
    export_run(model, lambda: model(**{**tiny.inputs(), "timestep": 500.0}), folder)


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "without an adapter": (broken(shiva_dit.remove), "no adapter"),
    "whole steps": (broken(shiva_dit.correct), r"shiva_dit\.correct and export don't go together"),
    "compiled": (broken(shiva_dit.compile), "a compiled block and export don't go together"),
    "passes in turn": (in_turn, "guided by two passes in turn"),
    "lists": (a_list, "returns a list of pictures can't be exported"),
    "a number as time": (a_number, "called with a number as timestep"),
    "not called": (lambda f: export_run(piped(), lambda: None, f), "was not called"),
    "an engine": (
        lambda f: export_run(piped(), lambda: None, f, engine="tensorrt"),
        "engine must be one of export, inductor, got 'tensorrt'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_can_not_be_exported_is_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    attempt, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message) as caught:
        attempt(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_writes_programs_of_a_pipelines_run(
    pipeline: Path, saved_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["export", "--pipeline", str(pipeline), "--adapter", str(saved_adapter)]
    words += ["--out", str(out), "--size", "32", "--guidance", "1", "--threads", "1"]
    assert main([*words, "--prompt", "a star", "--steps", "2"]) == 0
    assert "0.pt2: 2 calls" in capsys.readouterr().out
    assert len(Programs(out).timesteps) == 2
    assert main([*words, "--adapter", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
