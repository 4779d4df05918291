"""What `import shiva_dit` offers: apply, remove, disabled, compile, summary, supported."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from shiva_dit.adapter import ShivaAdapter, lora_metadata
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import Attachment, attach, attachment_of
from shiva_dit.models.backbone import TunedBackbone, first_not_finite, pipeline_transformer
from shiva_dit.models.clock import Clock, ListedTimes, Run, SchedulerTimes
from shiva_dit.models.families import MODELS, model_spec
from shiva_dit.models.graphs import CudaRecorder
from shiva_dit.models.sampling import own_times, scheduler_times

logger = logging.getLogger("shiva_dit")
T = TypeVar("T")

RECOMPILE_LIMIT = 64
"""Graphs that `compile` allows; torch's own 8 are soon used up by batch sizes."""


def apply(
    target: T,
    adapter: ShivaAdapter | str | Path,
    *,
    schedule: Schedule | None = None,
    keep_ratio: float | None = None,
    multiple: int | None = None,
    segments: int | None = None,
    select_every: int | None = None,
    timesteps: Sequence[float] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> T:
    """Attach an adapter to a pipeline or a transformer, in place of an earlier one.

    Weights of the backbone that the adapter brings along (LoRA, or the whole state) are put on,
    and stay on whatever LoRAs of your own you load, choose or disable afterwards. At ratio 1 and
    without such weights images are the same as before. No state is kept between calls, and one
    forward runs at a time.

    Guidance shares the selection if `target` is a pipeline: both halves of one call keep the
    tokens that either wants; where the passes come one after the other and the pipeline names
    them (`cache_context`), the unconditional one keeps the conditional one's. A bare transformer
    never shares within a call.

    The mean keep ratio is met over the very steps of each run of a pipeline, however few, and
    over `timesteps`. A bare transformer doesn't know its steps: its tokens go by the density of
    the steps that the schedule was made for (`summary` names it).

    Args:
        target: A diffusers pipeline, or its transformer.
        adapter: A `ShivaAdapter`, a folder, or a Hub id "user/name".
        schedule: Keep ratios to use instead of the adapter's.
        keep_ratio: Mean keep ratio in (0, 1] to move the adapter's policy to; 1 keeps all tokens.
        multiple: Round the number of tokens kept to a multiple of this; the adapter's by default.
        segments: At most so many different numbers of tokens per block over time
            (`Schedule.for_tokens`): few shapes, for CUDA graphs. As many as time bins by default.
        select_every: So many prunable blocks in a row share the scores of their first: 2 halves
            what choosing costs. The adapter's by default.
        timesteps: What the model will be called with, one entry per call, in its own units; then
            from the start again. The mean keep ratio is met over this list, and on a GPU calls
            need not wait for the device to say what time it is. A pipeline needs none: its
            scheduler says so after a run's first step.
        revision: Branch, tag or commit, for a Hub id.
        token: For private repositories on the Hub.

    Returns:
        `target`.

    Raises:
        ValueError: If the model is not supported, the adapter is another model's or damaged, or a
            ratio lies outside its range. Nothing is attached then, an earlier adapter neither.
    """
    model = pipeline_transformer(target)
    remove(target)
    if not isinstance(adapter, ShivaAdapter):
        adapter = ShivaAdapter.from_pretrained(adapter, revision=revision, token=token)
    if schedule is not None and keep_ratio is not None:
        raise ValueError("pass either a schedule or a keep_ratio, not both.")
    adapter.check_fits(model)
    _check_weights(adapter)
    if keep_ratio is not None:
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}: the share KEPT.")
        schedule = adapter.policy.schedule(
            keep_ratio, adapter.config.num_bins, adapter.schedule.law
        )
    kind = adapter.config.backbone
    lora = lora_metadata(adapter.config) if kind in ("lora", "dora") else None
    backbone = TunedBackbone(model, adapter.backbone_weights, lora)
    try:
        attachment = attach(
            model,
            adapter.selector(),
            schedule or adapter.schedule,
            updates=adapter.updates,
            multiple=adapter.config.multiple if multiple is None else multiple,
            segments=segments,
            select_every=adapter.config.select_every if select_every is None else select_every,
            shares_halves=None if model is target else _halves(model, target),
        )
    except BaseException:
        backbone.restore()
        raise
    attachment.counts.clock = _clock(attachment, target, timesteps)
    attachment.backbone = backbone
    attachment.adapter = adapter
    logger.info(
        "shiva_dit: %d of %d blocks of %s pruned, %.1f%% of their tokens kept on average",
        len(attachment.schedule.prunable_blocks),
        attachment.schedule.num_blocks,
        type(model).__name__,
        100 * attachment.schedule.mean_keep_ratio,
    )
    return target


def _clock(attachment: Attachment, target: Any, timesteps: Sequence[float] | None) -> Clock | None:
    """Who knows a call's time, beside the call."""
    if timesteps is not None:
        return Clock(ListedTimes([float(attachment.spec.time(step)) for step in timesteps]))
    if attachment.model is not target and hasattr(target, "scheduler"):
        return Clock(SchedulerTimes(target))
    return None


def _check_weights(adapter: ShivaAdapter) -> None:
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


def _halves(model: Any, pipeline: Any) -> Callable[[Mapping[str, Any]], bool] | None:
    """Says of a call's arguments whether they hold both halves of guidance."""
    halves = model_spec(model).halves
    return None if halves is None else partial(halves, pipeline)


def remove(target: T) -> T:
    """Take the adapter off; the model is then as it was, to the bit. Without one, do nothing.

    Raises:
        RuntimeError: If the adapter's LoRA was fused into the model meanwhile: unfuse it first.
    """
    attachment = attachment_of(pipeline_transformer(target))
    if attachment is not None:
        attachment.detach()
    return target


@contextmanager
def disabled(target: Any) -> Iterator[None]:
    """Within: the dense model, its own weights included, for comparison.

    Raises:
        ValueError: If no adapter is attached.
    """
    attachment = _attached(target)
    before = attachment.enabled
    _enable(attachment, False)
    try:
        yield
    finally:
        _enable(attachment, before)


def _enable(attachment: Attachment, enabled: bool) -> None:
    if attachment.backbone is not None:
        attachment.backbone.enable(enabled)
    attachment.enabled = enabled


def compile(target: T, **options: Any) -> T:
    """Compile every block by itself (`fullgraph=True`): a few graphs, whatever the depth.

    Args:
        target: A pipeline or transformer with an adapter attached.
        **options: For `torch.compile`, such as `mode` or `backend`.

    Raises:
        ValueError: If no adapter is attached: apply first, then compile. If FirstBlockCache or
            MagCache is on: diffusers keeps these out of the compiler.
    """
    attachment = _attached(target)
    defaults: dict[str, Any] = {"fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # All blocks count as one for dynamo: dense and pruned, guided and not, each batch size.
        defaults["recompile_limit"] = RECOMPILE_LIMIT
    attachment.compile(**{**defaults, **options})
    return target


def cuda_graphs(target: T, *, limit: int = 64) -> T:
    """Capture forwards as CUDA graphs and replay them: launching kernels then costs nothing.

    One graph for each different row of token counts, shape of the arguments and set of weights;
    what comes for the first time runs as usual, and so do training and whatever watches the
    blocks. All graphs share one pool of memory. `apply(..., segments=, multiple=)` makes rows few.
    Compile first, if at all. Until `remove`.

    Args:
        target: A pipeline or transformer with an adapter attached, on a CUDA device.
        limit: Graphs at most; what comes beyond them runs as usual.

    Raises:
        ValueError: If no adapter is attached, the model isn't on a CUDA device, or something on
            it (offloading, caches) does what a replay would pass over.
    """
    attachment = _attached(target)
    device = next(attachment.model.parameters()).device
    if device.type != "cuda":
        raise ValueError(
            f"CUDA graphs need the model on a CUDA device, it is on {device}: move it there first."
        )
    attachment.use_graphs(CudaRecorder(), limit)
    return target


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportedModel:
    """What holds for a class of transformers."""

    name: str
    """As people call it."""
    model_class: str
    """Class in diffusers; subclasses count."""
    context: str
    """What routers read of the prompt, beside the tokens."""
    guidance: str
    """How its pipelines run the two passes of guidance: "one batch" or "in turn"."""
    learned_by: str
    """How its releases were trained: "flow matching", or by a "diffusion schedule", which training
    an adapter then needs."""


def supported() -> tuple[SupportedModel, ...]:
    """All classes that an adapter can be attached to."""
    return tuple(
        SupportedModel(
            name=spec.name,
            model_class=spec.model_class,
            context=spec.context_is,
            guidance="in turn" if spec.halves is None else "one batch",
            learned_by="diffusion schedule" if spec.diffusion else "flow matching",
        )
        for spec in MODELS.values()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What an attached adapter does, for one number of tokens. Prints as a table."""

    model_class: str
    """Class of the transformer."""
    num_tokens: int
    """N."""
    text_tokens: int
    """T."""
    law: str
    """Whose steps all means are over: those of a run, or a density of steps over time."""
    keep_ratio: float
    """Mean of k / N over all these steps and prunable blocks: of the executed integers."""
    flops_dense: int
    """FLOPs of one dense forward of one sample."""
    flops_pruned: int
    """The same with pruning, routers included, averaged over these steps."""
    rows: tuple[tuple[float, tuple[int, ...]], ...]
    """(t, k of every block), noisiest first: of each step of a run, or at a few times."""

    @property
    def flops_saved(self) -> float:
        """Share of the FLOPs saved, in [0, 1)."""
        return 1.0 - self.flops_pruned / self.flops_dense

    def __str__(self) -> str:
        blocks = len(self.rows[0][1])
        pruned = sum(any(row[b] < self.num_tokens for _, row in self.rows) for b in range(blocks))
        lines = [
            f"{self.model_class}: {pruned} of {blocks} blocks pruned, "
            f"{self.num_tokens} image tokens, {self.text_tokens} text tokens",
            f"kept on average {self.keep_ratio:.1%}; FLOPs {self.flops_pruned / 1e9:.4g} G of "
            f"{self.flops_dense / 1e9:.4g} G, {self.flops_saved:.1%} saved",
            f"    t  tokens kept, by block; means are over {self.law}",
        ]
        width = len(str(self.num_tokens))
        for t, row in self.rows:
            lines.append(f" {t:4.2f}  " + " ".join(f"{k:{width}d}" for k in row))
        return "\n".join(lines)


def summary(
    target: Any,
    *,
    num_tokens: int | None = None,
    text_tokens: int | None = None,
    num_inference_steps: int | None = None,
) -> Summary:
    """What is pruned and what it saves; print it, or read its fields.

    Args:
        target: A pipeline or transformer with an adapter attached.
        num_tokens: Image tokens N; those of the model's own `sample_size` by default.
        text_tokens: Text tokens T; as many as the model's pipelines use by default.
        num_inference_steps: What the pipeline will be called with: the summary is then what that
            run executes. Without it, it is for the `timesteps` given to `apply`, or else for the
            density of steps that the schedule was made for; a run meets the same mean over its own
            steps, by tokens that differ a little from these.

    Raises:
        ValueError: If no adapter is attached, or the model has no size of its own (Flux) and
            `num_tokens` is not given; for steps of a transformer without its pipeline.
    """
    attachment = _attached(target)
    model: Any = attachment.model
    num_tokens = _own_size(model) if num_tokens is None else num_tokens
    text_tokens = attachment.spec.text_tokens if text_tokens is None else text_tokens
    run, law = _run(attachment, target, num_tokens, num_inference_steps)
    table = attachment.counts.table(num_tokens, run)
    pruned = [float(attachment.flops(num_tokens, text_tokens, row)) for row in table.counts]
    times = (0.95, 0.75, 0.5, 0.25, 0.05) if run is None else run
    return Summary(
        model_class=attachment.spec.model_class,
        num_tokens=num_tokens,
        text_tokens=text_tokens,
        law=law,
        keep_ratio=table.mean_keep_ratio,
        flops_dense=attachment.spec.flops(model, num_tokens, text_tokens).dense(),
        flops_pruned=round(table.weighed(pruned)),
        rows=tuple((t, table.row(t)) for t in times),
    )


def _run(
    attachment: Attachment, target: Any, num_tokens: int, num_steps: int | None
) -> tuple[Run | None, str]:
    """The steps that a summary is over, if any are known, and their name."""
    clock = attachment.counts.clock
    if num_steps is None:
        if clock is not None and isinstance(clock.times, ListedTimes):
            run = clock.times.run
            return run, f"the {len(run)} timesteps given to apply"
        return None, f"the density of {attachment.schedule.law.name} steps"
    scheduler = getattr(target, "scheduler", None)
    if scheduler is None:
        raise ValueError(
            f"{type(target).__name__} has no scheduler to say what {num_steps} steps are: pass the "
            "pipeline, or the timesteps to apply."
        )
    config = getattr(target, "config", None)
    times = scheduler_times(
        scheduler, attachment.spec, num_tokens, num_steps, pipeline_config=config
    )
    return tuple(own_times(target, times)), f"{num_steps} steps of {type(scheduler).__name__}"


def _own_size(model: Any) -> int:
    """Image tokens of a model's own size."""
    side = model.config.get("sample_size")
    if side is None:
        raise ValueError(
            f"{type(model).__name__} has no size of its own: pass num_tokens (4096 for 1024x1024 "
            "pixels in patches of 16)."
        )
    return (side // model.config.patch_size) ** 2


def _attached(target: Any) -> Attachment:
    model = pipeline_transformer(target)
    attachment = attachment_of(model)
    if attachment is None:
        raise ValueError(
            f"no adapter is attached to this {type(model).__name__}: call shiva_dit.apply first."
        )
    return attachment
