"""Adapters put together, and made ready for others."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from shiva_dit.cli.options import Command, path, positive


def add_commands(command: Command) -> None:
    """Join and publish."""
    add = command("join", _join, "one folder of adapters that belong together")
    about = "runs or folders: of a model at several keep ratios, the usual first; or Wan 2.2's two"
    add("adapters", nargs="+", type=path, metavar="adapter", help=about)
    add("--out", type=path, required=True, help="folder to fill, or to renew")

    add = command("publish", _publish, "make a run's adapter ready for the Hub, with a model card")
    add("folder", metavar="run", type=path, help="folder of a run, or of an adapter")
    add("--out", type=path, required=True, help="folder to fill, or to renew")
    add("--prompts", type=path, help="named by the card; text, a prompt in a line, or .jsonl")
    add("--pipeline", help="folder or Hub id of the pipeline that makes pictures of the prompts")
    add("--steps", type=positive, help="its sampler steps; 28 by default")
    add("--guidance", type=float, help="its guidance scale; its own by default")
    add("--device", default="cpu", help="where it runs, such as cuda")
    add("--license", help="of the adapter, as the Hub names it, such as apache-2.0")
    add("--base-model", help="Hub id of the model that it is for; the one it was trained on")
    add("--push", metavar="USER/NAME", help="upload it to this repository of the Hub")
    add("--private", action="store_true", help="the repository, where it is made, is private")


def _join(options: argparse.Namespace) -> int:
    from shiva_dit.adapter import ShivaAdapter
    from shiva_dit.pictures.publish import adapter_of

    folders = [adapter_of(folder) for folder in options.adapters]
    if options.out.resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"{options.out} is one of them itself: take another folder.")
    given = [ShivaAdapter.from_pretrained(folder) for folder in folders]
    experts = {one.trained_expert[0]: one for one in given if one.trained_expert is not None}
    if len(given) == len(experts) == 2:
        made = ShivaAdapter.of_experts(experts["high"], experts["low"])
    else:
        made = ShivaAdapter.of_budgets(*given)
    made.save_pretrained(options.out)
    print(options.out)
    return 0


def _publish(options: argparse.Namespace) -> int:
    from shiva_dit.pictures.prompts import read_prompts
    from shiva_dit.pictures.publish import check_repository, publish, upload

    if options.push is not None:
        check_repository(options.push, "--push")
    if options.base_model is not None:
        check_repository(options.base_model, "--base-model")
    prompts = () if options.prompts is None else read_prompts(options.prompts)
    if options.pipeline is not None and not prompts:
        raise ValueError("--pipeline makes pictures of prompts: name a file by --prompts.")
    for name in ("steps", "guidance"):
        if options.pipeline is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for pictures: name what makes them by --pipeline.")
    if options.private and options.push is None:
        raise ValueError("--private is for a repository of the Hub: name it by --push.")
    folder = publish(
        options.folder,
        options.out,
        license=options.license,
        base_model=options.base_model,
        repository=options.push,
        prompts=prompts,
        examples=None if options.pipeline is None else _examples(options),
        device=options.device,
    )
    print(folder)
    if options.license is None:
        print("shiva-dit: the card names no licence: choose one by --license.", file=sys.stderr)
    if options.push is not None:
        print(upload(folder, options.push, private=options.private))
    return 0


def _examples(options: argparse.Namespace) -> tuple[Any, Any]:
    """A pipeline, and how it makes pictures for a card."""
    from diffusers import DiffusionPipeline

    from shiva_dit.cli.training import loaded
    from shiva_dit.demo.base import usable_device
    from shiva_dit.pictures.generate import Generation

    usable_device(options.device)
    generation = Generation(steps=options.steps or 28, guidance=options.guidance)
    return loaded(options.pipeline, DiffusionPipeline.from_pretrained), generation
