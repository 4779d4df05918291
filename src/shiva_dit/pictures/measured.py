"""What scorers say of a set of pictures, kept in a file for the next evaluation (STATS)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shiva_dit.pictures.kept import Answers, Part
from shiva_dit.pictures.reading import Pictures
from shiva_dit.pictures.scorers import Columns, Scorer
from shiva_dit.provenance import provenance, read_as, write_atomically

KEY = "shiva_dit"
"""Of what a file says beside its tensors."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows of a set of pictures."""

    columns: Mapping[str, Tensor]
    """By name, on the CPU: features (N, F) of a scorer, scores (N,)."""
    scorers: Mapping[str, Mapping[str, Any]]
    """Who said it: SHA-256 of its weights, and what else decides it."""
    pictures: str
    """Digest of the pictures and their prompts."""
    count: int
    """N."""
    where: str
    """What they were read from."""


def measure(
    pictures: Pictures,
    scorers: Sequence[Scorer],
    *,
    batch: int = 16,
    answers: Answers | None = None,
    show_progress: bool = True,
) -> Measured | None:
    """What scorers say of each picture of a folder.

    Args:
        pictures: Of the folder.
        scorers: Who is asked.
        batch: Pictures at a time.
        answers: Who finds a share of it, and what is kept; in memory by default.
        show_progress: Whether a bar counts pictures.

    Returns:
        All of it in the first process, None in others.

    Raises:
        ValueError: If one can't be read.
        FloatingPointError: If a scorer's answer isn't finite.
    """
    answers = answers or Answers()
    starts = range(0, len(pictures) if scorers else 0, batch)
    batches = [pictures.names[start : start + batch] for start in starts]
    parts = [_part(pictures, scorers, names) for names in batches]
    if not answers.find(parts, pictures.folder.name, show_progress=show_progress):
        return None
    columns: dict[str, list[Tensor]] = {}
    digests: dict[str, str] = {}
    for names, part in zip(batches, parts, strict=True):
        files, found = answers.read(part)
        digests |= zip(names, files, strict=True)
        for name, rows in found.items():
            columns.setdefault(name, []).append(rows)
    return Measured(
        columns={name: torch.cat(rows) for name, rows in columns.items()},
        scorers=_said(scorers),
        pictures=pictures.digest(digests),
        count=len(pictures),
        where=str(pictures.folder),
    )


def _part(pictures: Pictures, scorers: Sequence[Scorer], names: Sequence[str]) -> Part:
    """What is said of some pictures."""
    texts = pictures.texts(names)

    def found() -> Columns:
        images = [pictures.read(name) for name in names]
        columns: Columns = {}
        for scorer in scorers:
            for column, rows in scorer.measure(images, texts).items():
                if not rows.isfinite().all():
                    raise FloatingPointError(
                        f"{column} of {', '.join(names)} isn't finite: the weights of "
                        f"{scorer.name} are damaged."
                    )
                columns[column] = rows.cpu()
        return columns

    return Part(
        asked=["scores", _said(scorers), [*names], texts],
        files=lambda: [pictures.file_digest(name) for name in names],
        found=found,
    )


def save(measured: Measured, path: Path) -> None:
    """Write what was measured; features in 32 bits."""
    about = {
        "scorers": measured.scorers,
        "pictures": measured.pictures,
        "count": measured.count,
        "where": measured.where,
        "provenance": provenance(),
    }
    told = {KEY: json.dumps(about, sort_keys=True)}
    held: Columns = {name: rows.float().contiguous() for name, rows in measured.columns.items()}
    write_atomically(path, lambda file: save_file(held, file, metadata=told))


def load(path: Path) -> Measured:
    """Read what `save` wrote.

    Raises:
        ValueError: If the file isn't one.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            columns = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is neither a folder of pictures nor statistics that `shiva-dit evaluate "
            f"--save-stats` wrote: {error}."
        ) from error
    with read_as("statistics of pictures", path):
        about = json.loads(told[KEY])
        found = Measured(
            columns, about["scorers"], about["pictures"], about["count"], about["where"]
        )
    if any(len(rows) != found.count for rows in columns.values()):
        raise ValueError(f"{path} is damaged: it has not a row for each of {found.count} pictures.")
    return found


def check_same(scorers: Sequence[Scorer], theirs: Measured, path: str) -> None:
    """Raise unless saved statistics are of the models that judge now.

    Raises:
        ValueError: Says which is another, and what to do.
    """
    for name, about in _said(scorers).items():
        then = theirs.scorers.get(name)
        if then is None:
            known = ", ".join(theirs.scorers) or "none"
            raise ValueError(
                f"{path} holds nothing of {name} (it is of {known}): leave that scorer out, or "
                "save the statistics again with it."
            )
        for key in ("sha256", "preprocessing"):
            if then.get(key) != about.get(key):
                what = "weights" if key == "sha256" else "preprocessing"
                raise ValueError(
                    f"{path} was made by another {name}: the {what} have SHA-256 "
                    f"{str(then.get(key))[:12]}, here {str(about.get(key))[:12]}. Use the same "
                    "model, or save the statistics again."
                )


def _said(scorers: Sequence[Scorer]) -> dict[str, dict[str, Any]]:
    return {scorer.name: {"sha256": scorer.sha256, **scorer.about} for scorer in scorers}
