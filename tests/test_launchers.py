"""`shiva-dit train` by the real launchers: the same adapter as one process gives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shiva_dit.cli import main
from shiva_dit.training.log import LOG_FILE
from shiva_dit.training.processes import joined, one_of_several_asked
from tests.test_cli import DIGITS, ROOT, SHORT
from tests.test_processes import farthest, learned

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--num_processes", "2", "--no_python"]
MULTI = [*ACCELERATE, "--multi_gpu", "--main_process_port", "0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


def command(out: Path, *words: str) -> list[str]:
    return [str(BIN / "shiva-dit"), "train", DIGITS, f"out={out}", *SHORT, *words]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(["train", DIGITS, f"out={out}", "--threads", "1", *SHORT]) == 0
    return out


def are_the_same(alone: Path, together: Path) -> None:
    assert farthest(learned(alone), learned(together)) <= 1e-7
    ours, theirs = (
        [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
        for out in (alone, together)
    )
    assert [line["step"] for line in theirs] == [1, 2, 3]
    for one, other in zip(ours, theirs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "launcher",
    [MULTI, pytest.param(TORCHRUN, marks=pytest.mark.matrix)],
    ids=["accelerate", "torch"],
)
def test_two_processes_of_a_launcher_train_what_one_does(
    launcher: list[str], alone: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*launcher, *command(tmp_path / "out")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out' / 'adapter'}\n"  # by the first alone
    are_the_same(alone, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_of_mpi_train_what_one_does(alone: Path, tmp_path: Path) -> None:
    """As `mpirun` tells its processes who they are; without the program itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            command(tmp_path / "out"),
            env={
                **ENVIRONMENT,
                **{f"OMPI_COMM_WORLD_{key}": value for key, value in told.items()},
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in "01"
        for told in [{"RANK": rank, "SIZE": "2", "LOCAL_RANK": rank, "LOCAL_SIZE": "2"}]
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    are_the_same(alone, tmp_path / "out")


def test_processes_of_mpi_need_torchrun_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="on CPUs alone: start those of --device cuda by torchrun"):
        joined("cuda").__enter__()


@pytest.mark.slow
def test_accelerate_starts_one_process_for_cpus_and_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [*ACCELERATE, "--cpu", *command(tmp_path / "out")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "accelerate started this process alone: for several" in done.stderr


def test_one_of_several_asked() -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert one_of_several_asked({"ACCELERATE_USE_CPU": "True", **meeting})
    assert not one_of_several_asked({"ACCELERATE_USE_CPU": "True"})
    assert not one_of_several_asked(meeting)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [TORCHRUN, pytest.param(MULTI, marks=pytest.mark.matrix)],
    ids=["torch", "accelerate"],
)
def test_a_signal_to_a_launcher_stops_all_with_a_checkpoint(
    launcher: list[str], tmp_path: Path
) -> None:
    """As Ctrl-C in a terminal goes to all processes of it."""
    out = tmp_path / "out"
    words = command(out, "joint_steps=200")
    # What they say goes to a file: a pipe that nobody reads fills up.
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(
            [*launcher, *words], env=ENVIRONMENT, stdout=said, stderr=said, start_new_session=True
        )
        log, until = out / LOG_FILE, time.monotonic() + 200
        while not log.is_file() or len(log.read_text().splitlines()) < 4:
            assert run.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(timeout=200) != 0
    lines = len(log.read_text().splitlines())
    (last,) = (out / "checkpoints").iterdir()
    assert last.name == f"step-{lines:08d}"
    assert f"Interrupted; saved in {last}" in (tmp_path / "said").read_text()
