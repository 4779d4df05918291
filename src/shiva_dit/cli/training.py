"""Training: adapters, what they are trained on, and the demo tasks' backbones."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shiva_dit.cli.errors import is_torchs_memory_error
from shiva_dit.cli.options import Command, bounded, going_on, path, positive, use_threads

PRECISIONS = ("float32", "bfloat16", "float16")


def add_commands(command: Command) -> None:
    """train, encode, train-base, distil-base."""
    add = command("train", _train, "train an adapter by a recipe")
    add("recipe", type=path, help="a TOML file, such as recipes/digits.toml")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--threads", type=positive, help="threads; all cores by default, results depend on it")
    add("--device", default="cpu", help="where it is trained, such as cuda")
    add("--base", type=path, help="folder of the task's backbone; the shipped one by default")
    add("--data", type=path, help="pictures that `encode` made, instead of the recipe's task")
    add("--pipeline", help="folder or Hub id of the pipeline whose transformer learns from --data")
    add("--plan", action="store_true", help="say what memory and disk it will need, and stop")
    add("--processes", type=positive, default=1, help="with --plan: how many train together")

    add = command(
        "encode", _encode, "encode a folder of pictures and captions for training", goes_on=True
    )
    add("images", type=path, help="folder of captioned pictures, or a tar or parquet file")
    add("--pipeline", required=True, help="folder or Hub id of the pipeline")
    add("--out", type=path, required=True, help="folder to fill, or to go on in")
    add("--size", type=positive, default=1024, help="side of the pictures in pixels")
    add("--buckets", action="store_true", help="keep about the pictures' shapes, not one square")
    add("--background", default="white", help="what shows through transparency: a colour")
    add("--caption-column", help="column of tables that holds captions")
    add("--whole-captions", action="store_true", help="a file is one caption, not one a line")
    add("--repeats", action="store_true", help="a folder named 10_cats counts ten times")
    add("--skip-bad", action="store_true", help="leave out what can't be taken")
    add("--look", action="store_true", help="list all problems and the cost, and stop")
    add("--batch-size", type=positive, default=4, help="pictures encoded at once")
    add("--workers", type=positive, default=2, help="threads that read and decode pictures")
    add("--precision", choices=PRECISIONS, default="float32", help="of the encoders")
    add("--device", default="cpu", help="where the encoders run, such as cuda")

    add = command("train-base", _train_base, "train a demo task's backbone and its judge")
    add("--recipe", type=path, help="such as recipes/scenes-base.toml; the digits' by default")
    add("--out", type=path, required=True, help="folder for weights and record")
    add("--threads", type=positive, default=1, help="threads; results depend on it")
    add("--device", default="cpu", help="where it is trained, such as cuda")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")

    add = command("distil-base", _distil_base, "distil a demo backbone into a few-step one")
    add("--recipe", type=path, required=True, help="such as recipes/scenes-4steps-base.toml")
    add("--out", type=path, required=True, help="folder for weights and record")
    add("--base", type=path, help="folder of the backbone to distil; the shipped one by default")
    add("--threads", type=positive, default=1, help="threads; results depend on it")
    add("--device", default="cpu", help="where it is trained, such as cuda")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")


def _train(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.config import load_recipe
    from shiva_dit.demo.base import usable_device
    from shiva_dit.ownership import check_folder
    from shiva_dit.training.interrupt import TrainingInterrupted
    from shiva_dit.training.processes import joined, one_of_several_asked
    from shiva_dit.training.recipe import TrainConfig
    from shiva_dit.training.run import check_possible, train

    recipe = load_recipe(TrainConfig, options.recipe, options.overrides)
    words = ["train", str(options.recipe), *options.overrides, "--resume"]
    if options.threads is not None:
        words += ["--threads", str(options.threads)]
    words += ["--device", options.device] if options.device != "cpu" else []
    words += ["--base", str(options.base)] if options.base is not None else []
    words += ["--data", str(options.data)] if options.data is not None else []
    words += ["--pipeline", options.pipeline] if options.pipeline is not None else []
    again = going_on(words)
    if (options.data is None) != (options.pipeline is None):
        raise ValueError("--data and --pipeline go together: pictures, and what learns from them.")
    check_possible(recipe)
    if options.plan:
        return _plan(options, recipe)
    if options.processes != 1:
        raise ValueError(
            "--processes is for --plan: several are started by torchrun or accelerate launch."
        )
    if one_of_several_asked(os.environ):
        say = "accelerate started this process alone: for several on one machine say --multi_gpu"
        print(f"shiva-dit: {say} (on CPUs, too), or take torchrun.", file=sys.stderr)
    with joined(options.device) as (processes, own):
        device = usable_device(own)
        check_folder(recipe.out)
        made = (
            _demo(recipe, options.base)
            if options.data is None
            else _own(options, recipe.expert == "low", device)
        )
        model, data, scheduler = made
        given = {"resume": options.resume, "scheduler": scheduler, "device": device}
        try:
            folder = train(recipe, model, data, processes=processes, **given)
        except TrainingInterrupted as stop:
            if processes.is_first:
                print(f"\nInterrupted; saved in {stop.checkpoint}. {again}", file=sys.stderr)
            return 128 + stop.number
        if processes.is_first:
            print(folder)
    return 0


def _plan(options: argparse.Namespace, recipe: Any) -> int:
    """Say what a run will need; a pipeline's weights are not loaded."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )

    from shiva_dit.training.experts import share_of
    from shiva_dit.training.memory import Shapes, needs, shapes_of
    from shiva_dit.training.memory_told import told
    from shiva_dit.training.processes import check_parts

    check_parts(options.processes, recipe.micro_batches, shard=recipe.shard)
    if options.data is None:
        shapes = shapes_of(*_demo(recipe, options.base))
    else:
        import diffusers

        from shiva_dit.models.sampling import Sampler
        from shiva_dit.training.folder import FolderData
        from shiva_dit.training.pictures.encoders import saved_config

        data = FolderData(options.data)
        data.check_pipeline(options.pipeline)
        second = recipe.expert == "low"
        part = "transformer_2" if second else "transformer"
        found = loaded(options.pipeline, saved_config, part=part)
        cls = getattr(diffusers, str(found.get("_class_name")), None)
        if cls is None:
            raise ValueError(f"{options.pipeline} has no {part} that diffusers knows.")
        scheduler = loaded(options.pipeline, Sampler.saved, second=second)
        share_of(recipe.expert, scheduler)
        config = {name: value for name, value in found.items() if not name.startswith("_")}
        shapes = Shapes.of(cls, config, data, scheduler)
    try:
        found = needs(recipe, shapes, processes=options.processes)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        name = shapes.model_class.__name__
        raise ValueError(f"{name} looks at values: what it needs can't be counted.") from error
    print(told(found, options.processes))
    return 0


def _demo(recipe: Any, base: Path | None) -> tuple[Any, Any, Any]:
    """A demo task's backbone, data and sampler."""
    from shiva_dit.demo.base import ASSETS, load_backbone
    from shiva_dit.demo.tasks import load_task

    if recipe.task is None:
        raise ValueError("the recipe names no task: set task=..., or give --data and --pipeline.")
    task = load_task(recipe.task)
    return load_backbone(task, base or ASSETS), task, task.sampler(recipe.num_steps)


def _own(options: argparse.Namespace, second: bool, device: Any) -> tuple[Any, Any, Any]:
    """A pipeline's transformer, encoded data, and how the pipeline takes its steps."""
    from diffusers import AutoModel

    from shiva_dit.models.sampling import Sampler
    from shiva_dit.training.folder import FolderData
    from shiva_dit.training.pictures.decoder import Decoder

    data = FolderData(options.data, pinned=device.type == "cuda")
    changed = data.changed_since()
    if changed is not None:
        print(f"shiva-dit: {changed}", file=sys.stderr)
    data.check_pipeline(options.pipeline)
    data.decoder = lambda: loaded(options.pipeline, Decoder.saved, device=device)
    sampler = loaded(options.pipeline, Sampler.saved, second=second)
    part = "transformer_2" if second else "transformer"
    return loaded(options.pipeline, AutoModel.from_pretrained, subfolder=part), data, sampler


def loaded(source: str, load: Callable[..., Any], **arguments: Any) -> Any:
    """What a library loads from a folder or the Hub; what it raises on a damaged one, translated.

    Raises:
        ValueError: If it isn't there, or can't be loaded; names the source.
    """
    from safetensors import SafetensorError

    is_path = Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise ValueError(f"there is no folder {source} of a pipeline: check the path.")
    try:
        return load(source, **arguments)
    except (SafetensorError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        if is_torchs_memory_error(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source} is no whole pipeline, it can't be loaded ({reason})") from error


def _encode(options: argparse.Namespace) -> int:
    import torch

    from shiva_dit.demo.base import usable_device
    from shiva_dit.ownership import check_folder
    from shiva_dit.training.folder import BadPicturesError, Encoding, Facts, encode

    how = Encoding(
        size=options.size,
        buckets=options.buckets,
        background=options.background,
        caption_column=options.caption_column,
        whole_captions=options.whole_captions,
        repeats=options.repeats,
        skip_bad=options.skip_bad,
        batch_size=options.batch_size,
        workers=bounded("--workers", options.workers),
    )
    device, dtype = usable_device(options.device), getattr(torch, options.precision)
    check_folder(options.out)
    facts = loaded(options.pipeline, Facts.saved, dtype=dtype)

    def load() -> Any:
        from diffusers import DiffusionPipeline

        index: Any = DiffusionPipeline.load_config(options.pipeline)
        without = {name: None for name in index if name.startswith("transformer")}
        pipe = loaded(options.pipeline, DiffusionPipeline.from_pretrained, dtype=dtype, **without)
        return pipe.to(device)

    try:
        made = encode(facts, load, options.images, options.out, how, only_look=options.look)
        if not options.look:
            print(made)
    except BadPicturesError as error:
        for line in error.lines():
            print(line, file=sys.stderr)
        print(f"shiva-dit: {error.said}", file=sys.stderr)
        return 2
    return 0


def _train_base(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.config import from_dict, load_recipe, with_overrides
    from shiva_dit.demo.tasks import load_task
    from shiva_dit.demo.train_base import BaseTraining, train_base
    from shiva_dit.training.interrupt import TrainingInterrupted

    if options.recipe is None:
        config = from_dict(BaseTraining, with_overrides({}, options.overrides))
    else:
        config = load_recipe(BaseTraining, options.recipe, options.overrides)
    try:
        record = train_base(
            load_task(config.task), config, options.out, options.device, resume=options.resume
        )
    except TrainingInterrupted as stop:
        return _interrupted(stop, "train-base", options)
    print(
        f"{options.out}: judge right on {record['judge_accuracy_on_held_out']['all']:.1%} of "
        "unseen reals"
    )
    return 0


def _distil_base(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.config import load_recipe
    from shiva_dit.demo.base import ASSETS
    from shiva_dit.demo.distil import Distillation
    from shiva_dit.demo.tasks import load_task
    from shiva_dit.experiments.few_steps import distil_base
    from shiva_dit.training.interrupt import TrainingInterrupted

    config = load_recipe(Distillation, options.recipe, options.overrides)
    try:
        record = distil_base(
            load_task(config.task),
            config,
            options.out,
            base=options.base or ASSETS,
            device=options.device,
            resume=options.resume,
        )
    except TrainingInterrupted as stop:
        return _interrupted(stop, "distil-base", options)
    for name, row in record["held_out"]["rows"].items():
        print(
            f"{name}: {row['forwards']} forwards, {row['psnr']:.2f} dB, right on "
            f"{row['right']['all']:.1%}"
        )
    return 0


def _interrupted(stop: Any, command: str, options: argparse.Namespace) -> int:
    """Say how to go on with a backbone's training; the exit status."""
    words = [command, "--out", str(options.out), *options.overrides, "--resume"]
    words += ["--recipe", str(options.recipe)] if options.recipe is not None else []
    base = getattr(options, "base", None)
    words += ["--base", str(base)] if base is not None else []
    words += ["--threads", str(options.threads)] if options.threads != 1 else []
    words += ["--device", options.device] if options.device != "cpu" else []
    print(f"\nInterrupted; saved in {stop.checkpoint}. {going_on(words)}", file=sys.stderr)
    return 128 + stop.number
