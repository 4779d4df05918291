"""A comparison's runs on disk: plain numbers beside pictures, and what decided them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from shiva_dit.config import from_dict, to_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.experiments.contestants import (
    Contestant,
    Diverged,
    Outcome,
    Settings,
    saved_settings,
)
from shiva_dit.experiments.held_out import HeldOut
from shiva_dit.experiments.scoring import Score
from shiva_dit.pictures.generate import Wanted, image_of, write_metadata
from shiva_dit.pictures.prompts import Prompt
from shiva_dit.provenance import (
    load_tensors,
    provenance,
    read_as,
    read_json,
    write_atomically,
    write_json,
)
from shiva_dit.training.recipe import TrainConfig

PLAIN = ("flops", "sample_s", "train_s", "keep_ratio", "parameters", "kept")
"""What of an `Outcome` a run's file holds as it is."""
PICTURES = "pictures"
"""Folder of those of a model of one's own: one for each arm."""
TRAINED = "trained"
"""Folder, within a comparison's, of what was trained: one for each recipe and seed."""
RUN_BY = ("run_at", "num_steps", "sampler")
"""What decides how a trained `Contestant` is run; None where nothing is said."""


@dataclass(frozen=True, slots=True)
class Runs:
    """One JSON file and one of pictures per arm and seed."""

    out: Path
    settings: Settings
    subject: str | None = None
    """Digest of a user's own model, prompts and data."""

    def has(self, contestant: Contestant, key: str, seed: int, retry_failed: bool) -> bool:
        """Whether a run is there; settings that it was saved without count as their defaults.

        Raises:
            ValueError: If it was made with other settings, or of another model or data.
        """
        path = self._path(key, seed)
        if not path.is_file():
            return False
        with read_as("run of a comparison", path):
            plain = read_json(path)
            run = plain["run"]
            recipe = run["recipe"] and from_dict(TrainConfig, run["recipe"], str(path))
            same = recipe == contestant.recipe and run["seed"] == seed
            same = same and all(run.get(name) == getattr(contestant, name) for name in RUN_BY)
            same = same and saved_settings(run["settings"], str(path)) == self.settings
            same = same and run.get("subject") == self.subject
        if not same:
            raise ValueError(
                f"{path} was made with other settings, or of another model or other data: remove "
                "it to run that arm again, or use another folder (--out)."
            )
        return not (retry_failed and "failed" in plain)

    def save(
        self,
        contestant: Contestant,
        key: str,
        seed: int,
        outcome: Outcome | Diverged,
        training: str,
    ) -> None:
        """The images first: a run whose JSON is there is whole."""
        path = self._path(key, seed)
        plain = {
            "run": {
                "settings": to_dict(self.settings),
                "recipe": None if contestant.recipe is None else to_dict(contestant.recipe),
                **{name: getattr(contestant, name) for name in RUN_BY},
                "seed": seed,
                **({} if self.subject is None else {"subject": self.subject}),
            },
            "provenance": provenance(),
        }
        if isinstance(outcome, Diverged):
            plain["failed"] = dataclasses.asdict(outcome)
        else:
            pictures = {"images": outcome.images}
            if outcome.shares is not None:
                pictures["kept"] = outcome.shares
            write_atomically(
                path.with_suffix(".safetensors"), lambda file: save_file(pictures, file)
            )
            score = outcome.score
            plain |= {
                "score": None if score is None else dataclasses.asdict(score),
                "held_out": dataclasses.asdict(outcome.held_out),
                "schedule": None if outcome.schedule is None else outcome.schedule.to_json(),
                **{name: getattr(outcome, name) for name in PLAIN},
                "trained": training if outcome.kept else None,
            }
        write_json(path, plain)

    def load(self, key: str, seed: int) -> Outcome | Diverged:
        """A run that is there."""
        path = self._path(key, seed)
        plain = read_json(path)
        with read_as("run of a comparison", path):
            if "failed" in plain:
                return Diverged(**plain["failed"])
            for name in ("run", "provenance", "trained"):
                plain.pop(name, None)
            schedule, score = plain.pop("schedule"), plain.pop("score")
            tensors = load_tensors(path.with_suffix(".safetensors"))
            return Outcome(
                score=None if score is None else Score(**score),
                held_out=HeldOut(**plain.pop("held_out")),
                schedule=None if schedule is None else Schedule.from_json(schedule),
                images=tensors["images"],
                shares=tensors.get("kept"),
                **plain,
            )

    def kept(self, key: str, seed: int) -> dict[str, Any] | None:
        """Where an arm's weights are, and the SHA-256 of each file."""
        plain = read_json(self._path(key, seed))
        if not plain.get("kept"):
            return None
        return {"folder": f"{TRAINED}/{plain['trained']}", "files": plain["kept"]}

    def made_by(self, runs: Sequence[tuple[str, int]]) -> list[Any]:
        """The code that runs were made with: one entry unless the comparison was resumed."""
        found = []
        for key, seed in runs:
            by = read_json(self._path(key, seed))["provenance"]
            code = {name: by[name] for name in ("commit", "dirty")}
            if code not in found:
                found.append(code)
        return found

    def write_pictures(self, key: str, prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """An arm's pictures as PNGs, for `shiva-dit evaluate`."""
        folder, wanted = self.out / PICTURES / key, []
        for seed in seeds:
            outcome = self.load(key, seed)
            if isinstance(outcome, Diverged):
                continue
            ours = [Wanted(prompt, seed) for prompt in prompts]
            for one, values in zip(ours, outcome.images, strict=True):
                image = image_of((values + 1) / 2)
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / one.file, lambda p, i=image: i.save(p, format="PNG"))
            wanted += ours
        if wanted:
            write_metadata(folder, wanted)

    def _path(self, key: str, seed: int) -> Path:
        return self.out / f"{key}-{seed}.json"
