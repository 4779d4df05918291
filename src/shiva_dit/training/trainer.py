"""The training loop: three stages (section 9 of the method), and the controls' single one."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shiva_dit.config import to_dict
from shiva_dit.core.budget import BudgetController
from shiva_dit.models.backbone import first_not_finite, untuned
from shiva_dit.models.base_dtype import Narrowed
from shiva_dit.models.families import model_spec
from shiva_dit.models.sampling import Sampler
from shiva_dit.models.sharded import gathered, refuse_shared
from shiva_dit.models.target import unwrapped
from shiva_dit.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from shiva_dit.training.data import TrainingData, data_name, reseed
from shiva_dit.training.experts import recorded, share_of
from shiva_dit.training.fit import fit_updates
from shiva_dit.training.interrupt import TrainingInterrupted, deferred_interrupt
from shiva_dit.training.log import LOG_FILE, open_log, shown
from shiva_dit.training.looks.looks import Looks
from shiva_dit.training.looks.material import material
from shiva_dit.training.making import made_law
from shiva_dit.training.optimization import Optimization, parts_of
from shiva_dit.training.origin import check_origin, check_recipe, origin
from shiva_dit.training.paths import path_of
from shiva_dit.training.plan import Planner
from shiva_dit.training.processes import ALONE, Processes, check_parts
from shiva_dit.training.recipe import StageName, TrainConfig
from shiva_dit.training.samples import Samples
from shiva_dit.training.student import Student
from shiva_dit.training.trained import Trained, trained_from

CHECKPOINTS = "checkpoints"


class Trainer:
    """Trains an adapter, or a control, on a model.

    The model is trained in place where the recipe says so, and has hooks on until `close`.

    Args:
        config: The recipe.
        model: The backbone, a supported diffusers transformer, on its device.
        data: Training samples.
        scheduler: That of the model's pipeline, or how that takes its steps (`Sampler`): the mean
            keep ratio is over these (over evenly spread ones without it). Needed where it is a
            diffusion schedule (PixArt, DiT).
        processes: Those that train together: each runs a share of the parts of every step.
        device: Where the model is moved to, when its weights have the recipe's `base_dtype`.

    Raises:
        ValueError: If the model is not supported, or wrapped (DistributedDataParallel); if there
            are more processes than parts; if what the recipe needs isn't installed.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        data: TrainingData,
        scheduler: Any = None,
        processes: Processes = ALONE,
        device: torch.device | None = None,
    ) -> None:
        if unwrapped(model) is not model:
            raise ValueError(
                f"training deals out parts of batches by itself, and gets the model itself, "
                f"not a {type(model).__name__}: pass shiva_dit.models.target.unwrapped(model)."
            )
        refuse_shared(model)
        check_parts(processes.count, config.micro_batches, shard=config.shard)
        self.processes = processes
        spec = model_spec(model)
        sampler = scheduler if isinstance(scheduler, Sampler) else Sampler(scheduler=scheduler)
        path = path_of(spec, sampler.scheduler)
        if data_name(data) != config.task:
            config = replace(config, task=None)
        self.material = material(config.watch, data)
        self.config, self.data, self.sampler = config, self.material.training, sampler
        self.origin = origin(model, self.data)
        """Which model and data the run starts from: names and digests."""
        self.step = 0
        self.last_good: Path | None = None
        self.generator = torch.Generator().manual_seed(config.seed)
        sample = data.batch(torch.zeros(1, dtype=torch.long), torch.Generator())
        self.share = share_of(config.expert, sampler)
        law = made_law(config, sampler, spec, spec.tokens(model, sample.latents))
        self.origin |= {"sampler": {"time_law": law.name}, **recorded(config.expert, sampler)}
        if config.base_dtype != "as_given":
            self.origin["backbone"]["trained_as"] = config.base_dtype
        self.base = Narrowed(model, config.base_dtype)
        try:
            at = device or next(model.parameters()).device
            self.shards = config.shard and processes.count > 1
            if not self.shards:  # a whole one might not fit
                model.to(at)
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                self.student = Student(
                    config, model, sample, self.generator, path, law, at if self.shards else None
                )
        except BaseException:
            self.base.give_back()
            raise
        if self.student.started is not None:
            self.origin["start"] = {"sha256": self.student.started}
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """What stands between a student and its first step."""
        config = self.config
        if self.student.started is None:
            fit_updates(self.student, self.data, self.share)
        adapter, student = self.student.adapter, self.student
        among = self.generator, self.origin, self.processes
        self.samples = Samples(config, self.data, student, *among)
        self.budget = BudgetController(config.keep_ratio, config.policy.budget)
        planned = adapter.policy, adapter.schedule, self.budget, student.reducer, self.share
        self.planner = Planner(config, student.num_tokens, *planned)
        given = untuned(self.student.model, config.backbone, self.student.teacher)
        how = {"shareable": config.backbone == "full", "by_rows": config.shard}
        self.optimization = Optimization(parts_of(student), config.optimizer, given, **how)
        among = self.processes, self.result, self.optimization.averaged
        self.looks = Looks(student, self.sampler, self.material, *among)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns loss, mean keep ratio, and error to the teacher if it ran.

        Raises:
            FloatingPointError: If a loss, gradient or ratio is not finite; names step, stage and
                last checkpoint. Nothing was updated then.
        """
        stage, done, length = self.config.stage_at(self.step)
        self.optimization.start(stage, done, length)
        try:
            values = self._losses(stage)
            self.optimization.finish(self.step)
        except FloatingPointError as error:
            self.optimization.drop()
            raise FloatingPointError(self._diverged(str(error), stage)) from error
        self.step += 1
        return values

    def _losses(self, stage: StageName) -> dict[str, float]:
        """All parts of a step, forward and backward, of which each process runs its share.

        Whatever is drawn by chance is decided by seed, step and part: who runs a part is the same.
        """
        config, empty = self.config, self.data.unconditional()
        progress = self.step / max(config.total_steps - 1, 1)
        reseed(self.generator, config.seed, self.step)
        plan = self.planner.step(stage, self.generator)
        counts = [len(part.t) // config.times_per_sample for part in plan.parts]
        indices = [self.samples.next(count) for count in counts]
        sums = dict.fromkeys(("loss", *self.student.error_names), 0.0)
        for number in self.processes.mine(len(plan.parts)):
            reseed(self.generator, config.seed, self.step, number)
            batch = self.samples.take(indices[number])
            loss, errors = self.student.loss(plan.parts[number], batch, progress, empty)
            if math.isfinite(loss.item()) or self.shards:  # then all go through it together
                (loss / len(plan.parts)).backward()
                self.optimization.gather()
            for name, value in {"loss": loss.item(), **errors}.items():
                sums[name] += value / len(plan.parts)
        told = torch.tensor([*sums.values()], dtype=torch.float64, device=self.student.device)
        self.processes.sum([told])
        sums = dict(zip(sums, told.tolist(), strict=True))
        if not math.isfinite(sums["loss"]):
            raise FloatingPointError("the loss is not finite")
        self.optimization.reduce(self.processes)
        plan.sum(self.processes)
        sums["loss"] += plan.backward_policy()
        return {**sums, "keep": plan.mean_keep_ratio}

    def _diverged(self, what: str, stage: StageName) -> str:
        return (
            f"{what} at step {self.step} (stage {stage!r}); the last good checkpoint: "
            f"{self.last_good or 'none'}. Lower the learning rates (optimizer.*) and go on from "
            "there with --resume, or train again into another folder (out=...)."
        )

    def run(
        self,
        *,
        show_progress: bool = True,
        description: str | None = None,
        position: int = 0,
        saves_on_signals: bool = True,
    ) -> Trained:
        """Train to the end, from wherever `step` stands.

        Args:
            show_progress: Whether a bar tells loss, mean keep ratio and distillation error.
            description: Stands before the bar; the method by default.
            position: Line of the bar, where several processes train.
            saves_on_signals: Whether the first signal is answered by a checkpoint; if not, signals
                are left to whoever handles them.

        Raises:
            TrainingInterrupted: After Ctrl-C or SIGTERM: the step in hand is finished and a
                checkpoint saved.
            ValueError: If the recipe leaves nothing to train; `result` gives the control as it is.
                If the log that is there is damaged.
            KeyboardInterrupt: After a second signal, at once: nothing is saved since the last
                checkpoint.
        """
        if self.config.trains_nothing:
            raise ValueError(
                f"method {self.config.method!r} with a frozen backbone has nothing to train."
            )
        first = self.processes.is_first
        self.samples.draw()
        self.student.model.train()
        bar = tqdm(
            total=self.config.total_steps,
            initial=self.step,
            desc=description or self.config.method,
            unit="step",
            smoothing=0.0 if self.config.watch.every else 0.3,  # a look is no slow step
            disable=not (show_progress and first),
            position=position,
        )
        deferred = deferred_interrupt() if saves_on_signals else nullcontext([])
        opened = open_log(self.config.out / LOG_FILE, self.step) if first else nullcontext()
        with bar, opened as log, deferred as interrupted, self.looks.watching(self.step):
            while not self.has_ended:
                stage = self.config.stage_at(self.step)[0]
                values = self.train_step()
                line = {"step": self.step, "stage": stage, **values}
                bar.set_postfix(shown(line), refresh=False)
                bar.update()
                self.looks.after(line, log)
                stops = self.processes.any(bool(interrupted), self.student.device)
                if stops and not self.has_ended:
                    raise TrainingInterrupted(self.save(), *interrupted[:1])
                if self.step % self.config.checkpoint_every == 0 or self.has_ended:
                    self.save()
        return self.result()

    @property
    def has_ended(self) -> bool:
        """Whether all steps are done, or no better adapter has come for so long (`watch`)."""
        return self.step >= self.config.total_steps or self.looks.enough

    def result(self) -> Trained:
        """What was trained so far, by its moving average. The run can go on afterwards.

        Raises:
            FloatingPointError: If a weight is not finite, in the dtype that it is saved in.
        """
        with self.optimization.averaged():
            return trained_from(self.student, {"steps": self.step, **self.origin})

    def close(self) -> None:
        """Give the model back as it came."""
        self.student.close()
        self.base.give_back()

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.config.out / CHECKPOINTS

    def save(self) -> Path:
        """Write everything that a bit-equal continuation needs.

        Raises:
            FloatingPointError: If a weight is not finite: such a checkpoint would be of no use.
        """
        tensors = gathered(self.optimization.tensors(), keep=self.processes.is_first)
        state = {
            "config": to_dict(self.config),
            "step": self.step,
            "position": self.samples.indices.position,
            "budget": self.budget.state_dict(),
            "origin": self.origin,
            "looks": self.looks.state_dict(),
        }

        def write() -> Path:
            broken = first_not_finite(tensors)
            if broken is not None:
                stage = self.config.stage_at(self.step - 1)[0]
                raise FloatingPointError(self._diverged(f"{broken} is not finite", stage))
            return save_checkpoint(self.checkpoints, self.step, Checkpoint(tensors, state))

        self.last_good = self.processes.from_first(write)
        self.looks.saved()
        return self.last_good

    def resume(self) -> Path:
        """Go on from the latest checkpoint; returns its folder.

        Raises:
            ValueError: If there is none, or it is damaged, another recipe's, another model's or
                other data's.
        """
        path = self.processes.from_first(self._to_resume)
        checkpoint = load_checkpoint(path)
        try:
            self.optimization.load_tensors(checkpoint.tensors)
            self.step = checkpoint.state["step"]
            self.samples.indices.position = checkpoint.state["position"]
            self.budget.load_state_dict(checkpoint.state["budget"])
            self.looks.load_state_dict(checkpoint.state.get("looks"))
        except KeyError as error:
            raise ValueError(f"{path} has no {error}: another version's checkpoint.") from error
        self.last_good = path
        return path

    def _to_resume(self) -> Path:
        """The checkpoint that this run goes on from."""
        path = latest_checkpoint(self.checkpoints)
        if path is None:
            raise ValueError(
                f"there is no checkpoint in {self.checkpoints} to resume from: is out= right? "
                "Without --resume a new run starts."
            )
        checkpoint = load_checkpoint(path)
        if "generator" in checkpoint.tensors:  # its chance went on from step to step
            raise ValueError(f"{path} is another version's checkpoint: train into another folder.")
        try:
            check_recipe(self.config, checkpoint.state["config"], path)
            check_origin(self.origin, checkpoint.state, path)
        except KeyError as error:
            raise ValueError(f"{path} has no {error}: another version's checkpoint.") from error
        return path
