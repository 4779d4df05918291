"""Options of commands that run a pipeline, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from shiva_dit.cli.options import positive, size

SERVED = ("adapter", "transformer_2", "keep_ratio", "multiple", "segments", "select_every")
CALL = ("steps", "sampler", "guidance")
DTYPES = ("float32", "bfloat16", "float16")


def add_sampling(add: Callable[..., Any]) -> None:
    """How an adapter is served, and how the pipeline samples."""
    add("--transformer-2", metavar="ADAPTER", help="that of a second transformer")
    add("--keep", type=float, dest="keep_ratio", help="share of tokens kept; the adapter's own")
    add("--multiple", type=positive, help="tokens kept are a multiple of this")
    add("--segments", type=positive, help="at most so many different rows of a schedule")
    add("--select-every", type=positive, help="so many blocks in a row share their scores")
    add("--steps", type=positive, default=28, help="sampler steps")
    add("--sampler", default="euler_diffusers", help="euler, unipc or dpmpp; the pipeline's own")
    add("--guidance", type=float, help="guidance scale; the pipeline's own by default")
    add("--size", type=size, metavar="WxH", help="pixels, such as 1024 or 832x480")
    add("--batch", type=positive, default=1, help="pictures per call")
    add("--dtype", help=f"{', '.join(DTYPES)}; as saved by default")
    add("--device", default="cpu", help="such as cuda")
    add("--threads", type=positive, help="threads; all cores by default")
    add("overrides", nargs="*", default=[], metavar="key=value", help="more arguments of the call")


def generation_of(
    options: argparse.Namespace, served: Iterable[str] = (), call: Iterable[str] = ()
) -> Any:
    """The `Generation` that the options ask for.

    Args:
        options: Parsed.
        served: Options of how the model is served, beside those of `add_sampling`.
        call: Of how it samples.

    Raises:
        ValueError: If they make no sense.
    """
    from shiva_dit.config import from_dict, with_overrides
    from shiva_dit.pictures.generate import Generation

    asked: dict[str, Any] = {name: getattr(options, name) for name in (*CALL, *call)}
    asked["served"] = {name: getattr(options, name) for name in (*SERVED, *served)}
    asked["size"] = None if options.size is None else options.size[::-1]
    asked["call"] = with_overrides({}, options.overrides)
    generation: Any = from_dict(Generation, asked)
    generation.served.adapters()  # what is wrong with them is said before a pipeline is loaded
    return generation


def pipeline_of(options: argparse.Namespace) -> Any:
    """The pipeline of the options, in their dtype.

    Raises:
        ValueError: If it can't be loaded, or there is no such dtype.
    """
    import torch
    from diffusers import DiffusionPipeline

    from shiva_dit.cli.training import loaded

    given = {}
    if options.dtype is not None:
        if options.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"--dtype must be one of {known}, got {options.dtype!r}.")
        given["torch_dtype"] = getattr(torch, options.dtype)
    return loaded(options.pipeline, DiffusionPipeline.from_pretrained, **given)
