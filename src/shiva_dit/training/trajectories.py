"""The unpruned model's own samplings, whose states a student is trained on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from shiva_dit.provenance import data_digest, write_atomically
from shiva_dit.training.data import Batch, ShuffledIndices, TrainingData
from shiva_dit.training.paths import NoisePath
from shiva_dit.training.processes import ALONE, Processes
from shiva_dit.training.route import Route
from shiva_dit.training.settings import TrajectoryConfig

CONDITIONING = "conditioning."
"""Stands before the names of arguments in a file."""

Predict = Callable[[Batch, Tensor, Tensor, Tensor | None], Tensor]
"""The unpruned model's prediction for samples at one time, (batch, states, t, guidance scales)."""


class Trajectories:
    """Samplings of the unpruned model, from noise to pictures, kept in files.

    Noised samples are not what a guided sampler visits: guidance leads away from the data. Each
    sampling has a guidance scale of its own, drawn evenly.

    Args:
        config: How many, and in how many steps.
        data: Gives captions, and the shape of a sample.
        path: How samples become noise; gives the solver.
        guidance: Lowest and highest scale; None without guidance.
        at_once: Samplings that are drawn together, and lie in one file.
        seed: Of captions, scales and noise.
        folder: Of the files; an interrupted run finds there what it drew.
        origin: Digest of the model and the data.
    """

    def __init__(
        self,
        config: TrajectoryConfig,
        data: TrainingData,
        path: NoisePath,
        guidance: tuple[float, float] | None,
        *,
        at_once: int,
        seed: int,
        folder: Path,
        origin: str,
    ) -> None:
        self.config, self.data, self.path, self.guidance = config, data, path, guidance
        self.at_once, self.seed, self.folder = at_once, seed, folder
        digest = data_digest([origin, seed, config.steps, guidance or (), at_once])[:16]
        self._name = f"trajectories-{digest}"
        self.indices = ShuffledIndices(len(data), seed).take(config.count)
        """Which samples of the data give the captions."""
        self.cpu_s = 0.0
        """Seconds that drawing them took."""
        self._files: list[Path] = []
        self._times = torch.empty(0)
        self._like: Batch | None = None

    def draw(
        self,
        predict: Predict,
        device: torch.device,
        processes: Processes = ALONE,
        *,
        alike: bool = False,
    ) -> None:
        """Draw all of them, or find those that are there. Only the first call does anything.

        Args:
            predict: The unpruned model, guided as in sampling.
            device: Where it runs.
            processes: Each draws a share of the files.
            alike: Whether all run as many forwards, as those that share weights must.

        Raises:
            ValueError: If a file is damaged.
        """
        if self._files:
            return
        parts = self.indices.split(self.at_once)
        files = [self.folder / f"{self._name}-{n:05d}.safetensors" for n in range(len(parts))]
        # One process looks: others might see what a quicker one has drawn by then.
        left = processes.from_first(lambda: [n for n, f in enumerate(files) if not f.is_file()])
        bar = tqdm(
            range(processes.rank, len(left) + (-len(left) % processes.count), processes.count),
            desc="trajectories",
            unit=f"{self.at_once}",
            disable=not processes.is_first,
        )
        for turn in bar:
            if turn >= len(left) and not alike:
                continue
            number = left[min(turn, len(left) - 1)]
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
            began = time.process_time()
            found = self._sampled(predict, device, parts[number], generator)
            found["cpu_s"] = torch.tensor(time.process_time() - began)
            if turn < len(left):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(files[number], partial(save_file, found))
        processes.wait()
        for file in files:
            self.cpu_s += float(self._read(file, ["cpu_s"])["cpu_s"])
        self._times = self._read(files[0], ["times"])["times"]
        self._like = self.data.batch(self.indices[:1], torch.Generator())
        self._files = files

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        """Some of them, drawn by chance; `Batch.route` leads through their states."""
        chosen = torch.randint(len(self.indices), (count,), generator=generator)
        return self.take(chosen)

    def take(self, chosen: Int[Tensor, " B"]) -> Batch:
        """Those with these numbers."""
        assert self._like is not None
        picked = [
            self._read(self._files[i // self.at_once], None, i % self.at_once)
            for i in chosen.tolist()
        ]
        scales = torch.stack([rows["guidance"] for rows in picked])
        states = torch.stack([rows["states"] for rows in picked]).float()
        conditioning = {
            name.removeprefix(CONDITIONING): torch.stack([rows[name] for rows in picked])
            for name in picked[0]
            if name.startswith(CONDITIONING)
        }
        route = Route(states=states, times=self._times, guidance=scales)
        return replace(self._like, latents=states[:, -1], conditioning=conditioning, route=route)

    @torch.no_grad()
    def _sampled(
        self,
        predict: Predict,
        device: torch.device,
        indices: Int[Tensor, " P"],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """One file: states at all times, scales and conditioning of P samplings."""
        given = self.data.batch(indices, generator)
        noise = torch.randn(given.latents.shape, generator=generator)
        scales = torch.ones(len(indices))
        if self.guidance is not None:
            low, high = self.guidance
            scales = low + (high - low) * torch.rand(len(indices), generator=generator)
        batch, x = given.to(device), noise.to(device)
        solver, times = self.path.solver(self.config.steps)
        states, asked = [noise], None if self.guidance is None else scales.to(device)
        for timestep, t in zip(solver.timesteps, times.tolist(), strict=False):
            out = predict(batch, x, torch.full((len(x),), t, device=device), asked).float()
            if out.shape[1] != x.shape[1]:  # with the variance's channels
                out = out.chunk(2, dim=1)[0]
            x = solver.step(out, timestep, x, return_dict=False)[0]
            states.append(x.cpu())
        named = {CONDITIONING + name: value for name, value in given.conditioning.items()}
        kept = {"states": torch.stack(states, 1).half(), "guidance": scales, "times": times}
        return {name: value.contiguous() for name, value in {**kept, **named}.items()}

    def _read(
        self, file: Path, names: list[str] | None, row: int | None = None
    ) -> dict[str, Tensor]:
        """Some tensors of a file, or one row of all that have rows."""
        try:
            with safe_open(file, framework="pt") as tensors:
                if row is None:
                    return {name: tensors.get_tensor(name) for name in names or ()}
                rows = set(tensors.keys()) - {"cpu_s", "times"}
                return {name: tensors.get_slice(name)[row] for name in sorted(rows)}
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a whole file of trajectories ({error}): remove it, and it is drawn "
                "anew."
            ) from error
