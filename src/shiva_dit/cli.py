"""The command line: a thin shell over the library."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shiva_dit import __version__
from shiva_dit.signals import Stopped, handled, stop

EXTRAS = {"sklearn": "demo", "matplotlib": "demo", "PIL": "demo"}
"""Which extra brings a module along."""
FORESEEN = (ValueError, FloatingPointError, OSError, ImportError, MemoryError, RuntimeError)
"""What a caller or a machine can bring about; `_foreseen` looks closer at the last three."""
AT_PATHS = {
    errno.EISDIR: "is a folder where a file is expected: name a file",
    errno.EEXIST: "is, or lies below, a file where a folder is expected: choose another place",
    errno.ENOTDIR: "is, or lies below, a file where a folder is expected: choose another place",
    errno.ENOENT: "is not there: check the path",
    errno.ELOOP: "is a loop of links: remove it, or choose another place",
    errno.EACCES: "may not be read or written: allow it, or choose another place",
    errno.ENAMETOOLONG: "has too long a name: choose a shorter one",
}
"""What is wrong with the path that an `OSError` names, and what to do."""
MOST_PER_CORE = 16
"""Threads or workers: torch and the system break down far above the number of cores."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `shiva-dit`; returns the exit status.

    The one boundary for what can go wrong: what is foreseen becomes one line and status 2, a signal
    128 + its number. Anything else is a bug, and keeps its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(words)
    # Its notices on optional image backends concern nobody here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with handled(stop):
            return options.run(options)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        print("\nshiva-dit: interrupted.", file=sys.stderr)
        if getattr(options, "goes_on", False):
            again = shlex.join([_program(), *words])
            print(f"What is done is kept. Go on with:\n  {again}", file=sys.stderr)
        return 128 + number
    except FORESEEN as error:
        line = _foreseen(error)
        if line is None:
            raise
        print(f"shiva-dit: {' '.join(line.split())}", file=sys.stderr)
        return 2


def _program() -> str:
    """What this command was called by, for another call: it needn't be in the PATH."""
    name = sys.argv[0]
    return name if Path(name).name == "shiva-dit" else "shiva-dit"


def _foreseen(error: Exception) -> str | None:
    """What to say of an error that isn't a bug; None of one that is."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in AT_PATHS:
        return f"{error.filename} {AT_PATHS[error.errno]}."
    if isinstance(error, (ValueError, FloatingPointError, OSError)):
        return str(error)
    if isinstance(error, ImportError):
        name = (error.name or "").partition(".")[0]
        if name in EXTRAS:
            return f"{name} is not installed, and this needs it: pip install 'shiva-dit[demo]'"
        return None if error.name else str(error)  # libraries name what they lack
    if isinstance(error, MemoryError) or _is_torchs_memory_error(error):
        return (
            f"out of memory ({str(error).partition('. ')[0] or 'of the machine'}): use a smaller "
            "batch or size, fewer workers, or gradient_checkpointing=true in training."
        )
    return None


def _is_torchs_memory_error(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    # On a CPU it is a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options in any order: argparse alone takes no `key=value` after an option."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if "=" not in word or word.startswith("-")]
    if rest and (wrong or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shiva-dit", description=__doc__)
    parser.add_argument("--version", action="version", version=f"shiva-dit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> Any:
        made = commands.add_parser(
            name,
            help=about,
            description=about,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        made.set_defaults(run=run, goes_on=run in (_compare, _encode))
        return made.add_argument

    add = command(
        "quickstart", _quickstart, "train an adapter on real digits, watch it, compare it"
    )
    add("--keep", type=float, default=0.4, help="mean share of tokens kept")
    add("--seed", type=int, default=0, help="seed of training and sampling")
    add("--seeds", type=_positive, default=1, help="repeat with so many seeds")
    add("--out", type=_path, default=Path("quickstart"), help="folder to fill")
    add("--count", type=_positive, default=300, help="images judged per method")
    add("--all-controls", action="store_true", help="all controls, about 3 times longer")
    add("--workers", type=_positive, default=2, help="methods run at a time")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")

    _add_training(command)

    add = command("compare", _compare, "train and judge many recipes side by side")
    add("recipe", type=_path, help="such as recipes/compare-estimators-digits.toml")
    add("--out", type=_path, help="folder to fill or to go on in; runs/<what> by default")
    add("--workers", type=_positive, default=2, help="recipes at a time")
    add("--retry-failed", action="store_true", help="run arms that diverged again")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")

    add = command("merge", _merge, "one record from several whose seeds ran apart")
    add("records", nargs="+", type=_path, help="record.json of one comparison, seeds apart")
    add("--out", type=_path, required=True, help="the record to write")

    add = command("inspect", _inspect, "hold estimators against the truth")
    add(
        "what",
        choices=["flips", "captions", "synthetic"],
        help="the flip test; whether tokens follow the caption; the paper's figure 6",
    )
    add("--task", default="digits", help="demo task; for models of your own: shiva_dit.inspection")
    add("--adapter", type=_path, help="what selects; the shipped adapter by default")
    add("--random", type=float, metavar="KEEP", help="select by chance at this keep ratio instead")
    add("--out", type=_path, help="folder for record and plot; runs/<what> by default")
    add("overrides", nargs="*", default=[], metavar="key=value", help="images, tokens, loss, seed")

    _add_benchmark(command)

    command("doctor", _doctor, "say what is installed, and what it is enough for")

    add = command("report", _report, "write tables and plots of documents from records")
    add("documents", nargs="+", type=_path, help="Markdown files")
    return parser


def _add_training(command: Callable[..., Any]) -> None:
    add = command("train", _train, "train an adapter by a recipe")
    add("recipe", type=_path, help="a TOML file, such as recipes/digits.toml")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--threads", type=_positive, help="threads; all cores by default, results depend on it")
    add("--device", default="cpu", help="where it is trained, such as cuda")
    add("--base", type=_path, help="folder of the task's backbone; the shipped one by default")
    add("--data", type=_path, help="pictures that `encode` made, instead of the recipe's task")
    add("--pipeline", help="folder or Hub id of the pipeline whose transformer learns from --data")

    add = command("encode", _encode, "encode a folder of pictures and captions for training")
    add("images", type=_path, help="pictures, each with a text file of the same name")
    add("--pipeline", required=True, help="folder or Hub id of a Stable Diffusion 3 pipeline")
    add("--out", type=_path, required=True, help="folder to fill, or to go on in")
    add("--size", type=_positive, default=1024, help="side of the pictures in pixels")
    add("--device", default="cpu", help="where the encoders run, such as cuda")

    add = command("train-base", _train_base, "train a demo task's backbone and its judge")
    add("--recipe", type=_path, help="such as recipes/scenes-base.toml; the digits' by default")
    add("--out", type=_path, required=True, help="folder for weights and record")
    add("--threads", type=_positive, default=1, help="threads; results depend on it")
    add("--device", default="cpu", help="where it is trained, such as cuda")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")


def _add_benchmark(command: Callable[..., Any]) -> None:
    add = command("benchmark", _benchmark, "time a dense transformer against its pruned selves")
    add("model", help="such as sd35-medium, flux-dev, sd3-small; a wrong name lists all")
    add("--keep", type=float, nargs="*", default=[0.8, 0.6, 0.4], help="mean share of tokens kept")
    add("--adapter", help="folder or Hub id, timed with its schedule; else equal ratios")
    add("--size", type=_size, metavar="WxH", help="pixels, such as 1024 or 832x480")
    add("--text-tokens", type=_positive, help="those of the model's pipelines by default")
    add("--batch", type=_positive, default=1, help="samples per forward")
    add("--steps", type=_positive, default=28, help="steps of a sampling")
    add(
        "--forwards",
        type=_positive,
        help="forwards timed together; by default what the schedules need",
    )
    add("--multiple", type=_positive, help="tokens kept are a multiple of this")
    add("--segments", type=_positive, help="at most so many different rows of a schedule")
    add("--select-every", type=_positive, help="so many blocks in a row share their scores")
    add("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    add("--mode", choices=["eager", "compiled", "graphs"], default="compiled", help="of all arms")
    add(
        "--scaling", type=_positive, nargs="+", metavar="SIDE", help="time several sizes, in pixels"
    )
    add("--train", choices=["full", "lora"], help="time training steps, which tune these weights")
    add(
        "--beside",
        choices=["compile", "int8", "mag_cache"],
        help="time every arm without and with this (int8: pip install torchao)",
    )
    add("--repeats", type=_positive, default=15, help="rounds; each times every arm once")
    add("--device", default="cpu", help="such as cuda")
    add("--threads", type=_positive, help="threads on a CPU; all cores by default")
    add("--out", type=_path, default=Path("runs"), help="folder for the record")


def _path(text: str) -> Path:
    from shiva_dit.config import usable_path

    try:
        return usable_path("path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _size(text: str) -> tuple[int, int]:
    sides = [_positive(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"expected one side or WIDTHxHEIGHT, got {text!r}")
    return sides[0], sides[-1]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _use_threads(count: int | None) -> None:
    import torch

    if count is not None:
        torch.set_num_threads(_bounded("--threads", count))


def _bounded(what: str, count: int) -> int:
    """A number of threads or workers.

    Raises:
        ValueError: If it is far more than this machine has cores for.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    most = MOST_PER_CORE * cores
    if count > most:
        raise ValueError(
            f"{what} must be at most {most}, {MOST_PER_CORE} for each of the {cores} cores that "
            f"this process may use; got {count}."
        )
    return count


def _quickstart(options: argparse.Namespace) -> int:
    from shiva_dit.experiments.quickstart import run_quickstart

    print(
        run_quickstart(
            keep_ratio=options.keep,
            seeds=range(options.seed, options.seed + options.seeds),
            all_controls=options.all_controls,
            count=options.count,
            workers=_bounded("--workers", options.workers),
            out=options.out,
            overrides=options.overrides,
        )
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    _use_threads(options.threads)
    from shiva_dit.config import load_recipe
    from shiva_dit.demo.base import usable_device
    from shiva_dit.ownership import check_folder
    from shiva_dit.training.interrupt import TrainingInterrupted
    from shiva_dit.training.recipe import TrainConfig
    from shiva_dit.training.run import train

    recipe = load_recipe(TrainConfig, options.recipe, options.overrides)
    words = [_program(), "train", str(options.recipe), *options.overrides, "--resume"]
    if options.threads is not None:
        words += ["--threads", str(options.threads)]
    words += ["--device", options.device] if options.device != "cpu" else []
    words += ["--base", str(options.base)] if options.base is not None else []
    words += ["--data", str(options.data)] if options.data is not None else []
    words += ["--pipeline", options.pipeline] if options.pipeline is not None else []
    again = shlex.join(words)
    if (options.data is None) != (options.pipeline is None):
        raise ValueError("--data and --pipeline go together: pictures, and what learns from them.")
    device = usable_device(options.device)
    check_folder(recipe.out)
    made = _demo(recipe.task, options.base) if options.data is None else _own(options)
    model, data, scheduler = made
    model.to(device)
    try:
        print(train(recipe, model, data, resume=options.resume, scheduler=scheduler))
    except TrainingInterrupted as stop:
        print(f"\nInterrupted; saved in {stop.checkpoint}. Go on with:\n  {again}", file=sys.stderr)
        return 128 + stop.number
    return 0


def _demo(name: str | None, base: Path | None) -> tuple[Any, Any, Any]:
    """A demo task's backbone, data and scheduler."""
    from shiva_dit.demo.base import ASSETS, load_backbone
    from shiva_dit.demo.tasks import load_task

    if name is None:
        raise ValueError("the recipe names no task: set task=..., or give --data and --pipeline.")
    task = load_task(name)
    return load_backbone(task, base or ASSETS), task, task.scheduler()


def _own(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """A pipeline's transformer, data that `encode` made, and how the pipeline takes its steps."""
    from diffusers import AutoModel

    from shiva_dit.models.sampling import Sampler
    from shiva_dit.training.folder import FolderData

    data = FolderData(options.data)
    model = _loaded(options.pipeline, AutoModel.from_pretrained, subfolder="transformer")
    return model, data, _loaded(options.pipeline, Sampler.saved)


def _loaded(source: str, load: Callable[..., Any], **arguments: Any) -> Any:
    """What a library loads from a folder or the Hub; what it raises on a damaged one, translated.

    Raises:
        ValueError: If it can't be loaded; names the source.
    """
    from safetensors import SafetensorError

    try:
        return load(source, **arguments)
    except (SafetensorError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        if _is_torchs_memory_error(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source} is no whole pipeline, it can't be loaded ({reason})") from error


def _encode(options: argparse.Namespace) -> int:
    from diffusers import DiffusionPipeline

    from shiva_dit.demo.base import usable_device
    from shiva_dit.ownership import check_folder
    from shiva_dit.training.folder import encode_folder

    device = usable_device(options.device)
    check_folder(options.out)
    pipe = _loaded(options.pipeline, DiffusionPipeline.from_pretrained, transformer=None)
    pipe.to(device)
    print(encode_folder(pipe, options.images, options.out, size=options.size))
    return 0


def _train_base(options: argparse.Namespace) -> int:
    _use_threads(options.threads)
    from shiva_dit.config import from_dict, load_recipe, with_overrides
    from shiva_dit.demo.base import BaseTraining, train_base
    from shiva_dit.demo.tasks import load_task

    if options.recipe is None:
        config = from_dict(BaseTraining, with_overrides({}, options.overrides))
    else:
        config = load_recipe(BaseTraining, options.recipe, options.overrides)
    record = train_base(load_task(config.task), config, options.out, options.device)
    print(
        f"{options.out}: judge right on {record['judge_accuracy_on_held_out']['all']:.1%} of "
        "unseen reals"
    )
    return 0


def _compare(options: argparse.Namespace) -> int:
    from shiva_dit.config import load_recipe
    from shiva_dit.experiments.compare import Comparison, run_comparison
    from shiva_dit.report import comparison_rows, plain_rows

    comparison = load_recipe(Comparison, options.recipe, options.overrides)
    out = options.out or Path("runs") / comparison.what
    record = run_comparison(
        comparison,
        out,
        workers=_bounded("--workers", options.workers),
        retry_failed=options.retry_failed,
    )
    print(f"\n{plain_rows(comparison_rows(record))}\n\nRecord: {out / 'record.json'}")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from shiva_dit.experiments.merging import merge_records
    from shiva_dit.ownership import check_folder
    from shiva_dit.provenance import read_as, read_json, write_json
    from shiva_dit.report import comparison_rows, plain_rows

    if options.out.exists():
        raise ValueError(f"{options.out} is there already: write another file.")
    check_folder(options.out.parent)
    records = [read_json(path) for path in options.records]
    with read_as("records of comparisons", *options.records):
        merged = merge_records(records)
    write_json(options.out, merged)
    print(f"{plain_rows(comparison_rows(merged))}\n\nRecord: {options.out}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from shiva_dit.ownership import check_folder

    out = options.out or Path("runs") / options.what
    check_folder(out)
    if options.what == "synthetic":
        from shiva_dit.experiments.synthetic import run_synthetic

        print(run_synthetic(out))
        return 0
    if options.what == "captions":
        from shiva_dit.experiments.caption_swap import run_caption_swap

        print(run_caption_swap(options.task, options.adapter, out))
        return 0
    from shiva_dit.config import from_dict, with_overrides
    from shiva_dit.experiments.flips import run_flips
    from shiva_dit.inspection import FlipConfig

    config = from_dict(FlipConfig, with_overrides({}, options.overrides))
    print(run_flips(options.task, options.adapter, options.random, config, out))
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    _use_threads(options.threads)
    from shiva_dit.benchmark.config import BenchmarkConfig
    from shiva_dit.benchmark.pairs import run_pair
    from shiva_dit.benchmark.records import check_record_place, save_record
    from shiva_dit.benchmark.run import run_benchmark, run_scaling
    from shiva_dit.benchmark.steps import run_step_benchmark
    from shiva_dit.benchmark.tables import timing_note, timing_rows
    from shiva_dit.benchmark.timing import keep_memory
    from shiva_dit.demo.base import usable_device
    from shiva_dit.report import plain_rows

    usable_device(options.device)
    memory_kept = keep_memory()
    config = BenchmarkConfig(
        model=options.model,
        keep=tuple(options.keep),
        adapter=options.adapter,
        size=options.size,
        text_tokens=options.text_tokens,
        batch=options.batch,
        steps=options.steps,
        forwards=options.forwards,
        multiple=options.multiple,
        segments=options.segments,
        select_every=options.select_every,
        dtype=options.dtype,
        mode="eager" if options.train else options.mode,
        train=options.train,
        beside=options.beside,
        repeats=options.repeats,
        device=options.device,
    )
    if options.scaling and (config.train or config.beside):
        raise ValueError("--scaling, --train and --beside: one of them at a time.")
    check_record_place(config, options.scaling or (), options.out)
    if options.scaling:
        record = run_scaling(config, options.scaling)
    elif config.train:
        record = run_step_benchmark(config)
    else:
        record = run_pair(config) if config.beside else run_benchmark(config)
    path = save_record({**record, "memory_kept": memory_kept}, options.out)
    print(f"{plain_rows(timing_rows(record))}\n\n{timing_note(record)}\n\nRecord: {path}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    del options
    from shiva_dit.doctor import diagnosis

    text, is_whole = diagnosis()
    print(text)
    return 0 if is_whole else 1


def _report(options: argparse.Namespace) -> int:
    from shiva_dit.experiments.plots import draw_plots
    from shiva_dit.report import write_tables

    for document in options.documents:
        plots = draw_plots(write_tables(document), document.parent)
        print(f"{document}: tables and {len(plots)} plots are up to date")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
