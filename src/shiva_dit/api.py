"""What `import shiva_dit` offers: apply, remove, disabled, compile, summary, supported."""

from __future__ import annotations

import copy
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
from shiva_dit.models.attach import Attachment, attachment_of, exchange
from shiva_dit.models.backbone import first_not_finite, pipeline_transformer
from shiva_dit.models.clock import Clock, ListedTimes, SchedulerTimes
from shiva_dit.models.families import MODELS, model_spec
from shiva_dit.models.graphs import CudaRecorder
from shiva_dit.models.places import PLAIN
from shiva_dit.models.tuned import TunedBackbone

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
    merge: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> T:
    """Attach an adapter to a pipeline or a transformer, in place of an earlier one.

    Weights of the backbone that the adapter brings along (LoRA, or the whole state) are put on,
    and stay on whatever LoRAs of your own you load, choose, fuse or disable afterwards. At ratio 1
    and without such weights images are the same as before. No state is kept between calls, and one
    forward runs at a time.

    Guidance shares the selection if `target` is a pipeline: both halves of one call keep the
    tokens that either wants; where the passes come one after the other and the pipeline names
    them (`cache_context`), the unconditional one keeps the conditional one's. A bare transformer
    never shares within a call.

    Args:
        target: A diffusers pipeline, or its transformer.
        adapter: A `ShivaAdapter`, a folder, or a Hub id "user/name".
        schedule: Keep ratios to use instead of the adapter's.
        keep_ratio: Mean keep ratio in (0, 1] to move the adapter's policy to; 1 keeps all tokens.
            Far from what the adapter was trained for (`ShivaAdapter.trained_for`), a warning is
            logged.
        multiple: Round the number of tokens kept to a multiple of this; the adapter's by default.
        segments: At most so many different numbers of tokens per block over time
            (`Schedule.for_tokens`): few shapes, for CUDA graphs. As many as time bins by default.
        select_every: So many prunable blocks in a row share the scores of their first: 2 halves
            what choosing costs. The adapter's by default.
        timesteps: What the model will be called with, one entry per call, in its own units; then
            from the start again. On a GPU, calls then need not wait for the device to say what
            time it is. A pipeline needs none: its scheduler says so after a run's first step.
        merge: Whether a LoRA or DoRA of the adapter is merged into the layers that are plain: it
            then costs nothing, and the model's own weights lie on the host until `remove`. False
            leaves them alone, for adapters that are switched often.
        revision: Branch, tag or commit, for a Hub id.
        token: For private repositories on the Hub.

    Returns:
        `target`.

    Raises:
        ValueError: If the model is not supported, the adapter is another model's or damaged, or a
            ratio lies outside its range. Nothing has changed then: an earlier adapter stays on.
        RuntimeError: If an earlier adapter can't be taken off (see `remove`).
    """
    model = pipeline_transformer(target)
    model_spec(model)
    if not isinstance(adapter, ShivaAdapter):
        adapter = ShivaAdapter.from_pretrained(adapter, revision=revision, token=token)
    if schedule is not None and keep_ratio is not None:
        raise ValueError("pass either a schedule or a keep_ratio, not both.")
    adapter.check_fits(model)
    _check_weights(adapter)
    if keep_ratio is not None:
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}: the share KEPT.")
        schedule = adapter.policy.schedule(keep_ratio, adapter.config.num_bins)
    if schedule is not None:
        adapter.warn_if_far(schedule)
    attachment = Attachment(
        model,
        copy.deepcopy(adapter.selector()),  # its own: a model moves it to its device
        schedule or adapter.schedule,
        updates=copy.deepcopy(adapter.updates),
        multiple=adapter.config.multiple if multiple is None else multiple,
        segments=segments,
        select_every=adapter.config.select_every if select_every is None else select_every,
        shares_halves=None if model is target else _halves(model, target),
        backbone=_backbone(model, adapter, merge),
    )
    attachment.counts.clock = _clock(attachment, target, timesteps)
    attachment.adapter = adapter
    exchange(attachment_of(model), attachment)
    logger.info(
        "shiva_dit: %d of %d blocks of %s pruned, %.1f%% of their tokens kept on average",
        len(attachment.schedule.prunable_blocks),
        attachment.schedule.num_blocks,
        type(model).__name__,
        100 * attachment.schedule.mean_keep_ratio,
    )
    return target


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


def _clock(attachment: Attachment, target: Any, timesteps: Sequence[float] | None) -> Clock | None:
    """Who knows a call's time, beside the call."""
    if timesteps is not None:
        return Clock(ListedTimes([float(attachment.spec.time(step)) for step in timesteps]))
    if attachment.model is not target and hasattr(target, "scheduler"):
        return Clock(SchedulerTimes(target))
    return None


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


def _halves(model: Any, pipeline: Any) -> Callable[[Mapping[str, Any]], bool] | None:
    """Says of a call's arguments whether they hold both halves of guidance."""
    halves = model_spec(model).halves
    return None if halves is None else partial(halves, pipeline)


def remove(target: T) -> T:
    """Take the adapter off; the model is then as it was, to the bit. Without one, do nothing.

    LoRAs of your own stay as they are, fused ones included. A forward that runs in another thread
    is waited for.

    Raises:
        RuntimeError: If the model's own weights can't be given back, since those of the adapter
            were quantised, sharded or changed while they stood in their place; or from inside a
            forward. Nothing has changed then.
    """
    attachment = attachment_of(pipeline_transformer(target))
    if attachment is not None:
        attachment.detach()
    return target


@contextmanager
def disabled(target: Any) -> Iterator[None]:
    """Within: the dense model, its own weights included, for comparison.

    A forward that runs in another thread is waited for.

    Raises:
        ValueError: If no adapter is attached.
        RuntimeError: As `remove`.
    """
    attachment = _attached(target)
    before = attachment.enabled
    attachment.enable(False)
    try:
        yield
    finally:
        attachment.enable(before)


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


def cuda_graphs(target: T, *, limit: int = 128) -> T:
    """Capture forwards as CUDA graphs and replay them: launching kernels then costs nothing.

    One graph for each different row of token counts, shape of the arguments and set of weights, or
    two where the passes of guidance run in turn; what comes for the first time (the first image)
    runs as usual, and so do training and whatever watches the blocks. All graphs share one pool of
    memory. `apply(..., segments=, multiple=)` makes rows few. Compile first, if at all. Until
    `remove`.

    Args:
        target: A pipeline or transformer with an adapter attached, on a CUDA device.
        limit: Rows, shapes and weights at most that have graphs: the 64 rows of a learned schedule
            for two shapes by default. If more of them come in turn, what is beyond runs as usual,
            and a warning says how much; one that no longer comes makes room.

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
    keep_ratio: float
    """Mean of k / N over all time bins and prunable blocks: of the executed integers."""
    flops_dense: int
    """FLOPs of one dense forward of one sample."""
    flops_pruned: int
    """The same with pruning, routers included, averaged over the time bins."""
    rows: tuple[tuple[float, tuple[int, ...]], ...]
    """(t, k of every block) at a few times, noisiest first."""

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
            "    t  tokens kept, by block",
        ]
        width = len(str(self.num_tokens))
        for t, row in self.rows:
            lines.append(f" {t:4.2f}  " + " ".join(f"{k:{width}d}" for k in row))
        return "\n".join(lines)


def summary(
    target: Any, *, num_tokens: int | None = None, text_tokens: int | None = None
) -> Summary:
    """What is pruned and what it saves; print it, or read its fields.

    Args:
        target: A pipeline or transformer with an adapter attached.
        num_tokens: Image tokens N; those of the model's own `sample_size` by default.
        text_tokens: Text tokens T; as many as the model's pipelines use by default.

    Raises:
        ValueError: If no adapter is attached, or the model has no size of its own (Flux) and
            `num_tokens` is not given.
    """
    attachment = _attached(target)
    model: Any = attachment.model
    num_tokens = _own_size(model) if num_tokens is None else num_tokens
    text_tokens = attachment.spec.text_tokens if text_tokens is None else text_tokens
    table = attachment.counts.table(num_tokens)
    pruned = [attachment.flops(num_tokens, text_tokens, row) for row in table.counts]
    times = (0.95, 0.75, 0.5, 0.25, 0.05)
    return Summary(
        model_class=attachment.spec.model_class,
        num_tokens=num_tokens,
        text_tokens=text_tokens,
        keep_ratio=table.mean_keep_ratio,
        flops_dense=attachment.spec.flops(model, num_tokens, text_tokens).dense(),
        flops_pruned=round(sum(pruned) / len(pruned)),
        rows=tuple((t, table.row(t)) for t in times),
    )


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
