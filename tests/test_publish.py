"""`shiva-dit publish`: what lies in the folder is whole, true, and says nothing of the machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib.image as images
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError

import shiva_dit
from shiva_dit.cli import main
from shiva_dit.config import load_recipe
from shiva_dit.demo.base import load_backbone, shipped_adapter
from shiva_dit.demo.tasks import load_task
from shiva_dit.pictures.publish import publish
from shiva_dit.provenance import read_json, write_json
from shiva_dit.training.log import read_log
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.run import train
from shiva_dit.training.settings import WatchConfig
from tests import tiny
from tests.test_cli import said
from tests.test_training import TinyData, WatchedData, recipe

WATCH = WatchConfig(every=3, held_out=2, times=1, steps=2)


def trained(out: Path, data: TinyData, **changes: Any) -> Path:
    model: Any = tiny.sd3()
    model.register_to_config(_name_or_path=str(out.parent / "secret" / "model"))
    config = recipe(out, backbone="lora", guidance=(1.0, 7.0), **changes)
    train(config, model, data, resume=False)
    return out


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = WatchedData()
    folder = tmp_path_factory.mktemp("somewhere")
    data.name = str(folder / "secret" / "cats")  # type: ignore[attr-defined]
    data.identity = lambda: "d" * 64  # type: ignore[attr-defined]
    return trained(folder / "my-run", data, watch=WATCH)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_run_becomes_a_folder_with_all_that_is_known_of_it(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "fast-cats"
    prompts.write_text('a cat: "one"\na dog\n')
    words = ["publish", str(a_run), "--out", str(out), "--prompts", str(prompts)]
    assert main([*words, "--license", "apache-2.0", "--base-model", "someone/cats"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    front, text = card_of(out)
    assert front == {
        "base_model": "someone/cats",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "tags": ["shiva-dit", "token-pruning", "diffusion", "SD3Transformer2DModel"],
        "widget": [{"text": 'a cat: "one"'}, {"text": "a dog"}],
    }
    adapter = shiva_dit.ShivaAdapter.from_pretrained(out)
    own = shiva_dit.ShivaAdapter.from_pretrained(a_run / "adapter")
    assert adapter.config.base_model == "someone/cats"
    for name, value in {**own.state_dict(), **own.backbone_weights}.items():
        assert torch.equal({**adapter.state_dict(), **adapter.backbone_weights}[name], value)
    model = tiny.sd3()
    shiva_dit.apply(model, adapter)
    found = shiva_dit.summary(model, num_tokens=64, text_tokens=tiny.TEXT_TOKENS)
    look = next(line for line in read_log(a_run / "log.jsonl") if line["step"] == 6)
    for row in (
        f"| tokens kept, mean | {adapter.schedule.mean_keep_ratio:.1%} |",
        f"| FLOPs of a forward saved | {found.flops_saved:.1%} (",
        f"| held-out error | {look['held_out']:.4g} |",
        f"| held-out error, guided | {look['held_out_guided']:.4g} |",
        "| trained for guidance | 1 to 7 |",
        "| steps of training | 6 |",
        ", 1 process (cpu) |",
        f"digest `{'d' * 64}`",
        f"weights' SHA-256 `{own.training_record['backbone']['sha256']}`",
        f"torch {torch.__version__}",
        'DiffusionPipeline.from_pretrained("someone/cats", torch_dtype=torch.bfloat16)',
        'shiva_dit.apply(pipe, "your-name/fast-cats")',
        "pipe('a cat: \"one\"', guidance_scale=4)",
        "![The training.](pictures/curves.png)",
    ):
        assert row in text
    assert "not known" not in text.replace("commit not known", "")
    for name in ("look", "curves"):
        assert images.imread(out / "pictures" / f"{name}.png").std() > 0.05
    config = load_recipe(TrainConfig, out / "recipe.toml")
    assert (config.out, config.watch, config.guidance) == (Path("my-run"), WATCH, (1.0, 7.0))
    assert main([*words, "--license", "mit"]) == 0  # renewed, with another licence
    assert card_of(out)[0]["license"] == "mit"
    capsys.readouterr()
    card = out / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "Mine.\n", encoding="utf-8")
    assert main([*words, "--license", "apache-2.0"]) == 0
    assert f"{card} was changed by hand and stays" in capsys.readouterr().err
    assert card.read_text(encoding="utf-8").endswith("Mine.\n")


def test_nothing_names_a_place_on_this_machine(a_run: Path, tmp_path: Path) -> None:
    out = publish(a_run, tmp_path / "out")
    here = [a_run.parent.name, "secret", str(Path.home()), str(Path.cwd()), str(tmp_path)]
    for path in (path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for place in here:
            assert place.encode() not in content, (path, place)
    front, text = card_of(out)
    assert "base_model" not in front  # a folder's
    assert 'from_pretrained("the/base-model"' in text
    assert "| data | cats, 12 samples, digest" in text
    record = shiva_dit.ShivaAdapter.from_pretrained(out).training_record
    assert record["backbone"]["name"] == "model"


def test_what_there_is_not_is_said(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", TinyData())
    _, text = card_of(publish(run, tmp_path / "without looks"))
    assert "| held-out error | not known |" in text
    assert "No held-out error was measured: the run was not looked at" in text
    assert "FLOPs of a forward saved | not known" not in text
    assert (tmp_path / "without looks" / "pictures" / "curves.png").is_file()
    (run / "result.json").unlink()
    (run / "log.jsonl").unlink()
    _, text = card_of(publish(run, tmp_path / "older"))
    assert "The run's `result.json` is not at hand" in text
    assert "| FLOPs of a forward saved | not known |" in text
    assert "There are none of this training." in text
    assert not (tmp_path / "older" / "pictures").exists()
    assert "digest not known" in text


def test_the_snippet_of_a_demo_task_runs(tmp_path: Path) -> None:
    task = load_task("digits")
    out = tmp_path / "digits"
    publish(shipped_adapter(task), out, repository=str(out))
    _, text = card_of(out)
    code = text.split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {}
    exec(code, made)
    model = load_backbone(task)
    shiva_dit.apply(model, shipped_adapter(task))
    given = {**task.conditioning(["a handwritten two"]), "return_dict": False}
    sample = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"hidden_states": sample, "timestep": torch.tensor([500.0]), **given}
    with torch.no_grad():
        assert torch.equal(made["model"](**call)[0], model(**call)[0])


def test_a_users_pictures_are_no_demo_task(a_run: Path, tmp_path: Path) -> None:
    adapter = shiva_dit.ShivaAdapter.from_pretrained(a_run / "adapter")
    recipe = {**adapter.training_record["recipe"], "task": "/home/me/cats"}
    adapter.training_record = {**adapter.training_record, "recipe": recipe}
    adapter.save_pretrained(tmp_path / "adapter")
    _, text = card_of(publish(tmp_path / "adapter", tmp_path / "out"))
    assert "load_task" not in text
    assert 'from_pretrained("the/base-model"' in text


def test_the_best_of_a_run_that_was_stopped_is_named(a_run: Path, tmp_path: Path) -> None:
    adapter = shiva_dit.ShivaAdapter.from_pretrained(a_run / "adapter")
    early = {"held_out": 0.1, "patience": 2, "steps_run": 1234, "stopped_early": True}
    adapter.training_record |= {"early_stop": early, "steps": 3}
    run = tmp_path / "run"
    shutil.copytree(a_run, run)
    adapter.save_pretrained(run / "adapter")
    out = publish(run, tmp_path / "out")
    assert "| steps of training | 3, the best of 1,234 (stopped early) |" in card_of(out)[1]
    look = next(line for line in read_log(run / "log.jsonl") if line["step"] == 3)
    assert f"| held-out error | {look['held_out']:.4g} |" in card_of(out)[1]
    theirs = (run / "watch" / "step-000003.png").read_bytes()
    assert (out / "pictures" / "look.png").read_bytes() == theirs


# --- the Hub ----------------------------------------------------------------------------------


class Hub:
    """Stands in for `HfApi`."""

    calls: list[tuple[str, Any]]

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", (repo_id, private, exist_ok)))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: str, delete_patterns: list[str]) -> None:
        names = {p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*.*")}
        self.calls.append(("upload", (repo_id, names)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_it_is_uploaded_where_that_is_asked_for_alone(
    a_run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["publish", str(a_run), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert hub.calls == []
    assert "the card names no licence: choose one by --license" in capsys.readouterr().err
    assert main([*words, "--push", "me/cats", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/cats"
    weights = {"diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"}
    pictures = {"pictures/look.png", "pictures/curves.png"}
    texts = {"README.md", "config.json", "recipe.toml"}
    assert hub.calls == [
        ("create", ("me/cats", True, True)),
        ("upload", ("me/cats", weights | pictures | texts)),
    ]
    assert 'shiva_dit.apply(pipe, "me/cats")' in card_of(tmp_path / "out")[1]


def test_a_hub_that_is_not_there_is_one_line(
    a_run: Path,
    tmp_path: Path,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unreachable: Any = HfHubHTTPError.__bases__[0]

    def away(*_: Any, **__: Any) -> None:
        raise unreachable("no route to host")

    monkeypatch.setattr(hub, "create_repo", away)
    words = ["publish", str(a_run), "--out", str(tmp_path / "out"), "--license", "mit"]
    line = said(capsys, [*words, "--push", "me/cats"])
    assert "me/cats can't be uploaded to" in line
    assert "no route to host" in line
    assert (tmp_path / "out" / "README.md").is_file()


def test_what_fails_leaves_nothing_and_what_is_renewed_nothing_old(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, damaged = tmp_path / "out", tmp_path / "damaged"
    shutil.copytree(a_run, damaged)
    write_json(damaged / "result.json", {"seconds": 1.0})
    assert main(["publish", str(damaged), "--out", str(out)]) == 2
    assert not out.exists()
    publish(a_run, out)  # the same folder, when it is mended
    assert (out / "pictures" / "look.png").is_file()
    (out / "pictures" / "examples.png").write_bytes(b"of an earlier time")
    publish(a_run / "adapter", out)
    left = {path.name for path in out.rglob("*")} - {"README.md", "config.json"}
    assert {name for name in left if not name.endswith(".safetensors")} == set()


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "there is no folder .*gone: name a run's, or an adapter's"),
        (["empty"], "empty holds no adapter: if its training isn't done"),
        (["run", "--push", "cats"], "--push must be a Hub id like user/name, got 'cats'"),
        (["run", "--base-model", "/x/y"], "--base-model must be a Hub id like user/name"),
        (["run", "--pipeline", "x"], "--pipeline makes pictures of prompts: name a file by --prom"),
        (["run", "--steps", "8"], "--steps is for pictures: name what makes them by --pipeline"),
        (["run", "--guidance", "2"], "--guidance is for pictures: name what makes them by"),
        (["run", "--private"], "--private is for a repository of the Hub: name it by --push"),
        (
            ["run", "--license", "MIT licence"],
            "'MIT licence' is no licence's name on the Hub: take",
        ),
        (["run", "--license", "mit/x"], "'mit/x' is no licence's name on the Hub: take"),
        (["run", "--prompts", "gone.txt"], "there is no file gone.txt of prompts"),
        (["run", "--out", "{full}"], "full holds something else already: take an empty folder"),
        (["run", "--out", "{run}"], "is the run itself: take another folder"),
        (["run", "--out", "{other}"], "other.adapter is the adapter of another run: take another"),
        (["damaged"], r"result.json.*no end of a run, or another version's"),
    ],
)
def test_bad_input_is_one_line(
    a_run: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    shutil.copytree(a_run, tmp_path / "damaged")
    write_json(tmp_path / "damaged" / "result.json", {"seconds": 1.0})
    shutil.copytree(a_run, tmp_path / "other")
    run = a_run if words[0] == "run" else tmp_path / words[0]
    places = {"full": tmp_path / "full", "run": a_run, "other": tmp_path / "other" / "adapter"}
    rest = [w.format(**places) for w in words[1:]]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    line = said(capsys, ["publish", str(run), *rest, *out])
    assert re.search(message, line), line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert read_json(a_run / "result.json")["steps"] == 6
