"""Programs of a run: traced, checked against the model, compiled if asked for, and written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._inductor import aoti_compile_and_package
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from shiva_dit.api.attached import all_attached
from shiva_dit.export import programs as loader
from shiva_dit.export.programs import MANIFEST, WEIGHTS, leaves
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.exporting import (
    Call,
    Calls,
    at_counts,
    calls_of,
    program_of,
    weights_of,
)
from shiva_dit.models.target import transformers_of
from shiva_dit.ownership import owned
from shiva_dit.provenance import file_digest, provenance, read_text, write_atomically, write_json

ENGINES = "export", "inductor"
TOLERANCE = 1e-5
"""How far a float32 program's prediction may lie from the model's, as a share of its norm. Programs
by torch.export were equal to the bit on a CPU, one by AOTInductor off by 2.6e-7."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What became of one program."""

    file: str
    """Its name in the folder."""
    counts: tuple[int, ...]
    """k of every block."""
    calls: int
    """How many calls of the run it is for."""
    off_by: float
    """How far its prediction lies from the model's, as a share of the norm."""


def export_program(
    target: Any, inputs: Mapping[str, Any], *, counts: Sequence[int] | None = None
) -> ExportedProgram:
    """The model's forward at one row of counts, with its weights, as torch exports it.

    For a guided call of two halves lay `shiva_dit.guided(target, "both")` around it.

    Args:
        target: A transformer with an adapter attached, or its pipeline.
        inputs: What the model is called with, by name. Tensors become the program's arguments, of
            these shapes for good; everything else a part of it.
        counts: k in [1, N] of every block; by default those of the timestep in `inputs`.

    Returns:
        A program whose prediction, a tensor, is the model's within 1e-5 (float32).

    Raises:
        ValueError: If no adapter is attached, something on the model or the call can't be exported,
            or the program gives something else than the model.
    """
    attachments = _alone_on(target)
    if len(attachments) > 1:
        raise ValueError("pass the transformer that is exported: the pipeline has two.")
    attachment = attachments[0]
    (calls,) = calls_of(attachments, lambda: attachment.model(**inputs))
    call = calls.different[0]
    if counts is not None:
        call = at_counts(attachment, call, counts)
    made = program_of(attachment, call)
    _judge(call, made.module()(**call.inputs), "export")
    return made


def export_run(
    target: Any, run: Callable[[], object], folder: str | Path, *, engine: str = "export"
) -> list[Exported]:
    """Export all that a run of a sampler calls: a program for each different row, and a manifest.

    The folder then holds the weights once, `manifest.json` with what each call of the run was, and
    `programs.py`, whose `Programs` runs them by torch and safetensors alone. Of a pipeline with two
    transformers each has a folder in it.

    Args:
        target: A pipeline or transformer with an adapter attached.
        run: Calls it over all steps, such as `lambda: pipe(prompt, num_inference_steps=8)`.
        folder: Is made; an empty one may be there.
        engine: "export": torch runs the programs' operators one by one. "inductor": AOTInductor
            compiles each program for this machine, which takes minutes for a large model.

    Returns:
        What became of each program.

    Raises:
        ValueError: If no adapter is attached, something on the model or a call can't be exported, a
            program gives something else than the model, or the folder isn't empty. It then holds
            nothing new.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    out = Path(folder)
    attachments = _alone_on(target)
    with owned(out):
        strange = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if strange:
            raise ValueError(f"{out} holds {strange[0]!r} already: export into an empty folder.")
        found = calls_of(attachments, run)
        names = ["."] if len(attachments) == 1 else ["transformer", "transformer_2"]
        done: list[Exported] = []
        written: list[Path] = []
        try:
            for attachment, calls, name in zip(attachments, found, names, strict=True):
                done += _write(attachment, calls, out / name, engine, written)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
    return done


def _alone_on(target: Any) -> list[Attachment]:
    """Attachments of all transformers of a target.

    Raises:
        ValueError: If one has none.
    """
    attachments, models = all_attached(target), transformers_of(target)
    if len(attachments) < len(models):
        raise ValueError(
            f"{len(models)} transformers and {len(attachments)} adapter: apply one to each "
            "(transformer_2=), or pass the transformer that is exported."
        )
    return attachments


def _write(
    attachment: Attachment, calls: Calls, folder: Path, engine: str, written: list[Path]
) -> list[Exported]:
    """Export one model's calls into a folder; the manifest comes last."""
    weights = weights_of(attachment)

    def write(name: str, made: Callable[[Path], object]) -> Path:
        written.append(folder / name)
        write_atomically(folder / name, made)
        return folder / name

    write(WEIGHTS, lambda path: save_file(_apart(weights), path))
    done: list[Exported] = []
    programs: list[dict[str, Any]] = []
    for place, call in enumerate(calls.different):
        program = program_of(attachment, call, weights)
        name = f"{place}.pt2"
        path = write(name, lambda path, p=program: _save(p, path, engine))
        run = loader.load_program(path, engine, next(iter(weights.values())).device)
        with torch.no_grad():
            off_by = _judge(call, run(weights, **call.inputs), engine)
        uses = sum(which == place for _, which in calls.steps)
        done.append(Exported(file=name, counts=call.counts, calls=uses, off_by=off_by))
        programs.append(
            {
                "file": name,
                "sha256": file_digest(path),
                "engine": engine,
                "counts": call.counts,
                "pass": call.which.value,
                "entry": call.layout.place,
                "inputs": {n: [str(v.dtype), list(v.shape)] for n, v in leaves(call.inputs)},
                "off_by": off_by,
            }
        )
    source = read_text(Path(loader.__file__))
    write("programs.py", lambda path: path.write_text(source, encoding="utf-8"))
    manifest = {
        "what": "exported run",
        "model": type(attachment.model).__name__,
        "timestep": attachment.spec.timestep,
        "device": next(iter(weights.values())).device.type,
        "calls": [{"timestep": step, "program": which} for step, which in calls.steps],
        "programs": programs,
        "provenance": provenance(),
    }
    written.append(folder / MANIFEST)
    write_json(folder / MANIFEST, manifest)
    return done


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of which no two share their memory, as safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for name, value in weights.items():
        address = value.untyped_storage().data_ptr()
        found[name] = value.clone() if address in seen else value
        seen.add(address)
    return found


def _save(program: ExportedProgram, path: Path, engine: str) -> None:
    if engine == "export":
        kept = copy.copy(program)
        kept.example_inputs = None  # the weights are among them
        torch.export.save(kept, path)
        return
    aoti_compile_and_package(program, package_path=str(path))


def _judge(call: Call, found: Any, engine: str) -> float:
    """How far a prediction lies from the model's, as a share of its norm.

    Raises:
        ValueError: If that is too far. Programs that are compiled for 16 bits round otherwise than
            the model at every step, so that it is told of them alone.
    """
    ours, theirs = (
        torch.cat([leaf.detach().double().flatten() for leaf in tree_leaves(value)])
        for value in (found, call.output)
    )
    off_by = float((ours - theirs).norm() / theirs.norm())
    is_exact = engine == "export" or call.output.dtype == torch.float32
    if is_exact and not off_by <= TOLERANCE:
        raise ValueError(
            f"the program of {call.model} gives something else than the model ({off_by:.1e} of the "
            "norm away): it holds a value that changes from call to call, and is not written."
        )
    return off_by
