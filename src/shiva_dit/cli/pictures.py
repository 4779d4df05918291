"""Pictures, and what they are worth."""

from __future__ import annotations

import argparse
from typing import Any

from shiva_dit.cli.options import Command, path, positive, size, use_threads

SERVED = ("keep_ratio", "multiple", "segments", "select_every", "whole_steps", "half_life")


def add_commands(command: Command) -> None:
    """Generate, evaluate."""
    add = command("generate", _generate, "make pictures of prompts by a pipeline", goes_on=True)
    add("--pipeline", required=True, help="folder or Hub id of a pipeline")
    add("--prompts", type=path, required=True, help="text, a prompt in a line, or .jsonl with ids")
    add("--out", type=path, required=True, help="folder to fill, or to go on in")
    add("--adapter", help="folder or Hub id of an adapter; none by default")
    add("--transformer-2", metavar="ADAPTER", help="that of a second transformer")
    add("--method", help="a method without training instead, such as tomesd")
    add("--keep", type=float, dest="keep_ratio", help="share of tokens kept; the adapter's own")
    add("--multiple", type=positive, help="tokens kept are a multiple of this")
    add("--segments", type=positive, help="at most so many different rows of a schedule")
    add("--select-every", type=positive, help="so many blocks in a row share their scores")
    add("--whole-steps", type=int, default=0, help="steps in which the whole model predicts too")
    add("--half-life", type=float, default=0.25, help="share of a run that corrections last")
    add("--seeds", type=int, nargs="+", default=[0], help="a picture of each prompt from each")
    add("--steps", type=positive, default=28, help="sampler steps")
    add("--sampler", default="euler_diffusers", help="euler, unipc or dpmpp; the pipeline's own")
    add("--guidance", type=float, help="guidance scale; the pipeline's own by default")
    add("--size", type=size, metavar="WxH", help="pixels, such as 1024 or 832x480")
    add("--batch", type=positive, default=1, help="pictures per call")
    add("--dtype", help="float32, bfloat16 or float16; as saved by default")
    add("--device", default="cpu", help="such as cuda; of several processes each has its own")
    add("--threads", type=positive, help="threads; all cores by default")
    add("overrides", nargs="*", default=[], metavar="key=value", help="more arguments of the call")


def _generate(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from diffusers import DiffusionPipeline

    from shiva_dit.cli.training import loaded
    from shiva_dit.config import from_dict, with_overrides
    from shiva_dit.demo.base import usable_device
    from shiva_dit.ownership import check_folder
    from shiva_dit.pictures.generate import Generation, generate
    from shiva_dit.pictures.processes import Process
    from shiva_dit.pictures.prompts import read_prompts

    named = ("adapter", "transformer_2", "method", *SERVED)
    served = {name: getattr(options, name) for name in named}
    plain = {name: getattr(options, name) for name in ("seeds", "steps", "sampler", "guidance")}
    call = with_overrides({}, options.overrides)
    sides = None if options.size is None else options.size[::-1]
    generation = from_dict(Generation, {**plain, "served": served, "size": sides, "call": call})
    prompts = read_prompts(options.prompts)
    process = Process.launched()
    device = usable_device(process.device(options.device))
    check_folder(options.out)
    generation.served.adapters()  # what is wrong with them is said before a pipeline is loaded
    given = {} if options.dtype is None else {"torch_dtype": dtype_of(options.dtype)}
    pipe = loaded(options.pipeline, DiffusionPipeline.from_pretrained, **given)
    missing = generate(
        pipe,
        generation,
        prompts,
        options.out,
        batch=options.batch,
        process=process,
        device=device,
    )
    if not missing:
        count = len(prompts) * len(generation.seeds)
        print(f"{options.out}: {count} pictures")
    return 0


def dtype_of(name: str) -> Any:
    """The dtype of a name."""
    import torch

    known = ("float32", "bfloat16", "float16")
    if name not in known:
        raise ValueError(f"--dtype must be one of {', '.join(known)}, got {name!r}.")
    return getattr(torch, name)
