"""The command line's one boundary: a foreseeable fault is one line and status 2, a bug is not."""

import argparse
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shiva_dit.cli import documents, main, training
from shiva_dit.experiments.contestants import Contestant, Job, Settings
from shiva_dit.experiments.pool import run_jobs
from shiva_dit.training.trainer import Trainer
from tests.faults import listing

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "recipes" / "digits.toml")
SHORT = ["warmup_steps=1", "policy_steps=1", "joint_steps=1", "batch_size=4", "micro_batches=2"]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that went through; tests copy it."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(["train", DIGITS, f"out={out}", "--threads", "1", *SHORT]) == 0
    return out


def said(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    """The one line on stderr."""
    capsys.readouterr()
    assert main(arguments) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("shiva-dit: ")
    return lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = " + b"[" * 5000 + b"]" * 5000, "is not TOML: |is nested too deeply"),
        (b"[" + b".".join([b"a"] * 5000) + b"]\n", "is nested too deeply|unknown key"),
        (b"steps = 1\xff", "is not UTF-8 text"),
        (b"seed = " + b"9" * 5000, "is not TOML"),
        (b"seed = " + b"9" * 30, "seed must be at most 4294967295"),
        (b"seed = true", "seed: expected int, got True"),
        (b"keep_ratio = nan", "keep_ratio: expected a finite number, got nan"),
        (b"keep_ratio = 1" + b"0" * 400, "keep_ratio: expected a finite number"),
        (b"[policy]\nnum_bins = 1000000000", "num_bins must be at most 10000"),
        (b"warmup_steps = 1" + b"0" * 400, "warmup_steps: expected a whole number below 10^308"),
        (b'like = "a\\u0000b"', "like: a path can't hold a NUL character"),
        (b'like = ""', "like: expected a path, got ''"),
        (b"", "is an empty recipe, it sets nothing"),
        (b"\xef\xbb\xbf# a comment\n", "is an empty recipe"),
        (b"[policy]\n[policy.budget]\n", "is an empty recipe"),
        (b"like = []\n", "is an empty recipe"),
    ],
)
def test_a_recipe_that_is_wrong_is_named(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    line = said(capsys, ["train", str(path)])
    assert "mine.toml" in line
    assert any(part in line for part in message.split("|")), line
    assert len(line) < 1500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "meta"], "device 'meta' can't be used here"),
        (["--device", "nonsense"], "device 'nonsense' can't be used here"),
        (["--threads", "100000"], "--threads must be at most "),
        (["--base", "nowhere"], "nowhere/digits-backbone.safetensors is missing"),
        (["x.y=" + "[" * 5000], "is nested too deeply"),
        (["task=nothing"], "there is no task 'nothing'"),
    ],
)
def test_options_that_can_t_be_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(capsys, ["train", DIGITS, f"out={tmp_path / 'run'}", *SHORT, *words])
    assert message in line
    assert not (tmp_path / "run").exists()


def test_workers_are_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "compare-estimators-digits.toml")
    out = ["--out", str(tmp_path), "--workers", "100000"]
    assert "--workers must be at most" in said(capsys, ["compare", recipe, *out])
    assert "--workers must be at most" in said(capsys, ["quickstart", *out])


def damaged(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[kind]
    )


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_damaged_weights_are_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from shiva_dit.demo.base import ASSETS  # noqa: PLC0415

    for name in ("digits-backbone.safetensors", "digits-judge.safetensors"):
        (tmp_path / name).write_bytes((ASSETS / name).read_bytes())
    damaged(tmp_path / "digits-backbone.safetensors", kind)
    line = said(capsys, ["train", DIGITS, f"out={tmp_path / 'run'}", "--base", str(tmp_path)])
    assert "digits-backbone.safetensors is not a whole safetensors file" in line
    judge = (tmp_path / "digits-judge.safetensors").read_bytes()
    (tmp_path / "digits-backbone.safetensors").write_bytes(judge)
    line = said(capsys, ["train", DIGITS, f"out={tmp_path / 'run'}", "--base", str(tmp_path)])
    assert "digits-backbone.safetensors is of another model or task" in line


def test_records_that_are_none_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("a", b"{"), ("b", b"\xff"), ("c", b"[" * 10**5), ("d", b"{}")):
        (tmp_path / f"{name}.json").write_bytes(content)
        document = tmp_path / f"{name}.md"
        document.write_text(f"<!-- table flips: {name}.json -->\n<!-- end table -->\n")
        assert f"{name}.json" in said(capsys, ["report", str(document)])
        both = [str(tmp_path / f"{name}.json")] * 2
        line = said(capsys, ["merge", *both, "--out", str(tmp_path / "out.json")])
        assert f"{name}.json" in line or "no record of a comparison" in line
    (tmp_path / "e.md").write_bytes(b"\xff\xfe\xff")
    assert "e.md is not UTF-8 text" in said(capsys, ["report", str(tmp_path / "e.md")])


@pytest.mark.slow
def test_a_log_line_that_is_none_is_named(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", DIGITS, f"out={tmp_path}", "--threads", "1", *SHORT]
    shutil.copytree(a_run, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "log.jsonl"
    good = log.read_text()
    for line in ('{"loss": 1}\n', "[]\n", "hello\n", '{"step": "x"}\n', "[" * 10**5 + "\n"):
        log.write_text(line + good)
        capsys.readouterr()
        assert main([*words, "--resume"]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"{log}, line 1, is not a line of a run's log" in last
        assert "Traceback" not in last
    log.write_bytes(b"\xff" + good.encode())
    assert main([*words, "--resume"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{log} is not a run's log ({log} is not UTF-8 text" in last
    assert "Training doesn't need the log: move it away." in last
    log.unlink()
    log.mkdir()
    assert main([*words, "--resume"]) == 2
    assert "Training doesn't need the log: move it away." in capsys.readouterr().err
    log.rmdir()
    log.write_text(good)
    assert main([*words, "--resume"]) == 0
    assert log.read_text() == good


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    a_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", DIGITS, f"out={tmp_path}", "--threads", "1", *SHORT]
    shutil.copytree(a_run, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "checkpoints" / "step-00000003" / "state.json"

    def forbidden(path: Path) -> Any:  # root may read all: permissions alone show nothing
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("shiva_dit.training.checkpoint.read_json", forbidden)
    line = said(capsys, [*words, "--resume"])
    assert (
        line == f"shiva-dit: {state} may not be read or written: allow it, or choose another place."
    )
    assert state.is_file()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("config.json truncated", "config.json is damaged, it is not JSON"),
        ("config.json empty", "config.json is damaged, it is not JSON"),
        ("config.json text", "config.json is damaged, it is not JSON"),
        ("config.json another", "config.json is not an adapter's, and not ours to replace"),
        ("config.json a folder", "config.json is a folder where a file is expected"),
        ("config.json gone", "safetensors that no adapter there lists"),
        (". a file", "adapter is a file where an adapter's folder is expected"),
    ],
)
def test_a_run_with_a_damaged_adapter_says_how_it_goes_on(
    fault: str,
    message: str,
    a_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before it trains on; nothing is deleted, and what it says helps."""
    out = tmp_path / "run"
    words = ["train", DIGITS, f"out={out}", "--threads", "1", *SHORT]
    shutil.copytree(a_run, out)
    whole = listing(out / "adapter")
    name, _, kind = fault.partition(" ")
    path = out / "adapter" / name
    if kind == "another":
        path.write_text("{}")
    elif kind in ("a folder", "gone"):
        path.unlink()
    elif kind == "a file":
        shutil.rmtree(path)
        path.write_text("mine")
    else:
        damaged(path, kind)
    if kind == "a folder":
        path.mkdir()
    before = listing(out)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", lambda *_: pytest.fail("worked before it looked"))
        line = said(capsys, [*words, "--resume"])
    assert message in line
    assert f"Move {out / 'adapter'} away and go on by --resume: it is written anew." in line
    assert listing(out) == before
    (out / "adapter").rename(tmp_path / "away")
    assert main([*words, "--resume"]) == 0
    again = listing(out / "adapter")
    assert {n: c for n, c in again.items() if n.endswith("safetensors")} == {
        n: c for n, c in whole.items() if n.endswith("safetensors")
    }


# --- the boundary itself ----------------------------------------------------------------------


def raising(error: BaseException, patch: pytest.MonkeyPatch) -> None:
    def run(options: argparse.Namespace) -> int:
        raise error

    patch.setattr(documents, "_doctor", run)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore."), "batch"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"), "batch"),
        (OSError(28, "No space left on device", "runs/x"), "No space left on device: 'runs/x'"),
        (ValueError("one\n  two"), "shiva-dit: one two"),
        (ImportError("T5Tokenizer requires the SentencePiece library"), "SentencePiece"),
        (
            ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets"),
            "pip install 'shiva-dit[demo]'",
        ),
        (FloatingPointError("the loss is not finite"), "the loss is not finite"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_foreseen_is_one_line(
    error: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raising(error, monkeypatch)
    assert message in said(capsys, ["doctor"])


@pytest.mark.parametrize(
    "error",
    [
        KeyError("step"),
        RuntimeError("shapes differ"),
        AssertionError(),
        TypeError("no"),
        ImportError("cannot import name", name="shiva_dit.api.apply"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(error, monkeypatch)
    with pytest.raises(type(error)):
        main(["doctor"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_any_command_with_their_status(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undone: list[str] = []

    def run(options: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), number)
            for _ in range(10**7):
                pass
        finally:
            undone.append("yes")
        return 0

    before = signal.getsignal(number)
    monkeypatch.setattr(training, "_encode", run)
    monkeypatch.setattr(sys, "argv", [".venv/bin/shiva-dit"])
    words = ["encode", "pictures", "--pipeline", "p", "--out", "o"]
    assert main(words) == 128 + number
    assert undone == ["yes"]
    assert signal.getsignal(number) == before
    again = ":\n  .venv/bin/shiva-dit encode pictures --pipeline p --out o\n"
    assert f"Go on with{again}" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 128 + number
    launched = ", by the launcher that started these 2 processes"
    assert f"Go on with{launched}{again}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_saves_like_ctrl_c(
    number: int,
    a_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", DIGITS, "--threads", "1", *SHORT]
    step = Trainer.train_step

    def interrupted(self: Trainer) -> dict[str, float]:
        if self.step == 1:
            signal.raise_signal(number)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert main([*words, f"out={tmp_path / 'run'}"]) == 128 + number
    err = capsys.readouterr().err
    assert "saved in" in err
    assert "--resume" in err
    assert main([*words, f"out={tmp_path / 'run'}", "--resume"]) == 0
    for path in (a_run / "adapter").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / "adapter" / path.name).read_bytes()


def test_a_second_signal_stops_at_once_and_leaves_nothing_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", DIGITS, "--threads", "1", *SHORT, f"out={tmp_path}"]

    def interrupted(self: Trainer) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert main(words) == 128 + signal.SIGTERM
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoints", "log.jsonl", "recipe.toml", "run.json"}
    assert main(words) == 0  # it starts again by itself


def test_without_scikit_learn_the_digits_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "shiva_dit.demo.digits", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    line = said(capsys, ["train", DIGITS, f"out={tmp_path / 'run'}"])
    assert "sklearn is not installed, and this needs it: pip install 'shiva-dit[demo]'" in line


# --- what a run was made from -----------------------------------------------------------------


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "adapter" / "config.json").read_text())["training"]


def test_the_record_says_what_it_was_trained_on(a_run: Path) -> None:
    from shiva_dit.demo.tasks import load_task  # noqa: PLC0415

    made = record(a_run)
    task = load_task("digits")
    assert made["recipe"]["task"] == "digits"
    assert made["data"] == {"name": "digits", "samples": 1297, "identity": task.identity()}
    assert made["backbone"]["class"] == "SD3Transformer2DModel"
    assert len(made["backbone"]["sha256"]) == 64
    assert load_task("scenes").identity() != task.identity()


# --- seeds, and jobs that fail ----------------------------------------------------------------


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_seeds_are_checked_before_anything_runs(
    seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    bound = "at least 0" if seed == "-1" else "at most 4294967295"
    recipe = str(ROOT / "recipes" / "compare-estimators-digits.toml")
    for words in (
        ["quickstart", "--seed", seed, "--out", str(out)],
        ["quickstart", "--seed", "4294967295", "--seeds", "2", "--out", str(out)],
        ["compare", recipe, f"seeds=[0, {seed}]", "--out", str(out)],
        ["train", DIGITS, f"seed={seed}", f"out={out}"],
        ["inspect", "flips", f"seed={seed}", "--out", str(out)],
    ):
        line = said(capsys, words)
        assert "seed" in line
        assert f"must be {bound}" in line or words[1:3] == ["--seed", "4294967295"]
        assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(300)  # a guard against one that never ends
def test_a_job_that_fails_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    """With more jobs than workers: some wait in the pool, some in its queue."""
    settings = Settings(base=Path("nowhere"))
    job = Job(settings=settings, contestants=(Contestant(name="x"),), seed=0)
    with pytest.raises(ValueError, match=r"^nowhere/digits-backbone.safetensors is missing"):
        list(run_jobs([job] * 6, 1))
    assert not multiprocessing.active_children()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err  # libraries of quantization speak as they are imported


# --- places -----------------------------------------------------------------------------------


def test_places_are_checked_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is loaded, measured or trained where the result has no place to be."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "shiva_dit.benchmark.run.run_benchmark",
        "shiva_dit.experiments.flips.run_flips",
        "shiva_dit.experiments.caption_swap.run_caption_swap",
        "shiva_dit.experiments.synthetic.run_synthetic",
        "shiva_dit.experiments.quickstart.Quickstart",
        "shiva_dit.experiments.compare._run",
        "shiva_dit.demo.train_base._trained",
        "shiva_dit.cli.training._demo",
        "shiva_dit.cli.training.loaded",
        "shiva_dit.provenance.read_json",
    ):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("worked before it looked"))
    file, lost = tmp_path / "file", tmp_path / "lost"
    file.write_text("mine")
    lost.symlink_to(tmp_path / "nowhere")
    recipe = str(ROOT / "recipes" / "compare-estimators-digits.toml")
    commands = [
        ["benchmark", "sd3-small"],
        *(["inspect", what] for what in ("flips", "captions", "synthetic")),
        ["quickstart"],
        ["compare", recipe],
        ["train-base"],
        ["encode", str(tmp_path), "--pipeline", "p"],
        ["train", DIGITS],
    ]
    for words in commands:
        for out, wrong in (
            (file, f"{file} is a file, not a folder"),
            (file / "a" / "b", f"{file} is a file, not a folder"),
            (lost / "a", f"{lost} is a link that leads nowhere"),
        ):
            place = [f"out={out}"] if words[0] == "train" else ["--out", str(out)]
            line = said(capsys, [*words, *place])
            assert line == f"shiva-dit: {wrong}: choose another place for what is written."
    line = said(capsys, ["merge", "a.json", "b.json", "--out", str(file / "all.json")])
    assert f"{file} is a file, not a folder" in line
    assert file.read_text() == "mine"


def test_an_empty_place_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "out: expected a path, got ''" in said(capsys, ["train", DIGITS, "out="])
    line = said(capsys, ["train", DIGITS, 'out="a\\u0000b"'])
    assert "out: a path can't hold a NUL character, got 'a\\x00b'" in line
    with pytest.raises(SystemExit, match="2"):
        main(["quickstart", "--out", ""])
    assert "--out: path: expected a path, got ''" in capsys.readouterr().err


def test_files_and_folders_in_each_other_s_places_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop.md"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("")
    for path, wrong in (
        (tmp_path, "is a folder where a file is expected: name a file."),
        (tmp_path / "none.md", "is not there: check the path."),
        (tmp_path / "file" / "x.md", "is, or lies below, a file where a folder is expected"),
        (loop, "is a loop of links: remove it"),
        (tmp_path / ("x" * 300), "has too long a name: choose a shorter one."),
    ):
        line = said(capsys, ["report", str(path)])
        assert line.startswith(f"shiva-dit: {path} {wrong}")
        assert "Errno" not in line


# --- records ----------------------------------------------------------------------------------

ROW = {"method": "dense", "name": "unpruned", "flops": 1.0, "correct_by_seed": [1.0]}
ROW |= {"frechet_by_seed": [1.0], "train_cpu_s": 0.0, "sample_cpu_s": 1.0}
QUICKSTART = {
    "rows": [ROW],
    "config": {"keep_ratio": 0.4, "seeds": [0], "count": 20},
    "keep_ratio_executed": 0.4,
    "frechet_floor": 1.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": []},
        {"rows": {}},
        {"rows": [{**ROW, "method": "other"}]},
        {"rows": [{**ROW, "flops": 0.0}]},
        {"rows": [{**ROW, "correct_by_seed": []}]},
        {"frechet_floor": "x"},
        {"keep_ratio_executed": "x"},
        {"cases": []},
    ],
)
@pytest.mark.parametrize(
    "kind", ["table quickstart", "table comparison", "plot scaling", "table speed"]
)
def test_records_with_wrong_values_are_named(
    kind: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, document = tmp_path / "mine.json", tmp_path / "mine.md"
    record.write_text(json.dumps({**QUICKSTART, "sizes": [QUICKSTART, {"rows": []}], **changes}))
    table = "<!-- end table -->" if kind.startswith("table") else "![x](x.png)"
    document.write_text(f"<!-- {kind}: mine.json -->\n{table}\n")
    if kind == "table quickstart" and "cases" in changes:
        assert main(["report", str(document)]) == 0  # whole: the others fail for what is wrong
        return
    assert str(record) in said(capsys, ["report", str(document)])


@pytest.mark.parametrize(
    "nothing", [{"rows": []}, {"config": {**QUICKSTART["config"], "seeds": []}}]
)
def test_records_of_nothing_are_not_merged(
    nothing: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other, out = (tmp_path / f"{name}.json" for name in ("one", "other", "out"))
    for path, changes in ((one, {}), (other, nothing)):
        path.write_text(json.dumps({**QUICKSTART, "runs_at": [], **changes}))
    line = said(capsys, ["merge", str(one), str(other), "--out", str(out)])
    assert f"{one}, {other} can't be read as records of comparisons" in line
    assert "has no rows or names no seeds: there is nothing to merge." in line
    assert not out.exists()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_report_changes_tables_alone(mark: bytes, end: bytes, tmp_path: Path) -> None:
    """Not the mark, ends of lines, the mode, a link to the document, or one that is up to date."""
    (tmp_path / "mine.json").write_text(json.dumps(QUICKSTART))
    around = [mark + b"# Mine" + end + b"one\nother\r\n", end + b"last, without an end"]
    start, stop = b"<!-- table quickstart: mine.json -->" + end, b"<!-- end table -->"
    document, link = tmp_path / "mine.md", tmp_path / "link.md"
    document.write_bytes(around[0] + start + b"old" + end + stop + around[1])
    document.chmod(0o600)
    link.symlink_to("mine.md")
    assert main(["report", str(link)]) == 0
    made = document.read_bytes()
    assert made.startswith(around[0] + start + b"| method | FLOPs per image ")
    assert made.endswith(end + stop + around[1])
    table = made.removeprefix(around[0]).removesuffix(around[1])
    assert b"old" not in table
    assert table.count(b"\n") == table.count(end) == 6
    assert link.is_symlink()
    assert document.stat().st_mode & 0o777 == 0o600
    before = document.stat()
    assert main(["report", str(document)]) == 0
    assert document.stat().st_ino == before.st_ino


FLIPS = {
    "title": "x",
    "config": {"images": 1, "tokens": 0, "loss": "output"},
    "estimators": {},
    "budget": {},
}
CAPTIONS: dict[str, Any] = {"true": {}, "empty": {}, "swapped": {}, "chance": {}}


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("table flips", FLIPS, "it gives an empty table"),
        ("plot flips", FLIPS, "there is nothing to draw"),
        ("plot schedules", {"rows": []}, "there is nothing to draw"),
        ("plot schedules", {"rows": [{"name": "unpruned"}]}, "there is nothing to draw"),
        ("plot comparison", {"rows": []}, "there is nothing to draw"),
        ("plot tradeoff", {"rows": [], "config": {"arms": {}}}, "there is nothing to draw"),
        ("plot scaling", {"sizes": []}, "there is nothing to draw"),
        ("plot frontier", {"fronts": [], "modes": {}}, "there is nothing to draw"),
        ("table captions", {"shares": CAPTIONS}, "it gives an empty table"),
        ("table quickstart", {**QUICKSTART, "rows": [{**ROW, "frechet_by_seed": []}]}, "is empty"),
    ],
)
def test_records_of_nothing_are_refused(
    kind: str, record: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(record))
    document = tmp_path / "mine.md"
    below = "<!-- end table -->" if kind.startswith("table") else "![x](x.png)"
    document.write_text(f"<!-- {kind}: mine.json -->\n{below}\n")
    line = said(capsys, ["report", str(document)])
    assert str(tmp_path / "mine.json") in line
    assert message in line
    assert not (tmp_path / "x.png").exists()
