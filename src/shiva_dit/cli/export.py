"""Forwards as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from shiva_dit.cli.options import Command, path, use_threads
from shiva_dit.cli.sampling import add_sampling, generation_of, pipeline_of


def add_commands(command: Command) -> None:
    """Export."""
    add = command("export", _export, "write a pruned model's forwards as programs of torch's own")
    add("--pipeline", required=True, help="folder or Hub id of a pipeline")
    add("--adapter", required=True, help="folder or Hub id of an adapter")
    add("--out", type=path, required=True, help="folder to fill")
    add("--engine", choices=["export", "inductor"], default="export", help="inductor compiles")
    add("--prompt", default="", help="of the run that is watched: its length is the programs'")
    add_sampling(add)


def _export(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.demo.base import usable_device
    from shiva_dit.export import export_run
    from shiva_dit.ownership import check_folder
    from shiva_dit.pictures.generate import arguments
    from shiva_dit.pictures.samplers import solver

    generation = generation_of(options)
    device = usable_device(options.device)
    check_folder(options.out)
    pipe = pipeline_of(options)
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
