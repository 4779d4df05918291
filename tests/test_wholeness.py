"""That files, adapters, checkpoints and runs happen whole or not at all, whatever breaks them off.

Each step at the file system fails in turn, or the process ends there.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shiva_dit import ownership
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.ownership import locked_folder, owned
from shiva_dit.provenance import write_atomically, write_json
from shiva_dit.saved_folder import CARD_FILE, CONFIG_FILE, LORA_FILE, WEIGHTS_FILE
from shiva_dit.signals import Stopped, handled, stop, undisturbed
from shiva_dit.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    tidy,
)
from shiva_dit.training.run import train
from tests import tiny
from tests.faults import Steps, listing
from tests.killed import KILLS, PARTS
from tests.test_adapter import bytes_of, make, same
from tests.test_training import TinyData, recipe

FAULTS: dict[str, Callable[[], BaseException]] = {
    "ctrl-c": KeyboardInterrupt,
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "memory": MemoryError,
}
WAYS = [
    "ctrl-c",
    "killed",
    *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("disk", "memory")),
]


def raiser(fault: str) -> Callable[[], None]:
    def act() -> None:
        raise FAULTS[fault]()

    return act


def in_a_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does some work without cleaning up after itself."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def broken_off(work: Callable[[], None], steps: Steps, way: str) -> bool:
    """Whether some work went through without meeting its fault."""
    if way == "killed":
        return in_a_child(work) == 0
    try:
        work()
    except (KeyboardInterrupt, OSError, MemoryError):
        return False
    return steps.count <= steps.at  # a folder that can't be made, but is there, is no error


# --- adapters -------------------------------------------------------------------------------


def adapters() -> tuple[ShivaAdapter, ShivaAdapter]:
    """An adapter, and one that lies over it: with other weights, and another kind of backbone."""
    first, second = make("lora"), make("full")
    tiny.randomize(second.router, seed=4)
    return first, second


def saved(adapter: ShivaAdapter, folder: Path) -> Path:
    """The folder, which holds an adapter and what is the user's."""
    adapter.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    return folder


def check(folder: Path, old: ShivaAdapter, new: ShivaAdapter) -> bool:
    """Whether the folder holds the new adapter; it holds one of both, and what is the user's."""
    loaded = ShivaAdapter.from_pretrained(folder)
    is_new = same(loaded, new)
    assert is_new or same(loaded, old)
    assert (folder / "notes.txt").read_text() == "mine"
    return is_new


@pytest.mark.parametrize(
    ("fault", "after"),
    [
        ("ctrl-c", False),
        pytest.param("ctrl-c", True, marks=pytest.mark.slow),
        pytest.param("disk", False, marks=pytest.mark.slow),
        pytest.param("memory", False, marks=pytest.mark.slow),
    ],
)
def test_a_save_that_breaks_off_leaves_the_old_adapter_or_the_new(
    fault: str, after: bool, tmp_path: Path
) -> None:
    old, new = adapters()
    new.save_pretrained(tmp_path / "plain")
    wanted = bytes_of(tmp_path / "plain")
    before = saved(old, tmp_path / "before")
    seen = set()
    for at in range(1000):
        folder = shutil.copytree(before, tmp_path / str(at))
        steps = Steps(folder, at, raiser(fault), after=after)

        def work(folder: Path = folder, steps: Steps = steps) -> None:
            with pytest.MonkeyPatch.context() as patch:
                steps.install(patch)
                new.save_pretrained(folder)

        broken_off(work, steps, fault)
        seen.add(check(folder, old, new))
        new.save_pretrained(folder)
        assert bytes_of(folder) == {**wanted, "notes.txt": b"mine"}
        if steps.count <= at:
            break
    assert steps.count > 15
    assert seen == {False, True}


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new(tmp_path: Path) -> None:
    old, new = adapters()
    # Of a third kind, so that what is left of the second isn't written over by chance.
    third = make("frozen")
    before = saved(old, tmp_path / "before")
    seen = []
    for at in range(1000):
        folder = shutil.copytree(before, tmp_path / str(at))

        def work(folder: Path = folder, at: int = at) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Steps(folder, at, lambda: os._exit(9)).install(patch)
                new.save_pretrained(folder)

        status = in_a_child(work)
        seen.append(check(folder, old, new))
        third.save_pretrained(folder)
        assert same(ShivaAdapter.from_pretrained(folder), third)
        assert set(bytes_of(folder)) == {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, "notes.txt"}
        if status == 0:
            break
        assert status == 9
    assert seen == sorted(seen)  # first the old one, then, from one instant on, the new
    assert len(set(seen)) == 2


@pytest.mark.slow
def test_a_first_save_that_is_killed_is_no_adapter_and_nothing_of_it_stays(tmp_path: Path) -> None:
    made = make("lora")
    for at in range(1000):
        folder = tmp_path / str(at)

        def work(folder: Path = folder, at: int = at) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Steps(folder, at, lambda: os._exit(9)).install(patch)
                made.save_pretrained(folder)

        status = in_a_child(work)
        if folder.is_dir() and (folder / CONFIG_FILE).exists():
            assert same(ShivaAdapter.from_pretrained(folder), made)
        elif folder.is_dir():
            with pytest.raises(ValueError, match="holds no config"):
                ShivaAdapter.from_pretrained(folder)
        made.save_pretrained(folder)
        assert set(bytes_of(folder)) == {CONFIG_FILE, WEIGHTS_FILE, LORA_FILE, CARD_FILE}
        if status == 0:
            break


def test_a_second_signal_waits_until_the_first_is_undone(tmp_path: Path) -> None:
    old, new = adapters()
    old.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = bytes_of(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        signal.raise_signal(signal.SIGINT)
        real(self, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        Steps(tmp_path, 12, interrupt).install(patch)
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == before


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.sd3().save_pretrained(model)
    before = bytes_of(model)
    with pytest.raises(ValueError, match=r"config\.json is not an adapter's, and not ours to rep"):
        make().save_pretrained(model)
    assert bytes_of(model) == before

    own = tmp_path / "own"
    own.mkdir()
    (own / LORA_FILE).write_bytes(b"a LoRA of the user")
    (own / CARD_FILE).write_text("a card of the user")
    with pytest.raises(ValueError, match=f"holds a {LORA_FILE} that no adapter there lists"):
        make("lora").save_pretrained(own)
    for _ in range(2):
        make("frozen").save_pretrained(own)
        assert (own / LORA_FILE).read_bytes() == b"a LoRA of the user"
        assert (own / CARD_FILE).read_text() == "a card of the user"

    card = tmp_path / "card"
    make().save_pretrained(card)
    text = (card / CARD_FILE).read_text() + "\nMore, by the user.\n"
    (card / CARD_FILE).write_text(text)
    for kind in ("lora", "frozen"):
        make(kind).save_pretrained(card)
        assert (card / CARD_FILE).read_text() == text


def test_readers_and_writers_of_one_folder_never_meet_half_an_adapter(tmp_path: Path) -> None:
    old, new = adapters()
    old.save_pretrained(tmp_path)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(6):
                new.save_pretrained(tmp_path)
                old.save_pretrained(tmp_path)
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        loaded = ShivaAdapter.from_pretrained(tmp_path)
        assert same(loaded, old) or same(loaded, new)
    assert failed == []


# --- checkpoints ----------------------------------------------------------------------------


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint({"x": torch.full((3,), float(step))}, {"step": step})


def held(folder: Path) -> list[int]:
    """Steps of all checkpoints, each of which is whole."""
    found = []
    for path in sorted(folder.glob("step-*")):
        state = load_checkpoint(path)
        assert state.tensors["x"].tolist() == [float(state.state["step"])] * 3
        found.append(state.state["step"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [3, 2])  # a new one; one that is there already
def test_a_checkpoint_is_whole_or_not_there(way: str, step: int, tmp_path: Path) -> None:
    for at in range(1000):
        folder = tmp_path / f"{at}"
        for earlier in (1, 2):
            save_checkpoint(folder, earlier, checkpoint(earlier))
        (folder / "step-00000001-good").mkdir()
        (folder / "step-00000001-good" / "notes.txt").write_text("mine")
        act = (lambda: os._exit(9)) if way == "killed" else raiser(way)
        steps = Steps(folder, at, act)

        def work(folder: Path = folder, steps: Steps = steps) -> None:
            with pytest.MonkeyPatch.context() as patch:
                steps.install(patch)
                save_checkpoint(folder, step, checkpoint(step))

        done = broken_off(work, steps, way)
        last = latest_checkpoint(folder)
        assert last is not None
        assert load_checkpoint(last).state["step"] in {2, step}
        tidy(folder)
        assert held_only(folder)[-1] in {2, step}
        save_checkpoint(folder, 4, checkpoint(4))
        assert held_only(folder)[-1] == 4
        assert len(held_only(folder)) == 2
        if done:
            break
    assert at > 15


def held_only(folder: Path) -> list[int]:
    """As `held`, where nothing else is there but what is the user's."""
    good = folder / "step-00000001-good"
    assert (good / "notes.txt").read_text() == "mine"
    names = sorted(path.name for path in folder.iterdir() if path != good)
    assert all(re.fullmatch(r"step-\d{8}", name) for name in names), names
    found = []
    for name in names:
        state = load_checkpoint(folder / name)
        assert state.tensors["x"].tolist() == [float(state.state["step"])] * 3
        found.append(state.state["step"])
    return found


def test_rotation_deletes_what_is_its_own_alone(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, checkpoint(step))
    mine = {
        "step-00000001-good": "dir",
        "step-1": "dir",
        "step-000000001": "dir",
        "step-best": "dir",
        ".writing-notes": "dir",
        "step-00000000": "file",
    }
    for name, kind in mine.items():
        (tmp_path / name).mkdir() if kind == "dir" else (tmp_path / name).write_text("mine")
    (tmp_path / "step-00000001" / "notes.txt").write_text("this one is good")
    elsewhere = tmp_path / "elsewhere"
    save_checkpoint(elsewhere, 0, checkpoint(0))
    (tmp_path / ".writing-step-00000007").mkdir()  # of a process that was killed
    (tmp_path / ".writing-ab12_xyz").mkdir()  # of an older version's
    for step in (3, 4, 5):
        save_checkpoint(tmp_path, step, checkpoint(step))
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {*mine, "elsewhere", "step-00000001", "step-00000004", "step-00000005"}
    last = latest_checkpoint(tmp_path)
    assert last is not None
    assert last.name == "step-00000005"


def test_a_checkpoints_state_has_a_digest_and_older_ones_are_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, checkpoint(1)) / "state.json"
    data = json.loads(path.read_text())
    write_json(path, {**data, "state": {"step": 7}})
    with pytest.raises(ValueError, match=r"state\.json is not the file that was saved: its SHA"):
        load_checkpoint(path.parent)
    write_json(path, {key: value for key, value in data.items() if key != "sha256"})
    assert load_checkpoint(path.parent).state == {"step": 1}


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_the_old_one_or_the_new(way: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    act = (lambda: os._exit(9)) if way == "killed" else raiser(way)
    for at in range(100):
        write_json(path, {"old": 1})
        steps = Steps(tmp_path, at, act)

        def work(steps: Steps = steps) -> None:
            with pytest.MonkeyPatch.context() as patch:
                steps.install(patch)
                write_json(path, {"new": 2})

        done = broken_off(work, steps, way)
        assert way == "killed" or list(tmp_path.iterdir()) == [path]
        assert json.loads(path.read_text()) in ({"old": 1}, {"new": 2})
        write_json(path, {"third": 3})
        assert list(tmp_path.iterdir()) == [path]
        if done:
            break
    assert at >= 4


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"can't be written: No space left on device: .*record\.js"):
        write_atomically(tmp_path / "record.json", full)


# --- owners ---------------------------------------------------------------------------------


def test_a_folder_has_one_owner_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        owned(folder),
        pytest.raises(ValueError, match=rf"run belongs to another.*process {os.getpid()} on "),
        owned(folder),
    ):
        pass
    assert not folder.exists()  # it was made for this, and nothing is in it

    def die() -> None:
        with owned(folder):
            os._exit(9)

    assert in_a_child(die) == 9
    assert [path.name for path in folder.iterdir()] == [ownership.OWNER_FILE]
    with owned(folder):
        (folder / "result").write_text("")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_two_trainings_into_one_folder_are_refused(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    with owned(tmp_path), pytest.raises(ValueError, match="belongs to another run"):
        train(config, tiny.sd3(), TinyData(), resume=False)
    train(config, tiny.sd3(), TinyData(), resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "checkpoints",
        "log.jsonl",
        "recipe.toml",
        "result.json",
        "run.json",
    ]


def test_readers_share_a_folder_and_writers_don_t(tmp_path: Path) -> None:
    with locked_folder(tmp_path, shared=True), locked_folder(tmp_path, shared=True):
        pass
    assert listing(tmp_path) == {}


# --- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_become_exceptions_and_wait_where_they_must(number: int) -> None:
    order = []
    with handled(stop):

        def work() -> None:
            with undisturbed():
                signal.raise_signal(number)
                order.append("undone")

        with pytest.raises(Stopped) as caught:
            work()
        assert caught.value.number == number
    assert order == ["undone"]


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(stop):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


# --- runs -----------------------------------------------------------------------------------


def weights(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted((out / "adapter").glob("*.safetensors"))
    }


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(tmp_path / "whole"), tiny.sd3(), TinyData(), resume=False)
    for resume in (False, True):
        out = tmp_path / str(resume)
        config = recipe(out)
        with pytest.raises(FloatingPointError):  # after two steps: as a kill leaves it
            train(config, tiny.sd3(), TinyData(broken_at=6), resume=False)
        assert latest_checkpoint(out / "checkpoints") is None
        with pytest.raises(ValueError, match=r"run\.json was made with other values of keep_ratio"):
            train(recipe(out, keep_ratio=0.4), tiny.sd3(), TinyData(), resume=False)
        capsys.readouterr()
        train(config, tiny.sd3(), TinyData(), resume=resume)
        assert "a run without a checkpoint: it starts again from the beg" in capsys.readouterr().err
        assert weights(out) == weights(tmp_path / "whole")


def test_resuming_where_nothing_is_starts_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(tmp_path / "new"), tiny.sd3(), TinyData(), resume=True)
    said = capsys.readouterr().err
    assert "holds no checkpoint to resume from: the run starts from the beginning" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.matrix) for first in range(1, PARTS))]
)
def test_a_training_killed_at_any_of_thirty_moments_ends_as_if_it_had_not_been(
    first: int, tmp_path: Path
) -> None:
    """In a process of its own, which forks one for each training: `tests/killed.py`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(tmp_path), str(first)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == KILLS // PARTS == 6
    assert report["before_the_first_checkpoint"] >= 1
    assert report["after_it"] >= 1
