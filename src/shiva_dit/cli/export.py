"""Forwards as files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shiva_dit.cli.options import Command, path, positive, size, use_threads


def add_commands(command: Command) -> None:
    """Export."""
    add = command("export", _export, "write a pruned model's forwards as programs of torch's own")
    add("--pipeline", required=True, help="folder or Hub id of a pipeline")
    add("--adapter", required=True, help="folder or Hub id of an adapter")
    add("--transformer-2", metavar="ADAPTER", help="that of a second transformer")
    add("--out", type=path, required=True, help="folder to fill")
    add("--engine", choices=["export", "inductor"], default="export", help="inductor compiles")
    add("--prompt", default="", help="of the run that is watched: its length is the programs'")
    add("--keep", type=float, dest="keep_ratio", help="share of tokens kept; the adapter's own")
    add("--multiple", type=positive, help="tokens kept are a multiple of this")
    add("--segments", type=positive, help="at most so many different rows, and so programs")
    add("--select-every", type=positive, help="so many blocks in a row share their scores")
    add("--steps", type=positive, default=28, help="sampler steps")
    add("--sampler", default="euler_diffusers", help="euler, unipc or dpmpp; the pipeline's own")
    add("--guidance", type=float, help="guidance scale; the pipeline's own by default")
    add("--size", type=size, metavar="WxH", help="pixels, such as 1024 or 832x480")
    add("--batch", type=positive, default=1, help="pictures per call")
    add("--dtype", help="float32, bfloat16 or float16; as saved by default")
    add("--device", default="cpu", help="such as cuda; programs run on its kind alone")
    add("--threads", type=positive, help="threads; all cores by default")
    add("overrides", nargs="*", default=[], metavar="key=value", help="more arguments of the call")


def _export(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from diffusers import DiffusionPipeline

    from shiva_dit.cli.pictures import dtype_of
    from shiva_dit.cli.training import loaded
    from shiva_dit.config import from_dict, with_overrides
    from shiva_dit.demo.base import usable_device
    from shiva_dit.export import export_run
    from shiva_dit.ownership import check_folder
    from shiva_dit.pictures.generate import Generation, arguments
    from shiva_dit.pictures.samplers import solver

    named = ("adapter", "transformer_2", "keep_ratio", "multiple", "segments", "select_every")
    served = {name: getattr(options, name) for name in named}
    plain = {name: getattr(options, name) for name in ("steps", "sampler", "guidance")}
    call = with_overrides({}, options.overrides)
    sides = None if options.size is None else options.size[::-1]
    generation = from_dict(Generation, {**plain, "served": served, "size": sides, "call": call})
    device = usable_device(options.device)
    check_folder(options.out)
    generation.served.adapters()  # what is wrong with them is said before a pipeline is loaded
    given: dict[str, Any] = {}
    if options.dtype is not None:
        given["torch_dtype"] = dtype_of(options.dtype)
    pipe = loaded(options.pipeline, DiffusionPipeline.from_pretrained, **given)
    asked = {**arguments(pipe, generation), "output_type": "latent"}
    pipe.to(device)
    generation.served.put_on(pipe)
    pipe.scheduler = solver(pipe.scheduler, generation.sampler)
    prompt = [options.prompt] * options.batch
    done = export_run(
        pipe, lambda: pipe(prompt=prompt, **asked), options.out, engine=options.engine
    )
    for each in done:
        kept = f"{min(each.counts)} to {max(each.counts)} tokens a block"
        print(f"{Path(options.out, each.file)}: {each.calls} calls, {kept}, {each.off_by:.0e} off")
    return 0
