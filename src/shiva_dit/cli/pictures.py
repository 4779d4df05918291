"""Pictures, and what they are worth."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shiva_dit.cli.options import Command, path, positive, use_threads
from shiva_dit.cli.sampling import add_sampling, generation_of, pipeline_of


def add_commands(command: Command) -> None:
    """Generate, evaluate."""
    add = command("generate", _generate, "make pictures of prompts by a pipeline", goes_on=True)
    add("--pipeline", required=True, help="folder or Hub id of a pipeline")
    add("--prompts", type=path, required=True, help="text, a prompt in a line, or .jsonl with ids")
    add("--out", type=path, required=True, help="folder to fill, or to go on in")
    add("--adapter", help="folder or Hub id of an adapter; none by default")
    add("--method", help="a method without training instead, such as tomesd")
    add("--whole-steps", type=int, default=0, help="steps in which the whole model predicts too")
    add("--half-life", type=float, default=0.25, help="share of a run that corrections last")
    add("--seeds", type=int, nargs="+", default=[0], help="a picture of each prompt from each")
    add_sampling(add)

    add = command("evaluate", _evaluate, "score a folder of pictures", goes_on=True)
    add("folder", type=path, help="pictures, such as `shiva-dit generate` made")
    add("--reference", type=path, help="folder of real pictures, or statistics of them")
    add("--dense", type=path, help="the unpruned model's pictures, for PSNR, SSIM and LPIPS")
    add("--prompts", type=path, help="of the pictures; those of metadata.jsonl by default")
    add("--inception", help="file of torch-fidelity's Inception, for FID and KID")
    add("--dinov2", help="folder of DINOv2, for distances")
    add("--clip", help="folder of CLIP, for CMMD, CLIP score, CLIP-IQA and distances")
    add("--image-reward", help="folder of ImageReward (not validated)")
    add("--lpips", help="file of torchvision's AlexNet, for LPIPS")
    add("--download", action="store_true", help='fetch Hub ids, and files given as "fetch"')
    add("--save-stats", type=path, help="keep what was found of the reference for the next time")
    add("--resamples", type=int, default=200, help="sets drawn for an interval; 0 for none")
    add("--batch", type=positive, default=16, help="pictures at a time")
    add("--device", default="cpu", help="such as cuda")
    add("--threads", type=positive, help="threads; all cores by default")
    add("--out", type=path, help="the record; scores.json in the folder by default")


def _generate(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.demo.base import usable_device
    from shiva_dit.ownership import check_folder
    from shiva_dit.pictures.generate import generate
    from shiva_dit.pictures.processes import Process
    from shiva_dit.pictures.prompts import read_prompts

    generation = generation_of(options, ("method", "whole_steps", "half_life"), ("seeds",))
    prompts = read_prompts(options.prompts)
    process = Process.launched()
    device = usable_device(process.device(options.device))
    check_folder(options.out)
    pipe = pipeline_of(options)
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


def _evaluate(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from shiva_dit.demo.base import usable_device
    from shiva_dit.ownership import check_folder
    from shiva_dit.pictures.evaluate import evaluate, evaluate_pairs, record_of
    from shiva_dit.pictures.kept import kept_answers
    from shiva_dit.pictures.measured import Measured, check_same, measure, save
    from shiva_dit.pictures.prompts import read_prompts
    from shiva_dit.pictures.reading import Pictures, find_pictures, paired
    from shiva_dit.provenance import write_json
    from shiva_dit.report.layout import plain_rows
    from shiva_dit.report.scores import score_note, score_rows
    from shiva_dit.training.processes import joined

    _check(options)
    out = options.out or options.folder / "scores.json"
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    pictures = find_pictures(options.folder, prompts)
    for file in (out, options.save_stats or out):
        check_folder(file.parent)
        if file.is_dir():
            raise ValueError(f"{file} is a folder where a file is expected: name a file.")
    dense = None if options.dense is None else find_pictures(options.dense)
    if dense is not None:
        paired(pictures, dense)
    known = None if options.reference is None else _known(options.reference)
    kept = out.with_name(f".{out.name}.answers")
    with joined(options.device) as (processes, own):
        device = usable_device(own)
        scorers, lpips = _scorers(options, device, prompts=bool(pictures.prompts))
        if isinstance(known, Measured):
            check_same(scorers, known, str(options.reference))
        with kept_answers(kept, processes) as answers:
            ours = measure(pictures, scorers, batch=options.batch, answers=answers)
            reference = known
            if isinstance(known, Pictures):
                reference = measure(known, scorers, batch=options.batch, answers=answers)
            given = {"resamples": options.resamples, "answers": answers}
            pairs = {} if dense is None else evaluate_pairs(pictures, dense, lpips, **given)
            if ours is None or pairs is None:
                return 0  # the first process goes on
            texts = pictures.texts(pictures.names)
            notes = [note for scorer in scorers for note in scorer.notes(texts)]
            if options.save_stats is not None and reference is not None:
                save(reference, options.save_stats)
            scores = evaluate(ours, reference, resamples=options.resamples, device=device) | pairs
            said = {name: getattr(options, name) for name in ("resamples", "batch", "device")}
            record = record_of(scores, ours, reference, dense, notes=notes, options=said)
            write_json(out, record)
            answers.remove()
    print(f"\n{plain_rows(score_rows(record))}\n\n{score_note(record)}\n\nRecord: {out}")
    return 0


def _known(place: Path) -> Any:
    """A reference: statistics of pictures, or the folder that holds them."""
    from shiva_dit.pictures.measured import load
    from shiva_dit.pictures.reading import find_pictures

    return load(place) if place.is_file() else find_pictures(place)


def _check(options: argparse.Namespace) -> None:
    """Raise a ValueError for options that have nothing to do."""
    distances = (options.inception, options.dinov2, options.clip)
    if options.reference is not None and not any(distances):
        raise ValueError("--reference needs what it is seen by: --inception, --dinov2 or --clip.")
    if options.save_stats is not None and options.reference is None:
        raise ValueError("--save-stats keeps what is found of a --reference, and there is none.")
    if options.lpips is not None and options.dense is None:
        raise ValueError("--lpips is of pairs: name the unpruned model's pictures by --dense.")
    if options.dense is None and not any((*distances, options.image_reward)):
        raise ValueError(
            "nothing to score by: give --dense for PSNR and SSIM, or weights by --clip, --dinov2, "
            "--inception or --image-reward."
        )
    if options.reference is None and options.clip is None and (options.inception or options.dinov2):
        raise ValueError("--inception and --dinov2 are for distances: name a --reference.")
    if options.resamples < 0:
        raise ValueError(f"--resamples must be at least 0, got {options.resamples}.")


def _scorers(options: argparse.Namespace, device: Any, *, prompts: bool) -> tuple[list[Any], Any]:
    """What the options name, loaded."""
    from shiva_dit.pictures.libraries import Inception, Lpips
    from shiva_dit.pictures.reward import ImageReward
    from shiva_dit.pictures.scorers import Clip, Dino

    def file(given: str) -> str | None:
        return None if given == "fetch" and options.download else given

    if options.image_reward is not None and not prompts:
        raise ValueError(
            f"--image-reward needs the prompts of the pictures: {options.folder} has no "
            "metadata.jsonl that says them, name a file by --prompts."
        )
    found: list[Any] = []
    if options.inception is not None:
        found.append(Inception(file(options.inception), device))
    if options.dinov2 is not None:
        found.append(Dino(options.dinov2, device, download=options.download))
    if options.clip is not None:
        found.append(Clip(options.clip, device, download=options.download))
    if options.image_reward is not None:
        found.append(ImageReward(options.image_reward, device))
    return found, None if options.lpips is None else Lpips(file(options.lpips), device)
