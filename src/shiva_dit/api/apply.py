"""An adapter put on a pipeline or a transformer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.adapter.config import lora_metadata
from shiva_dit.api.experts import dealt
from shiva_dit.config import finite_number, whole_number
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import attachment_of, exchange
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.backbone import first_not_finite
from shiva_dit.models.clock import Clock, ListedTimes, SchedulerTimes
from shiva_dit.models.families import model_spec
from shiva_dit.models.places import PLAIN
from shiva_dit.models.target import transformers_of
from shiva_dit.models.tuned import TunedBackbone

logger = logging.getLogger("shiva_dit")
T = TypeVar("T")
_TIMES_OF_TWO = (
    "timesteps name the calls of one model, and two share the steps of this pipeline: "
    "leave them out; its scheduler says what time it is."
)


def apply(
    target: T,
    adapter: ShivaAdapter | str | Path,
    *,
    schedule: Schedule | None = None,
    keep_ratio: float | None = None,
    multiple: int | None = None,
    segments: int | None = None,
    select_every: int | None = None,
    reference_keep_ratio: float | None = None,
    timesteps: Sequence[float] | None = None,
    merge: bool = True,
    transformer_2: ShivaAdapter | str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> T:
    """Attach an adapter to a pipeline or a transformer, in place of an earlier one.

    Weights of the backbone that the adapter brings along (LoRA, or the whole state) are put on,
    and stay on whatever LoRAs of your own you load, choose, fuse or disable afterwards. At ratio 1
    and without such weights images are the same as before. No state is kept between calls, and one
    forward runs at a time.

    Guidance shares the selection in every pipeline that says how it is guided (docs/models.md):
    both halves of one call keep the tokens that either wants; of passes one after the other, the
    unconditional one keeps the conditional one's. Loops of your own say it by `guided`.

    The mean keep ratio is met over the very steps of each run of a pipeline, however few, and
    over `timesteps`. A bare transformer doesn't know its steps: its tokens go by the density of
    the steps that the schedule was made for (`summary` names it).

    Args:
        target: A diffusers pipeline, or its transformer.
        adapter: A `ShivaAdapter`, a folder, or a Hub id "user/name"; one of two experts
            (`ShivaAdapter.of_experts`) goes to both transformers of a pipeline.
        schedule: Keep ratios to use instead of the adapter's.
        keep_ratio: Mean keep ratio in (0, 1] to move the adapter's policy to; 1 keeps all tokens.
            One that is joined of several (`ShivaAdapter.of_budgets`) has its weights for it.
            Far from what the adapter was trained for (`ShivaAdapter.trained_for`), a warning is
            logged.
        multiple: Round the number of tokens kept to a multiple of this; the adapter's by default.
        segments: At most so many different numbers of tokens per block over time
            (`Schedule.for_tokens`): few shapes, for CUDA graphs. As many as time bins by default.
        select_every: So many prunable blocks in a row share the scores of their first: 2 halves
            what choosing costs. The adapter's by default.
        reference_keep_ratio: Share kept of the tokens of references (the pictures that Flux
            Kontext, Qwen-Image-Edit and others go by; clean frames, from image to video) in every
            prunable block, in (0, 1], or 0 for frames, which pass by then: a budget of their own
            beside the schedule, which is then the target's. The adapter's by default; where that
            has none, all tokens share one budget, and clean frames are refused. A call without
            references is as if it weren't there.
        timesteps: What the model will be called with, one entry per call, in its own units; then
            from the start again. The mean keep ratio is met over this list, and on a GPU calls
            need not wait for the device to say what time it is. A pipeline needs none: its
            scheduler says so after a run's first step.
        merge: Whether a LoRA or DoRA of the adapter is merged into the layers that are plain: it
            then costs nothing, and the model's own weights lie on the host until `remove`. False
            leaves them alone, for adapters that are switched often.
        transformer_2: The adapter of the pipeline's second transformer, where it has one (Wan
            2.2); without it, and with an adapter of one, that one stays dense. All other options
            hold for both.
        revision: Branch, tag or commit, for a Hub id.
        token: For private repositories on the Hub.

    Returns:
        `target`.

    Raises:
        ValueError: If the model is not supported, the adapter is another model's or damaged, a
            ratio lies outside its range, or references get one on a model that has none. Nothing
            has changed then: an earlier adapter stays on.
        RuntimeError: If an earlier adapter can't be taken off (see `remove`).
    """
    models = transformers_of(target)
    if transformer_2 is not None and timesteps is not None and len(models) > 1:
        raise ValueError(_TIMES_OF_TWO)
    numbers = {"multiple": multiple, "segments": segments, "select_every": select_every}
    _check_numbers(schedule, keep_ratio, numbers)

    def read(source: str | Path) -> ShivaAdapter:
        return ShivaAdapter.from_pretrained(source, revision=revision, token=token)

    made = []
    found = dealt(target, models, adapter, transformer_2, read)
    if timesteps is not None and len(found) > 1:
        raise ValueError(_TIMES_OF_TWO)
    for model, source in zip(models, found, strict=False):
        source.check_fits(model)
        asked = keep_ratio if schedule is None else schedule.mean_keep_ratio
        source = source if asked is None else source.at(asked)
        _check_weights(source)
        attachment = Attachment(
            model,
            copy.deepcopy(source.selector()),  # its own: a model moves it to its device
            _schedule(source, schedule, keep_ratio),
            updates=copy.deepcopy(source.updates),
            multiple=source.config.multiple if multiple is None else multiple,
            segments=segments,
            select_every=source.config.select_every if select_every is None else select_every,
            reference_keep_ratio=(
                source.config.reference_keep_ratio
                if reference_keep_ratio is None
                else reference_keep_ratio
            ),
            backbone=_backbone(model, source, merge),
            freeze=True,
            clock=_clock(model, target, timesteps),
            adapter=source,
        )
        made.append(attachment)
    exchange(made, gone=[on for on in map(attachment_of, models[len(made) :]) if on is not None])
    for attachment in made:
        logger.info(
            "shiva_dit: %d of %d blocks of %s pruned, %.1f%% of their tokens kept on average",
            len(attachment.schedule.prunable_blocks),
            attachment.schedule.num_blocks,
            type(attachment.model).__name__,
            100 * attachment.schedule.mean_keep_ratio,
        )
    return target


def _check_numbers(schedule: object, keep_ratio: Any, numbers: Mapping[str, Any]) -> None:
    """Raise a ValueError for what `apply` can't take."""
    for name, value in numbers.items():
        if value is not None:
            whole_number(name, value)
    if schedule is not None and keep_ratio is not None:
        raise ValueError("pass either a schedule or a keep_ratio, not both.")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a Schedule, got {type(schedule).__name__}.")
    if keep_ratio is None:
        return
    if keep_ratio == keep_ratio:  # NaN is out of range, below
        finite_number("keep_ratio", keep_ratio)
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}: the share KEPT.")


def _schedule(
    adapter: ShivaAdapter, schedule: Schedule | None, keep_ratio: float | None
) -> Schedule:
    """The schedule asked for, or the adapter's own."""
    if keep_ratio is not None:
        bins, law = adapter.config.num_bins, adapter.schedule.law
        schedule = adapter.policy.schedule(keep_ratio, bins, law)
    if schedule is None:
        return adapter.schedule
    adapter.warn_if_far(schedule)
    return schedule


def _backbone(model: Any, adapter: ShivaAdapter, merge: bool) -> TunedBackbone | None:
    """The adapter's tuned weights, if it has any."""
    config = adapter.config
    if config.backbone == "full" and not merge:
        raise ValueError(
            'this adapter has backbone = "full", whose weights replace the model\'s: leave out '
            "merge=False, which is for LoRA and DoRA."
        )
    if config.backbone == "frozen":
        return None
    lora = lora_metadata(config) if config.backbone in ("lora", "dora") else None
    return TunedBackbone(model, adapter.backbone_weights, lora, merge=merge)


def _clock(model: nn.Module, target: Any, timesteps: Sequence[float] | None) -> Clock | None:
    """Who knows a call's time, beside the call."""
    if timesteps is not None:
        if isinstance(timesteps, str) or not isinstance(timesteps, Iterable):
            raise ValueError(f"timesteps must be a list of numbers, got {timesteps!r}.")
        steps = [finite_number("timesteps", _plain(step)) for step in timesteps]
        return Clock(ListedTimes([float(model_spec(model).time(step)) for step in steps]))
    if model is not target and hasattr(target, "scheduler"):
        return Clock(SchedulerTimes(target, model))
    return None


def _plain(step: Any) -> Any:
    """A number out of a tensor or array of one."""
    return step.item() if hasattr(step, "item") and getattr(step, "ndim", 1) == 0 else step


def _check_weights(adapter: ShivaAdapter) -> None:
    kind, tuned = adapter.config.backbone, adapter.backbone_weights
    if bool(tuned) != (kind != "frozen"):
        raise ValueError(
            f"the adapter's config says backbone = {kind!r}, and it holds {len(tuned)} tensors of "
            "a tuned backbone: set adapter.backbone_weights, or fetch it again."
        )
    for name, value in tuned.items():
        if value.dtype not in PLAIN:
            raise ValueError(
                f"the adapter's {name} is {value.dtype}; tuned weights are floating-point numbers "
                "of 16, 32 or 64 bits: save the adapter again from the trained model."
            )
    broken = first_not_finite({**adapter.state_dict(), **adapter.backbone_weights})
    if broken is not None:
        raise ValueError(
            f"the adapter's {broken} holds values that are not finite: train it again."
        )
    dtypes = {parameter.dtype for parameter in adapter.parameters()} - {torch.float32}
    if dtypes:
        raise ValueError(
            f"the adapter's weights must be torch.float32, got {dtypes.pop()}: only the model is "
            "converted to 16 bits, the adapter adapts by itself."
        )
