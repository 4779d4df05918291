"""What a folder of pictures is worth: each score with its interval, floor and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shiva_dit.metrics import decibels, squared_errors, ssim
from shiva_dit.pictures.generate import RECORD
from shiva_dit.pictures.kept import Answers, Part
from shiva_dit.pictures.libraries import Lpips
from shiva_dit.pictures.measured import Measured
from shiva_dit.pictures.reading import Pictures, paired
from shiva_dit.pictures.resampling import Measure, cmmd, drawn, frechet, interval, kernel, means
from shiva_dit.provenance import provenance, read_as, read_json

FEW = 10_000
"""Frechet's distances of fewer pictures are compared with those of as many alone."""
SPLITS = 3
"""Ways to cut a reference in two, over which a floor is the mean."""
SLOW = 256
"""Numbers of a feature above which Frechet's distance takes a second or more: then `FEWER` sets are
drawn for its interval."""
FEWER = 20
PAIRS = 16
"""Pictures that are compared with their twins before what was found is kept."""
AHEAD, FLOOR = "ahead", "floor"
"""Stand before scores: of a picture to its twin, and of the twin to another."""
LEAST = 4
"""Pictures of a reference: its halves have two."""


@dataclass(frozen=True, slots=True)
class Distance:
    """A distance between sets of features."""

    name: str
    column: str
    of: Callable[[Tensor, Tensor], Measure]


DISTANCES = (
    Distance("fid", "inception", frechet),
    Distance("kid", "inception", kernel),
    Distance("fd_dinov2", "dinov2", frechet),
    Distance("kd_dinov2", "dinov2", kernel),
    Distance("fd_clip", "clip", frechet),
    Distance("kd_clip", "clip", kernel),
    Distance("cmmd", "clip", cmmd),
)
SCORES = {"clip_score": "clip", "clip_iqa": "clip", "image_reward": "image_reward"}
"""Scores of single pictures, and whose they are."""
Row = dict[str, Any]


def evaluate(
    ours: Measured,
    reference: Measured | None,
    *,
    resamples: int = 200,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> dict[str, Row]:
    """Scores of pictures by what scorers said of them.

    Args:
        ours: Of the pictures that are judged.
        reference: Of real pictures, or the unpruned model's; None: scores of single pictures alone.
        resamples: Sets of pictures drawn for an interval.
        device: Where distances are computed, in float64.
        show_progress: Whether a bar counts scores.

    Returns:
        By score: `value`, `interval` (95%, by `draws` sets drawn from the pictures), `floor` (what
        two parts of the reference have between them, the first of as many pictures as are judged,
        or half), `reference` (its own value, of scores of single pictures), `better`, `weights`.

    Raises:
        ValueError: If the sets are too small.
    """
    _check_sizes(ours, reference)
    weights = drawn(ours.count, resamples).to(device)
    scores: dict[str, Row] = {}
    known = [] if reference is None else [d for d in DISTANCES if d.column in ours.columns]
    bar = tqdm(known, desc="distances", disable=not show_progress or not known)
    for distance in bar:
        assert reference is not None
        x = ours.columns[distance.column].to(device)
        y = reference.columns[distance.column].to(device)
        is_slow = distance.of is frechet and x.shape[1] > SLOW
        some = weights[: FEWER + 1] if is_slow else weights
        row = _row(distance.of(x, y)(some), "lower", ours.scorers[distance.column])
        if distance.of is frechet and row["interval"] is not None:
            row["interval"] = tuple(max(0.0, end) for end in row["interval"])
        floors = [float(distance.of(a, b)(_even(a))[0]) for a, b in _splits(y, ours.count)]
        scores[distance.name] = {**row, "floor": _mean(floors)}
    for name, scorer in SCORES.items():
        if name in ours.columns:
            row = _row(
                means(ours.columns[name].to(device))(weights), "higher", ours.scorers[scorer]
            )
            row["reference"] = row["floor"] = None
            theirs = None if reference is None else reference.columns.get(name)
            if theirs is not None:
                row["reference"] = float(theirs.mean())
                off = [float(a.mean() - b.mean()) for a, b in _splits(theirs, ours.count)]
                row["floor"] = _mean([abs(value) for value in off])
            scores[name] = row
    return scores


def evaluate_pairs(
    ours: Pictures,
    dense: Pictures,
    lpips: Lpips | None = None,
    *,
    resamples: int = 200,
    answers: Answers | None = None,
    show_progress: bool = True,
) -> dict[str, Row] | None:
    """PSNR, SSIM and LPIPS of pictures to those of the same names by the unpruned model.

    The floor is what pictures of the unpruned model have between them that began from other noise:
    of the same prompt where there is another, else of the next name.

    Args:
        ours: The pictures.
        dense: The unpruned model's.
        lpips: Leaves LPIPS out if None.
        resamples: Sets of pictures drawn for an interval.
        answers: Who finds a share of it, and what is kept; in memory by default.
        show_progress: Whether a bar counts pictures.

    Returns:
        All of it in the first process, None in others.

    Raises:
        ValueError: If a picture has no twin, or one of another size.
    """
    names = paired(ours, dense)
    others = _others(dense)
    answers = answers or Answers()
    found: dict[str, list[Tensor]] = {}
    floors: dict[str, list[Tensor]] = {}
    parts = [
        _pairs(ours, dense, lpips, [(name, others[name]) for name in names[at : at + PAIRS]])
        for at in range(0, len(names), PAIRS)
    ]
    if not answers.find(parts, "pairs", show_progress=show_progress):
        return None
    for part in parts:
        for key, rows in answers.read(part)[1].items():
            kind, _, score = key.partition(".")
            (found if kind == AHEAD else floors).setdefault(score, []).append(rows)
    weights = drawn(len(names), resamples)
    scores: dict[str, Row] = {}
    for key, better in (("psnr", "higher"), ("ssim", "higher"), ("lpips", "lower")):
        if key not in found:
            continue
        shown = _decibels if key == "psnr" else float
        row = _row(means(torch.cat(found[key]))(weights), better, None)
        row["value"] = shown(row["value"])
        ends = row["interval"]
        row["interval"] = ends and sorted(map(shown, ends))
        row["floor"] = shown(float(torch.cat(floors[key]).mean())) if key in floors else None
        if key == "lpips":
            assert lpips is not None
            row["weights"] = lpips.sha256
        scores[key] = row
    return scores


def record_of(
    scores: Mapping[str, Row],
    ours: Measured,
    reference: Measured | None,
    dense: Pictures | None,
    *,
    notes: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One record of scores and where they are from."""
    made_by = Path(ours.where) / RECORD
    settings = None
    if made_by.is_file():
        with read_as("record of generated pictures", made_by):
            settings = read_json(made_by)["settings"]
    said = [*notes]
    smaller = min(ours.count, reference.count) if reference is not None else FEW
    if smaller < FEW and any(d.of is frechet and d.name in scores for d in DISTANCES):
        said.append(
            f"Frechet's distances of {smaller} pictures grow as pictures get fewer: compare them "
            "with those of as many alone"
        )
    return {
        "what": "evaluation",
        "pictures": {
            "where": ours.where,
            "count": ours.count,
            "sha256": ours.pictures,
            "settings": settings,
        },
        "reference": reference
        and {"where": reference.where, "count": reference.count, "sha256": reference.pictures},
        "dense": dense and {"where": str(dense.folder), "count": len(dense)},
        "scorers": ours.scorers,
        "scores": dict(scores),
        "notes": said,
        "options": dict(options or {}),
        "provenance": provenance(),
    }


def _check_sizes(ours: Measured, reference: Measured | None) -> None:
    if reference is None:
        return
    for least, measured, what in ((2, ours, "are judged"), (LEAST, reference, "are a reference")):
        if measured.count < least:
            raise ValueError(
                f"{measured.where} has {measured.count} pictures: at least {least} {what}."
            )


def _row(values: Tensor, better: str, scorer: Mapping[str, Any] | None) -> Row:
    """A score of the pictures and of sets drawn from them."""
    return {
        "value": float(values[0]),
        "interval": interval(values),
        "draws": len(values) - 1,
        "better": better,
        "weights": None if scorer is None else scorer["sha256"],
    }


def _splits(rows: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Parts of a reference: of as many pictures as are judged, at most half, and the rest."""
    generator = torch.Generator().manual_seed(0)
    first = min(count, len(rows) // 2)
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(SPLITS)]
    return [(rows[order[:first]], rows[order[first:]]) for order in orders]


def _even(rows: Tensor) -> Tensor:
    return torch.ones(1, len(rows), dtype=torch.float64, device=rows.device)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _decibels(error: float) -> float:
    return decibels(torch.tensor([max(0.0, error)], dtype=torch.float64))  # an interval's end


def _pairs(
    ours: Pictures, dense: Pictures, lpips: Lpips | None, names: Sequence[tuple[str, str]]
) -> Part:
    """Errors of some pictures, and floors; names with those of other pictures of the same model."""

    def files() -> list[str]:
        return [
            digest
            for name, other in names
            for digest in (
                ours.file_digest(name),
                dense.file_digest(name),
                dense.file_digest(other),
            )
        ]

    def found() -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {}
        for name, other in names:
            truth = dense.read(name)
            where = f"{ours.folder / name}", f"{dense.folder}"
            for key, value in _pair(ours.read(name), truth, lpips, *where).items():
                rows.setdefault(f"{AHEAD}.{key}", []).append(value)
            beside = dense.read(other)
            if other != name and beside.shape == truth.shape:
                for key, value in _pair(beside, truth, lpips, other, name).items():
                    rows.setdefault(f"{FLOOR}.{key}", []).append(value)
        return {key: torch.cat(values).cpu() for key, values in rows.items()}

    weights = None if lpips is None else lpips.sha256
    return Part(asked=["pairs", weights, [list(pair) for pair in names]], files=files, found=found)


def _pair(
    image: Tensor, truth: Tensor, lpips: Lpips | None, where: str, beside: str
) -> dict[str, Tensor]:
    """Errors of one picture to its twin, each of one number; PSNR as its squared error."""
    if image.shape != truth.shape:
        sides = [f"{s.shape[-1]} x {s.shape[-2]}" for s in (image, truth)]
        raise ValueError(
            f"{where} has {sides[0]} pixels, its twin in {beside} {sides[1]}: make both of one "
            "size."
        )
    x, y = (side.double()[None] / 127.5 - 1.0 for side in (image, truth))
    found = {"psnr": squared_errors(x, y), "ssim": ssim(x, y)}
    if lpips is not None:
        found["lpips"] = lpips.distances(x, y)
    return found


def _others(pictures: Pictures) -> dict[str, str]:
    """For each picture another one: the next of its prompt, or of all."""
    groups: dict[str, list[str]] = {}
    for name in pictures.names:
        groups.setdefault(pictures.prompts[name].id if pictures.prompts else "", []).append(name)
    found: dict[str, str] = {}
    for group in groups.values():
        if len(group) > 1:
            found |= _next(group)
    return {**_next(pictures.names), **found}


def _next(names: Sequence[str]) -> dict[str, str]:
    return dict(zip(names, [*names[1:], names[0]], strict=True))
