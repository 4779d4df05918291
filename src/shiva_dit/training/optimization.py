"""What is trained when and how fast: parts, rates, clipping, moving averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from shiva_dit.models.backbone import set_trainable, trainable_parameters
from shiva_dit.models.sharded import is_shared, norm_of, shared_as
from shiva_dit.training.eight_bit import EightBitAdam
from shiva_dit.training.processes import Processes
from shiva_dit.training.recipe import StageName
from shiva_dit.training.settings import OptimizerConfig
from shiva_dit.training.student import Student

SUMMED = ("router", "updates", "backbone")
"""Whose gradients come from the parts of a batch. They are summed in float64, so that the order of
the sum changes nothing: Adam divides small gradients by their size, and would show what it rounds
away."""
PARTS = ("router", "policy", "backbone", "updates")
ACTIVE: dict[StageName, set[str]] = {
    "warmup": {"router", "updates"},
    "policy": {"router", "updates", "policy"},
    "joint": {"router", "updates", "policy", "backbone"},
}


def parts_of(student: Student) -> dict[str, dict[str, nn.Parameter]]:
    """All that learns, by part (`PARTS`) and name. The backbone is frozen on return."""
    scores = student.selector if student.learns_scores else None
    policy = student.adapter.policy if student.config.learns_policy else None
    own = {} if student.reducer is None else student.reducer.parts()
    return {
        "router": dict(scores.named_parameters()) if scores else own.get("router", {}),
        "policy": dict(policy.named_parameters()) if policy else own.get("policy", {}),
        "updates": dict(student.updates.named_parameters())
        if student.updates
        else own.get("updates", {}),
        "backbone": trainable_parameters(student.model, student.config.backbone),
    }


class Optimization:
    """AdamW over all that learns, each part with its own rate, clipping and average.

    Args:
        parts: Parameters by part (`PARTS`) and name; a part may be empty.
        config: Rates and decay.
        untuned: Of the backbone's, by name, the values to which weight decay pulls.
        shareable: Whether processes may share the backbone's weights.
        by_rows: Whether blocks of its 8-bit moments are such as they could share.
    """

    def __init__(
        self,
        parts: Mapping[str, dict[str, nn.Parameter]],
        config: OptimizerConfig,
        untuned: Mapping[str, Tensor],
        *,
        shareable: bool = False,
        by_rows: bool = False,
    ) -> None:
        self.parts, self.config = parts, config
        self.untuned = [untuned[name] for name in parts["backbone"]]
        self._sums: dict[tuple[str, str], Tensor] = {}
        # Gradients of scores and ratios are tiny (a mean over all pixels): Adam's usual eps would
        # hide them.
        small = {"eps": 1e-15}
        extra: dict[str, dict[str, float]] = dict.fromkeys(PARTS, small) | {"backbone": {}}
        if shareable and all(p.device.type == "cpu" for p in parts["backbone"].values()):
            # On a CPU, fused AdamW rounds otherwise at a tensor's end, which isn't a share's.
            extra["backbone"] = {"fused": False, "foreach": False}
        held = {part: list(parts[part].values()) for part in PARTS}
        self.eight_bit: EightBitAdam | None = None
        if config.eight_bit:
            self.eight_bit = EightBitAdam(held["backbone"], by_rows=by_rows)
            held["backbone"] = []
        self.adamw = torch.optim.AdamW(
            [{"params": held[part], "name": part, **extra[part]} for part in PARTS],
            lr=0.0,
            weight_decay=0.0,  # Adam's pulls to zero, which is another model: see `_decay`
            fused=True,  # a third to a quarter of the time of the default on a CPU
        )
        self.average = {
            part: [p.detach().clone() for p in parameters.values()]
            for part, parameters in parts.items()
        }

    def start(self, stage: StageName, done: int, length: int) -> None:
        """Set the rates of a step and freeze what its stage doesn't train.

        Args:
            stage: Its stage.
            done: Steps done in the stage.
            length: Steps of the stage.
        """
        config = self.config
        rise = min(1.0, (done + 1) / max(config.warmup_steps, 1))
        active = ACTIVE[stage]
        set_trainable(self.parts["backbone"].values(), "backbone" in active)
        for group in self.adamw.param_groups:
            name, scale = group["name"], rise
            if stage == "joint":
                end = length * config.policy_share if name == "policy" else length
                fall = max(end * config.decay_share, 1e-9)  # 0: no fall, but an end
                scale = min(rise, max(end - done, 0.0) / fall)
            group["lr"] = scale * getattr(config, name) if name in active else 0.0
            if name == "backbone" and self.eight_bit is not None:
                self.eight_bit.rate = group["lr"]

    @torch.no_grad()
    def gather(self) -> None:
        """Add what a part's backward left to what others left."""
        for part in SUMMED:
            for name, parameter in self.parts[part].items():
                if parameter.grad is not None:
                    key = part, name
                    if key in self._sums:
                        self._sums[key] += parameter.grad
                    else:
                        self._sums[key] = parameter.grad.to(_wide(parameter))
                    parameter.grad = None

    @torch.no_grad()
    def reduce(self, processes: Processes) -> None:
        """Sum the gradients over all parts and processes; the policy's are alike on all."""
        names = [(part, name) for part in SUMMED for name in self.parts[part]]
        device = next((self.parts[p][n].device for p, n in names), None)
        known = torch.tensor([float(key in self._sums) for key in names], device=device)
        processes.sum([known])
        for key, has in zip(names, known.tolist(), strict=True):
            if has and key not in self._sums:  # another process has one
                parameter = self.parts[key[0]][key[1]]
                self._sums[key] = torch.zeros_like(parameter, dtype=_wide(parameter))
        summed = [key for key in names if key in self._sums]
        processes.sum([self._sums[key] for key in summed if not is_shared(self._sums[key])])
        for key in summed:
            if is_shared(self._sums[key]):  # these are means over the processes
                self._sums[key] *= processes.count
        for part, name in summed:
            parameter = self.parts[part][name]
            parameter.grad = self._sums.pop((part, name)).to(parameter.dtype)

    def drop(self) -> None:
        """Forget the gradients of a step that failed."""
        self._sums.clear()
        for parameters in self.parts.values():
            for parameter in parameters.values():
                parameter.grad = None

    def finish(self, step: int) -> None:
        """Clip, update, and follow with the averages.

        Args:
            step: Steps done in all: a short run must not average in its own start.

        Raises:
            FloatingPointError: If a gradient is not finite; nothing was updated then.
        """
        for part, parameters in self.parts.items():
            held = [p for p in parameters.values() if p.grad is not None]
            if held:
                norm = norm_of([p.grad for p in held if p.grad is not None])
                nn.utils.clip_grads_with_norm_(held, self.config.grad_clip, norm)
                if not torch.isfinite(norm):
                    raise FloatingPointError(f"the gradient of the {part} is not finite")
        self._decay()
        self.adamw.step()
        if self.eight_bit is not None:
            self.eight_bit.step()
        self.drop()
        update = get_ema_multi_avg_fn(min(self.config.ema, (1 + step) / (10 + step)))
        for part, parameters in self.parts.items():
            if parameters:
                update(self.average[part], [p.detach() for p in parameters.values()], step)

    @torch.no_grad()
    def _decay(self) -> None:
        """Decoupled weight decay, to the model as it was given."""
        rates = {group["name"]: group["lr"] for group in self.adamw.param_groups}
        share = rates["backbone"] * self.config.weight_decay
        if share and self.untuned:
            held = [p.data for p in self.parts["backbone"].values()]
            torch._foreach_lerp_(held, self.untuned, min(share, 1.0))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within: the moving averages stand in for what is trained."""
        pairs = [(parameter, mean) for _, parameter, mean in self._all()]
        shared = [pair for pair in pairs if is_shared(pair[0])]
        pairs = [pair for pair in pairs if not is_shared(pair[0])]
        kept = [parameter.data for parameter, _ in pairs]
        for parameter, mean in pairs:
            parameter.data = mean
        _exchange(shared)
        try:
            yield
        finally:
            _exchange(shared)
            for (parameter, _), data in zip(pairs, kept, strict=True):
                parameter.data = data

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, averages and Adam's moments, by name."""
        tensors: dict[str, Tensor] = {}
        for name, parameter, mean in self._all():
            tensors[name] = parameter
            tensors[f"average.{name}"] = mean
        eight_bit = {} if self.eight_bit is None else self.eight_bit.tensors()
        return tensors | adamw_tensors(self.adamw) | eight_bit

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        load_adamw(self.adamw, tensors)
        if self.eight_bit is not None:
            self.eight_bit.load(tensors)
        for name, parameter, mean in self._all():
            parameter.copy_(shared_as(tensors[name], parameter))
            mean.copy_(shared_as(tensors[f"average.{name}"], mean))

    def _all(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        for part, parameters in self.parts.items():
            for (name, parameter), mean in zip(parameters.items(), self.average[part], strict=True):
                yield f"{part}.{name}", parameter, mean


@torch.no_grad()
def _exchange(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Values of one for the other's, in place: what FSDP gathers from is the parameter's own."""
    for one, other in pairs:
        kept = one.detach().clone()
        one.copy_(other)
        other.copy_(kept)


def _wide(parameter: Tensor) -> torch.dtype:
    """What gradients are summed in; Apple's GPUs have no float64."""
    return torch.float32 if parameter.device.type == "mps" else torch.float64


def adamw_tensors(adamw: torch.optim.AdamW) -> dict[str, Tensor]:
    """Moments and steps of an optimizer, by name."""
    return {
        f"adamw.{index}.{key}": torch.as_tensor(value)
        for index, values in adamw.state_dict()["state"].items()
        for key, value in values.items()
    }


def load_adamw(adamw: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `adamw_tensors` gave, among other tensors."""
    states: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if name.startswith("adamw."):
            _, index, key = name.split(".")
            if key != "step":
                value = shared_as(value, parameters[int(index)])
            states.setdefault(int(index), {})[key] = value
    adamw.load_state_dict({**adamw.state_dict(), "state": states})
