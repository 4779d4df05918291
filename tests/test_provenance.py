"""Where numbers came from, and files that are written atomically and reproducibly."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiva_dit import provenance as module
from shiva_dit.provenance import PACKAGES, provenance, write_atomically, write_json


@dataclasses.dataclass(frozen=True)
class Record:
    b: int
    a: tuple[float, ...]
    path: Path


# --- JSON -------------------------------------------------------------------------------------


def test_json_has_sorted_keys_and_knows_dataclasses_and_paths(tmp_path: Path):
    path = tmp_path / "deep" / "er" / "record.json"
    write_json(path, {"z": Record(1, (0.5, 1.0), Path("x/y")), "a": Path("b")})
    assert path.read_bytes() == (
        b'{\n  "a": "b",\n  "z": {\n    "a": [0.5, 1.0],\n    "b": 1,\n    "path": "x/y"\n  }\n}\n'
    )


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["[ 1, 2 ]", "[\n  1\n]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=3), plain, max_size=5))
def test_json_is_reproducible_to_the_byte_and_comes_back(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("json")
    write_json(folder / "first.json", value)
    write_json(folder / "second.json", dict(reversed(value.items())))
    assert (folder / "first.json").read_bytes() == (folder / "second.json").read_bytes()
    assert json.loads((folder / "first.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_not_are_refused_and_nothing_is_written(tmp_path: Path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "record.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []


def test_what_json_has_no_word_for_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="Tensor cannot be written as JSON"):
        write_json(tmp_path / "record.json", {"loss": torch.zeros(1)})


# --- atomic files -----------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(file: Path) -> None:
        file.write_text("half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_at_once(tmp_path: Path):
    path = tmp_path / "new" / "file.txt"
    path.parent.mkdir()
    path.write_text("old")

    def write(file: Path) -> None:
        assert file.parent == path.parent  # a rename is atomic within one file system
        file.write_text("new")
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644  # not the 0600 of a temporary file


# --- provenance -------------------------------------------------------------------------------


def test_provenance_names_commit_versions_and_machine():
    record = provenance()
    assert set(record) == {"commit", "dirty", "versions", "python", "device", "threads"}
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(record["versions"]) == set(PACKAGES)
    assert record["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"3\.\d+\.\d+\S*", record["python"])
    assert record["device"]
    assert json.loads(json.dumps(record)) == record


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package-at-all"))
    assert provenance()["versions"] == {
        "torch": importlib.metadata.version("torch"),
        "no-such-package-at-all": None,
    }


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def copied_provenance(folder: Path) -> dict:
    """What the module says when it lies in another folder."""
    copy = folder / "provenance.py"
    shutil.copy(module.__file__, copy)
    spec = importlib.util.spec_from_file_location("copied_provenance", copy)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    return copied.provenance()


def test_a_checkout_has_a_commit_and_is_dirty_when_it_was_changed(tmp_path: Path):
    git(tmp_path, "init", "--quiet")
    shutil.copy(module.__file__, tmp_path / "provenance.py")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    record = copied_provenance(tmp_path)
    assert record["commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert record["dirty"] is False
    (tmp_path / "new.txt").write_text("")
    assert copied_provenance(tmp_path)["dirty"] is True


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path):
    record = copied_provenance(tmp_path)
    assert record["commit"] is None
    assert record["dirty"] is None


def test_another_projects_checkout_around_an_installed_package_is_not_ours(tmp_path: Path):
    """A package installed below someone's repository must not take that repository's commit."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "theirs")
    site = tmp_path / ".venv" / "site-packages"
    site.mkdir(parents=True)
    record = copied_provenance(site)
    assert record["commit"] is None
    assert record["dirty"] is None
