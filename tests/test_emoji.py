"""The emoji task: pictures from packages, a judge that comes trained, a backbone that learns."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shiva_dit.cli import main
from shiva_dit.config import load_recipe
from shiva_dit.demo import emoji_pictures
from shiva_dit.demo.base import load_backbone, load_judge
from shiva_dit.demo.emoji import EmojiTask, words_of
from shiva_dit.demo.emoji_pictures import DRAWINGS, WORDS, fetch, load, pixels, read
from shiva_dit.demo.tasks import load_task
from shiva_dit.demo.train_base import BaseTraining, train_base
from shiva_dit.experiments.scoring import sample, score
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
NAMED = {
    "1F600": ("grinning face", ["smile"]),
    "0023-FE0F-20E3": ("keycap: #", ["hash"]),
    "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F": ("flag: England", ["GBENG"]),
    "1F44B": ("waving hand", ["hello"]),
    "1F1EB": ("regional indicator F", None),
}
FILES = {
    "1f600": (200, 40, 40),
    "0023-fe0f-20e3": (0, 90, 200),
    "23-20e3": (1, 1, 1),  # the same again
    "1f3f4-e0067_e0062_e0065_e006e_e0067": (220, 220, 230),
    "1f44b": (250, 200, 0),
    "1f44b-1f3fd": (120, 80, 40),  # with a skin tone
    "1f1eb": (9, 9, 9),  # without tags
    "1f47e": (90, 0, 120),  # without a name
    "read-me": (5, 5, 5),
}


def drawing(colour: Sequence[int], side: int = 128) -> bytes:
    """A square of a colour in the middle of nothing."""
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    image.paste((*colour, 255), (side // 4, side // 4, side - side // 4, side - side // 4))
    made = io.BytesIO()
    image.save(made, format="WEBP", lossless=True)
    return made.getvalue()


def tarred(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def packages(folder: Path, monkeypatch: pytest.MonkeyPatch, extra: int = 0) -> Path:
    """Small files of both packages, known by their own digests."""
    names: list[dict[str, Any]] = [
        {"hexcode": code, "label": label, **({"tags": tags} if tags else {})}
        for code, (label, tags) in NAMED.items()
    ]
    files = {f"assets/{name}.webp": drawing(colour) for name, colour in FILES.items()}
    for index in range(extra):
        code = f"{0x1F900 + index:x}"
        names.append({"hexcode": code.upper(), "label": f"thing number {index}", "tags": ["x"]})
        files[f"assets/{code}.webp"] = drawing((index * 5 % 256, index * 11 % 256, 60))
    tarred(folder / DRAWINGS.file, {"package.json": b"{}", **files})
    tarred(folder / WORDS.file, {"en/data.json": json.dumps(names).encode()})
    for name in ("DRAWINGS", "WORDS"):
        package = getattr(emoji_pictures, name)
        digest = hashlib.sha256((folder / package.file).read_bytes()).hexdigest()
        monkeypatch.setattr(emoji_pictures, name, replace(package, sha256=digest))
    return folder


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmojiTask:
    made = packages(tmp_path, monkeypatch, extra=56)
    monkeypatch.setenv("SHIVA_DIT_DATA", str(tmp_path / "data"))
    fetch(emoji_pictures.place(), made)
    found = load_task("emoji")
    assert isinstance(found, EmojiTask)
    return found


def test_pictures_have_names_and_each_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packages(tmp_path, monkeypatch)
    with tarfile.open(folder / DRAWINGS.file) as a, tarfile.open(folder / WORDS.file) as b:
        emoji = read(a, b)
    found = dict(zip(emoji.labels, emoji.images, strict=True))
    assert set(found) == {"grinning face", "keycap: #", "flag: England", "waving hand"}
    assert words_of(emoji.labels[0]) == "keycap #"
    face = found["grinning face"]
    assert face.shape == (3, 64, 64)
    assert face[:, 32, 32].tolist() == [200, 40, 40]
    assert face[:, 2, 2].tolist() == [255, 255, 255]
    assert found["keycap: #"][:, 32, 32].tolist() == [0, 90, 200]


def test_pictures_that_are_not_square_keep_their_shape() -> None:
    image = Image.new("RGBA", (256, 264), (10, 20, 30, 255))
    made = io.BytesIO()
    image.save(made, format="PNG")
    found = pixels(made.getvalue())
    assert found[:, 32, 0].tolist() == [255, 255, 255]
    assert found[:, 32, 1].tolist() == found[:, 0, 32].tolist() == [10, 20, 30]


def test_what_is_fetched_is_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By npm, by package name and version; another file is refused, and nothing is written."""
    there = packages(tmp_path, monkeypatch)
    asked: list[str] = []

    def npm(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[2])
        target = Path(command[command.index("--pack-destination") + 1])
        for package in (DRAWINGS, WORDS):
            (target / package.file).write_bytes((there / package.file).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(emoji_pictures.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(emoji_pictures.subprocess, "run", npm)
    out = tmp_path / "out"
    assert main(["fetch", "emoji", "--out", str(out)]) == 0
    assert "4 pictures are in" in capsys.readouterr().out
    assert asked == ["@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0"]
    assert load(out).codes == ("23-20e3", "1f3f4-e0067-e0062-e0065-e006e-e0067-e007f",
                               "1f44b", "1f600")  # fmt: skip
    (there / WORDS.file).write_bytes(b"other")
    assert main(["fetch", "emoji", "--out", str(tmp_path / "new"), "--packages", str(there)]) == 2
    assert "isn't emojibase-data 17.0.0 as it is known" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (there / WORDS.file).unlink()
    assert main(["fetch", "emoji", "--out", str(out), "--packages", str(there)]) == 2
    assert "get it by `npm pack emojibase-data@17.0.0`" in capsys.readouterr().err
    monkeypatch.setattr(emoji_pictures.shutil, "which", lambda name: None)
    assert main(["fetch", "emoji", "--out", str(out)]) == 2
    assert "npm isn't installed" in capsys.readouterr().err


def test_without_pictures_the_task_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIVA_DIT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="fetch them by `shiva-dit fetch emoji`"):
        load_task("emoji")
    monkeypatch.delenv("SHIVA_DIT_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert emoji_pictures.place() == tmp_path / "cache" / "shiva-dit"


def test_nothing_that_is_held_out_is_trained_on(task: EmojiTask) -> None:
    assert len(task) + len(task.held_out_labels) == 60
    assert not {*task.labels.tolist()} & {*task.held_out_labels.tolist()}
    assert {*task.prompts(0, len(task))[1].tolist()} == {*task.labels.tolist()}
    texts, labels = task.prompts(0, 5)
    assert texts == [words_of(load().labels[label]) for label in labels.tolist()]
    assert task.num_tokens == 256
    ink = task.ink([0]).view(16, 16)
    assert ink[8, 8]
    assert not ink[0, 0]
    with pytest.raises(ValueError, match="prompts"):
        task.prompts(0, 61)


@pytest.mark.slow
def test_the_judge_finds_a_picture_among_all(task: EmojiTask, tmp_path: Path) -> None:
    """It comes trained, is saved with the backbone, and takes an adapter's training along."""
    config = load_recipe(BaseTraining, ROOT / "recipes" / "emoji-base.toml", ["steps=2"])
    record = train_base(task, replace(config, batch_size=2), tmp_path / "base")
    by_chance = 5 / 60
    assert record["judge_accuracy_on_held_out"]["near"] > 2 * by_chance  # squares are all alike
    judge, model = load_judge(task, tmp_path / "base"), load_backbone(task, tmp_path / "base")
    real, labels = task.real(12)
    right = task.right(judge(real), labels)
    assert right == {"all": 1.0, "near": 1.0}
    assert task.right(judge(real), labels.flip(0))["all"] < 0.2
    images, _ = sample(task, model, 4, seed=0, num_steps=2)
    assert images.shape == (4, 3, 64, 64)
    assert score(task, judge, images.repeat(6, 1, 1, 1)).kernel > 0.0
    recipe = load_recipe(TrainConfig, ROOT / "recipes" / "emoji.toml", [f"out={tmp_path / 'run'}"])
    short = replace(recipe, warmup_steps=1, policy_steps=0, joint_steps=1, batch_size=2)
    trainer = Trainer(short, model, task, task.sampler(None))
    trained = trainer.run(show_progress=False)
    trainer.close()
    assert trained.adapter is not None


def test_tasks_differ_by_their_pictures(task: EmojiTask) -> None:
    before = task.identity()
    task.all_images = task.all_images.clone()
    task.all_images[0, 0, 0, 0] -= 1
    assert task.identity() != before
    assert torch.equal(load().images[1:], task.all_images[1:])
