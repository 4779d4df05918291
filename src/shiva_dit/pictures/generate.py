"""Pictures of prompts by a pipeline: resumable, dealt out, from noise that nothing else decides."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from shiva_dit.config import check_seeds, check_types, to_dict, whole_number
from shiva_dit.ownership import check_folder, locked_folder
from shiva_dit.pictures.processes import Process
from shiva_dit.pictures.prompts import Prompt
from shiva_dit.pictures.putting import Served
from shiva_dit.pictures.samplers import Sampler, solver, steps_by
from shiva_dit.provenance import (
    data_digest,
    module_digest,
    provenance,
    read_as,
    read_json,
    write_atomically,
    write_json,
)

ABOUT, METADATA, RECORD = "generation.json", "metadata.jsonl", "record.json"
OPTIONS = {
    "prompt": "--prompts",
    "generator": "--seeds",
    "num_inference_steps": "--steps",
    "sigmas": "--sampler",
    "guidance_scale": "--guidance",
    "height": "--size",
    "width": "--size",
}
"""Arguments of pipelines, and the option that sets each."""
OURS = ("output_type", "return_dict", "latents", "num_images_per_prompt")
"""Arguments that nobody else may set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """How pictures are made; with pipeline and prompts all that decides them but rounding."""

    served: Served = field(default_factory=Served)
    """What is put on the pipeline."""
    seeds: tuple[int, ...] = (0,)
    """A picture of every prompt from each."""
    steps: int = 28
    """Sampler steps."""
    sampler: Sampler = "euler_diffusers"
    """How they are made; the pipeline's own by default."""
    guidance: float | None = None
    """Guidance scale; the pipeline's own by default."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; the pipeline's own by default."""
    call: dict = field(default_factory=dict)
    """Further arguments of the pipeline's call."""

    def __post_init__(self) -> None:
        check_types(self)
        check_seeds(self.seeds)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {self.seeds}.")
        whole_number("steps", self.steps, least=1)
        for side in self.size or ():
            whole_number("size", side, least=1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One picture of a run."""

    prompt: Prompt
    seed: int

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"{self.prompt.id}-{self.seed}.png"

    def generator(self) -> torch.Generator:
        """Draws its noise on the CPU, by prompt id and seed alone."""
        said = json.dumps([self.prompt.id, self.seed]).encode()
        number = int.from_bytes(hashlib.sha256(said).digest()[:8], "little")
        return torch.Generator().manual_seed(number & (2**63 - 1))


def generate(
    pipe: Any,
    generation: Generation,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    batch: int = 1,
    process: Process | None = None,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> int:
    """Make what isn't there yet of the pictures, or this process's share of them.

    Args:
        pipe: A pipeline as it was loaded, with nothing on it; stays with what is put on.
        generation: How.
        prompts: Of what.
        out: Folder for a PNG per prompt and seed, `metadata.jsonl`, `generation.json` with what
            decides the pictures, and `record.json` as soon as all are there.
        batch: Pictures per call; may differ where a run goes on, as may device and processes.
        process: Which share; all by default.
        device: Where.
        show_progress: Whether a bar counts pictures.

    Returns:
        How many pictures of all are still missing (others' shares).

    Raises:
        ValueError: If the folder holds pictures that were made otherwise, or another run is at work
            in it; if the pipeline makes no pictures of prompts, or can't take a setting.
        FloatingPointError: If a picture isn't finite.
    """
    process = process or Process()
    check_folder(out)
    call = arguments(pipe, generation)
    settings = _identity(pipe, generation, call, prompts)
    pipe.to(device)
    settings["served"] = generation.served.put_on(pipe)
    pipe.scheduler = solver(pipe.scheduler, generation.sampler)
    pipe.set_progress_bar_config(disable=True)
    wanted = [Wanted(prompt, seed) for prompt in prompts for seed in generation.seeds]
    out.mkdir(parents=True, exist_ok=True)
    with process.owning(out):
        _begin(out, settings, wanted)
        todo = [one for one in process.share(wanted) if not (out / one.file).is_file()]
        bar = tqdm(total=len(todo), desc=_name(process), unit="picture", disable=not show_progress)
        with bar, torch.no_grad():
            for start in range(0, len(todo), batch):
                some = todo[start : start + batch]
                for one, image in zip(some, _pictures(pipe, some, call), strict=True):
                    write_atomically(out / one.file, lambda p, i=image: i.save(p, format="PNG"))
                    bar.update()
        missing = sum(not (out / one.file).is_file() for one in wanted)
        if not missing:
            _end(out, settings, len(wanted), batch, process, device)
    return missing


def arguments(pipe: Any, generation: Generation) -> dict[str, Any]:
    """What the pipeline is called with beside prompts and noise.

    Raises:
        ValueError: If it can't take one of them.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    name = type(pipe).__name__
    if "prompt" not in taken or "generator" not in taken:
        raise ValueError(f"{name} makes no pictures of prompts: take a text-to-image pipeline.")
    call: dict[str, Any] = {**steps_by(generation.sampler, generation.steps), "output_type": "pt"}
    if generation.guidance is not None:
        call["guidance_scale"] = generation.guidance
    if generation.size is not None:
        call["height"], call["width"] = generation.size
    for key in generation.call:
        if key in OPTIONS or key in OURS:
            option = f"use {OPTIONS[key]}" if key in OPTIONS else "leave it out"
            raise ValueError(f"{key} can't be set by {key}=...: {option}.")
    call |= generation.call
    for key in call:
        if key not in taken:
            near = difflib.get_close_matches(key, taken, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out."
            raise ValueError(f"{name} takes no {OPTIONS.get(key, key)} ({key}): {hint}")
    return call


def _identity(
    pipe: Any, generation: Generation, call: Mapping[str, Any], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """All that decides the pictures, as it will stand in a file, but for what is put on."""
    parts = {
        name: {"sha256": module_digest(part), "dtype": str(getattr(part, "dtype", None))}
        for name, part in sorted(pipe.components.items())
        if isinstance(part, nn.Module)
    }
    given = inspect.signature(type(pipe).__call__).parameters
    own = given["guidance_scale"].default if "guidance_scale" in given else None
    made: dict[str, Any] = {
        **to_dict(generation),
        "call": {key: value for key, value in call.items() if key != "sigmas"},
        "guidance": call.get("guidance_scale", own),
        "pipeline": {"class": type(pipe).__name__, "parts": parts},
        "scheduler": [type(pipe.scheduler).__name__, data_digest(_plain(pipe.scheduler.config))],
        "prompts": data_digest([[prompt.id, prompt.text] for prompt in prompts]),
    }
    return made


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(dict(value), default=str, sort_keys=True).replace("NaN", "null"))


def _begin(out: Path, settings: dict[str, Any], wanted: Sequence[Wanted]) -> None:
    """Write what decides the pictures, or check it against what is there."""
    path = out / ABOUT
    ours = json.loads(json.dumps(settings))
    with locked_folder(out):
        if not path.is_file():
            strange = next((one.file for one in wanted if (out / one.file).exists()), None)
            if strange is not None:
                raise ValueError(
                    f"{out} holds a {strange}, and no {ABOUT} that says how it was made: take an "
                    "empty folder."
                )
            write_metadata(out, wanted)
            write_json(path, {"settings": ours, "provenance": provenance()})
            return
        with read_as("settings of generated pictures", path):
            then = read_json(path)["settings"]
            changed = sorted(k for k in {*ours, *then} if then.get(k) != ours.get(k))
        if changed:
            raise ValueError(
                f"{out} holds pictures that were made otherwise (what differs: "
                f"{', '.join(changed)}): go on with the same settings, or take another folder."
            )


def write_metadata(out: Path, wanted: Sequence[Wanted]) -> None:
    """A line per picture, whether it is there yet or not."""
    rows = [
        {"file_name": one.file, "id": one.prompt.id, "prompt": one.prompt.text, "seed": one.seed}
        for one in wanted
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out / METADATA, lambda path: path.write_text(text, encoding="utf-8"))


def _pictures(pipe: Any, some: Sequence[Wanted], call: Mapping[str, Any]) -> list[Image.Image]:
    """One call of the pipeline."""
    made = pipe(
        prompt=[one.prompt.text for one in some],
        generator=[one.generator() for one in some],
        **call,
    )
    images: Float[Tensor, "B C H W"] | None = getattr(made, "images", None)
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != len(some):
        raise ValueError(
            f"{type(pipe).__name__} doesn't give a picture for each prompt: take a text-to-image "
            "pipeline."
        )
    values = images.float().cpu()
    broken = [one.prompt.id for one, v in zip(some, values, strict=True) if not v.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"the pictures of {', '.join(broken)} hold values that are not finite: take another "
            "dtype (--dtype float32), or other settings."
        )
    return [image_of(value) for value in values]


def image_of(values: Float[Tensor, "C H W"]) -> Image.Image:
    """A picture of values in [0, 1]."""
    pixels = (255 * values.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.squeeze(-1).numpy())


def _end(
    out: Path,
    settings: dict[str, Any],
    count: int,
    batch: int,
    process: Process,
    device: torch.device | str,
) -> None:
    """Say that all is there, once."""
    with locked_folder(out):
        if (out / RECORD).is_file():
            return
        record = {
            "what": "generation",
            "settings": settings,
            "pictures": count,
            "batch": batch,
            "processes": process.count,
            "device": str(device),
            "provenance": provenance(),
        }
        write_json(out / RECORD, record)


def _name(process: Process) -> str:
    return "generate" if process.count == 1 else f"generate {process.rank + 1}/{process.count}"
