"""The plugin of vLLM-Omni, entry point `vllm_omni.general_plugins`; it imports nothing by itself.

vLLM-Omni calls `register` in each of its processes before a model is loaded. The class that it
offers, `ShivaDiffusersPipeline`, is made when the engine asks this module for it: it is one of
the engine's own wrappers of diffusers' pipelines.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

logger = logging.getLogger("shiva_dit")

SERVED = SpecifierSet(">=0.30,<0.31")
"""Versions of vLLM-Omni that this was written against."""
NAME = "ShivaDiffusersPipeline"
"""What `--model-class-name` names."""
KEY = "shiva_dit"
"""Where the engine's `custom_pipeline_args` say what is applied."""


def register() -> None:
    """Offer the pipeline class `ShivaDiffusersPipeline` to vLLM-Omni.

    Where a version isn't served, one line of the log says so, and nothing is offered.
    """
    missing = unserved(version("vllm-omni"), version("diffusers"))
    if missing is not None:
        logger.warning(missing)
        return
    registry = import_module("vllm_omni.diffusion.registry")  # the engine's own, heavy by itself
    registry.register_diffusion_model(NAME, __name__, NAME)


def unserved(engine: str, diffusers: str) -> str | None:
    """Why nothing can be attached, in one line; None if it can.

    Args:
        engine: Version of vLLM-Omni.
        diffusers: Version of diffusers, which vLLM-Omni pins.
    """
    needed = next(
        requirement.specifier
        for requirement in map(Requirement, requires("shiva-dit") or [])
        if requirement.name == "diffusers"
    )
    if not SERVED.contains(engine, prereleases=True):
        return (
            f"shiva_dit: nothing is attached: vLLM-Omni {SERVED} is served, and {engine} is "
            f"installed: install one of these, or a shiva-dit that serves {engine}."
        )
    if not needed.contains(diffusers, prereleases=True):
        return (
            f"shiva_dit: nothing is attached: diffusers {needed} is needed, and {diffusers} is "
            f"installed, which vLLM-Omni {engine} pins: install a diffusers of these over it."
        )
    return None


def asked_of(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of `apply` that the engine was started with.

    Raises:
        ValueError: One line that says what is wrong.
    """
    from shiva_dit.api.apply import apply  # noqa: PLC0415 - imports torch

    asked = (arguments or {}).get(KEY)
    known = [name for name in inspect.signature(apply).parameters if name != "target"]
    if not isinstance(asked, dict) or not isinstance(asked.get("adapter"), str):
        raise ValueError(
            f'custom_pipeline_args must hold "{KEY}", such as '
            f'{{"{KEY}": {{"adapter": "FOLDER"}}}}; got {arguments!r}.'
        )
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise ValueError(f"apply has no {', '.join(unknown)}; it takes {', '.join(known)}.")
    return dict(asked)


@cache
def pipeline_class() -> type:
    """The class that is offered, for an engine that is installed."""
    from shiva_dit.api.apply import apply  # noqa: PLC0415 - imports torch

    base: Any = import_module("vllm_omni.diffusion.models.diffusers_adapter")
    place: Any = import_module("vllm_omni.diffusion.distributed.utils")

    class ShivaDiffusersPipeline(base.DiffusersAdapterPipeline):
        """Any pipeline of diffusers with a supported transformer, with an adapter on it.

        Args:
            od_config: The engine's; `custom_pipeline_args["shiva_dit"]` are arguments of `apply`.
            device: Where the pipeline goes; the process's own by default.

        Raises:
            ValueError: If these aren't arguments of `apply`; nothing has been loaded then.
        """

        def __init__(self, *, od_config: Any, device: Any = None) -> None:
            asked = asked_of(od_config.custom_pipeline_args)
            super().__init__(od_config=od_config, device=device or place.get_local_device())
            self._asked = asked

        def load_weights(self, weights: Iterable[Any] = ()) -> None:
            """Load the pipeline, and put the adapter on; the engine brings no weights itself.

            Raises:
                ValueError: As `apply`.
            """
            del weights
            super().load_weights()
            apply(self._pipeline, **self._asked)

    return ShivaDiffusersPipeline


def __getattr__(name: str) -> Any:
    if name == NAME:
        return pipeline_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
