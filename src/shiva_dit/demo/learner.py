"""A demo backbone that learns: what a step does, and going on after an interruption to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from shiva_dit.config import LARGEST_SEED, check_types, to_dict, whole_number
from shiva_dit.models.backbone import first_not_finite
from shiva_dit.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from shiva_dit.training.data import ShuffledIndices
from shiva_dit.training.interrupt import TrainingInterrupted, deferred_interrupt
from shiva_dit.training.optimization import adamw_tensors, load_adamw
from shiva_dit.training.origin import check_origin, check_recipe

FREE = {"checkpoint_every"}
"""Settings that a resumed run may change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """How a demo backbone learns, whatever it learns from."""

    task: str = "digits"
    """"digits", "scenes", "scenes64" or "emoji"."""
    seed: int = 0
    """Of initial weights, data order and noise."""
    steps: int = 2500
    """Optimizer steps."""
    batch_size: int = 16
    """Images per step. Small: at equal cost, more steps with fewer images draw better digits."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW; risen to, held, then decayed linearly to 0."""
    warmup_steps: int = 60
    """Steps over which the rate rises."""
    decay_share: float = 0.6
    """Share of the steps over which the rate decays, in (0, 1]."""
    ema: float = 0.997
    """Decay of the exponential moving average of the weights, which is what is kept, in [0, 1)."""
    checkpoint_every: int = 500
    """Steps between checkpoints, which are there until the end."""

    def __post_init__(self) -> None:
        check_types(self)
        whole_number("seed", self.seed, least=0, most=LARGEST_SEED)
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 < self.learning_rate < 1.0:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}.")
        if not 0.0 < self.decay_share <= 1.0:
            raise ValueError(f"decay_share must lie in (0, 1], got {self.decay_share}.")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, as a share of the peak."""
        rise = (step + 1) / max(self.warmup_steps, 1)
        fall = (self.steps - step) / (self.steps * self.decay_share)
        return min(1.0, rise, fall)


class Learner:
    """A backbone with all that its training goes on from.

    Args:
        model: The backbone, on its device.
        config: How it learns.
        samples: How many there are to learn from.
        checkpoints: Folder of its checkpoints.
        origin: What it starts from and learns from; another's checkpoint is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Learning,
        samples: int,
        *,
        checkpoints: Path,
        origin: dict[str, Any],
    ) -> None:
        self.model, self.config = model.train(), config
        self.checkpoints, self.origin = checkpoints, origin
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.adamw = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.indices = ShuffledIndices(samples, config.seed)
        self.step = 0
        self.loss = 0.0
        """Running mean."""
        self.cpu_s = 0.0
        """Seconds of all steps."""
        self.kept: dict[str, nn.Module] = {}
        """What isn't trained here and stands in the checkpoints too."""
        self.notes: dict[str, Any] = {}
        """Plain data of the same kind."""

    @property
    def trained(self) -> nn.Module:
        """The backbone as it is kept: its average."""
        return self.average.module.eval()

    def run(self, loss_of: Callable[[int], Tensor], label: str) -> None:
        """Train to the end, from wherever `step` stands.

        Args:
            loss_of: The loss of a step.
            label: Stands before the bar.

        Raises:
            TrainingInterrupted: After Ctrl-C or SIGTERM: the step in hand is finished and saved.
            FloatingPointError: If the loss is not finite.
        """
        steps, every = self.config.steps, self.config.checkpoint_every
        bar = tqdm(total=steps, initial=self.step, desc=label, unit="step")
        with bar, deferred_interrupt() as interrupted:
            while self.step < steps:
                began = time.process_time()
                self._update(loss_of(self.step))
                self.cpu_s += time.process_time() - began
                bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                bar.update()
                if interrupted and self.step < steps:
                    raise TrainingInterrupted(self.save(), interrupted[0])
                if self.step % every == 0 or self.step == steps:
                    self.save()

    def _update(self, loss: Tensor) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is not finite at step {self.step}: lower learning_rate. The last "
                f"checkpoint: {latest_checkpoint(self.checkpoints) or 'none'}."
            )
        for group in self.adamw.param_groups:
            group["lr"] = self.config.learning_rate * self.config.rate(self.step)
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        self.average.update_parameters(self.model)
        self.loss = value if self.step == 0 else 0.98 * self.loss + 0.02 * value
        self.step += 1

    def save(self) -> Path:
        """Write everything that a bit-equal continuation needs.

        Raises:
            FloatingPointError: If a weight is not finite.
        """
        tensors = {"generator": self.generator.get_state(), **adamw_tensors(self.adamw)}
        for part, module in self._modules().items():
            tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
        broken = first_not_finite(tensors)
        if broken is not None:
            raise FloatingPointError(
                f"{broken} is not finite after step {self.step}: lower learning_rate."
            )
        state = {
            "config": to_dict(self.config),
            "step": self.step,
            "position": self.indices.position,
            "loss": self.loss,
            "cpu_s": self.cpu_s,
            "notes": self.notes,
            "origin": self.origin,
        }
        return save_checkpoint(self.checkpoints, self.step, Checkpoint(tensors, state))

    def resume(self) -> bool:
        """Go on from the latest checkpoint; False if there is none.

        Raises:
            ValueError: If it is damaged, or another recipe's, backbone's or data's.
        """
        path = latest_checkpoint(self.checkpoints)
        if path is None:
            return False
        found = load_checkpoint(path)
        try:
            check_recipe(self.config, found.state["config"], path, FREE)
            check_origin(self.origin, found.state, path)
            load_adamw(self.adamw, found.tensors)
            self.generator.set_state(found.tensors["generator"])
            self.step, self.indices.position = found.state["step"], found.state["position"]
            self.loss, self.cpu_s = found.state["loss"], found.state["cpu_s"]
            self.notes = found.state["notes"]
            for part, module in self._modules().items():
                start = f"{part}."
                own = {n: v for n, v in found.tensors.items() if n.startswith(start)}
                module.load_state_dict({n.removeprefix(start): v for n, v in own.items()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} is another version's checkpoint: {error}.") from error
        return True

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "average": self.average, **self.kept}
