"""What `import shiva_dit` offers: apply, remove, disabled, compile, summary, supported."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from shiva_dit.adapter import ShivaAdapter, lora_metadata
from shiva_dit.config import finite_number, whole_number
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import attachment_of, detach_all, exchange, paused
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.backbone import first_not_finite
from shiva_dit.models.clock import Clock, ListedTimes, Run, SchedulerTimes
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_flops
from shiva_dit.models.families import MODELS
from shiva_dit.models.graphs import CudaRecorder
from shiva_dit.models.guidance import Pass
from shiva_dit.models.places import PLAIN
from shiva_dit.models.sampling import Sampler
from shiva_dit.models.target import pipeline_transformer, transformers_of
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
            from the start again. The mean keep ratio is met over this list, and on a GPU calls
            need not wait for the device to say what time it is. A pipeline needs none: its
            scheduler says so after a run's first step.
        merge: Whether a LoRA or DoRA of the adapter is merged into the layers that are plain: it
            then costs nothing, and the model's own weights lie on the host until `remove`. False
            leaves them alone, for adapters that are switched often.
        transformer_2: The adapter of the pipeline's second transformer, where it has one (Wan
            2.2); else that one stays dense. All other options hold for both.
        revision: Branch, tag or commit, for a Hub id.
        token: For private repositories on the Hub.

    Returns:
        `target`.

    Raises:
        ValueError: If the model is not supported, the adapter is another model's or damaged, or a
            ratio lies outside its range. Nothing has changed then: an earlier adapter stays on.
        RuntimeError: If an earlier adapter can't be taken off (see `remove`).
    """
    models = transformers_of(target)
    _check_second(target, models, transformer_2, timesteps)
    numbers = {"multiple": multiple, "segments": segments, "select_every": select_every}
    _check_numbers(schedule, keep_ratio, numbers)
    made = []
    for model, source in zip(models, (adapter, transformer_2), strict=False):
        if source is None:
            continue
        if not isinstance(source, ShivaAdapter):
            source = ShivaAdapter.from_pretrained(source, revision=revision, token=token)
        source.check_fits(model)
        _check_weights(source)
        attachment = Attachment(
            model,
            copy.deepcopy(source.selector()),  # its own: a model moves it to its device
            _schedule(source, schedule, keep_ratio),
            updates=copy.deepcopy(source.updates),
            multiple=source.config.multiple if multiple is None else multiple,
            segments=segments,
            select_every=source.config.select_every if select_every is None else select_every,
            backbone=_backbone(model, source, merge),
            freeze=True,
        )
        attachment.counts.clock = _clock(attachment, target, timesteps)
        attachment.adapter = source
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


def _check_second(
    target: Any, models: Sequence[Any], adapter: object, timesteps: Sequence[float] | None
) -> None:
    """Whether an adapter for a second transformer has one to go to, and the other way round."""
    if adapter is not None and len(models) == 1:
        raise ValueError(
            f"transformer_2 was passed, but {type(target).__name__} has one transformer alone: "
            "pass one adapter."
        )
    if adapter is not None and timesteps is not None:
        raise ValueError(
            "timesteps name the calls of one model, and two share the steps of this pipeline: "
            "leave them out; its scheduler says what time it is."
        )
    if adapter is None and len(models) > 1:
        logger.warning(
            "shiva_dit: the pipeline's second transformer stays dense: pass its adapter as "
            "apply(pipe, adapter, transformer_2=...)."
        )


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


def _clock(attachment: Attachment, target: Any, timesteps: Sequence[float] | None) -> Clock | None:
    """Who knows a call's time, beside the call."""
    if timesteps is not None:
        if isinstance(timesteps, str) or not isinstance(timesteps, Iterable):
            raise ValueError(f"timesteps must be a list of numbers, got {timesteps!r}.")
        steps = [finite_number("timesteps", _plain(step)) for step in timesteps]
        return Clock(ListedTimes([float(attachment.spec.time(step)) for step in steps]))
    if attachment.model is not target and hasattr(target, "scheduler"):
        return Clock(SchedulerTimes(target, attachment.model))
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


def remove(target: T) -> T:
    """Take the adapter off; the model is then as it was, to the bit. Without one, do nothing.

    LoRAs of your own stay as they are, fused ones included. A forward that runs in another thread
    is waited for.

    Raises:
        RuntimeError: If the model's own weights can't be given back, since those of the adapter
            were quantised, sharded or changed while they stood in their place; or from inside a
            forward. Nothing has changed then.
    """
    detach_all(_attachments(target))
    return target


@contextmanager
def disabled(target: Any) -> Iterator[None]:
    """Within: the dense model, its own weights included, for comparison.

    Those that overlap, in several threads or tasks, last until the last one ends; an adapter that
    is applied within comes on then. A forward that runs in another thread is waited for.

    Raises:
        ValueError: If no adapter is attached.
        RuntimeError: As `remove`.
    """
    _all_attached(target)
    with ExitStack() as stack:
        for model in transformers_of(target):
            stack.enter_context(paused(model))
        yield


@contextmanager
def guided(target: Any, passes: str) -> Iterator[None]:
    """Within: every call is this pass of guidance; for loops of your own, or to overrule.

    diffusers' pipelines need none of this: how their calls are guided is read from them. It holds
    for the thread (or the task of asyncio) that says it and no other; two calls in turn that share
    their tokens must be made by one thread.

    Args:
        target: A pipeline or transformer with an adapter attached.
        passes: "cond": the conditional pass of two, one call after the other; "uncond": the other
            one, which follows it and keeps its tokens; "both": both in one batch, as two halves
            in either order, which keep the tokens that either wants; "alone": every sample
            chooses for itself.

    Raises:
        ValueError: If no adapter is attached, or for another word.
    """
    known = [which.value for which in Pass]
    if passes not in known:
        raise ValueError(f"passes must be one of {', '.join(known)}; got {passes!r}.")
    with ExitStack() as stack:
        for attachment in _all_attached(target):
            stack.enter_context(attachment.passes.told(Pass(passes)))
        yield


def compile(target: T, **options: Any) -> T:
    """Compile every block by itself (`fullgraph=True`): a few graphs, whatever the depth.

    Args:
        target: A pipeline or transformer with an adapter attached.
        **options: For `torch.compile`, such as `mode` or `backend`.

    Raises:
        ValueError: If no adapter is attached: apply first, then compile. If FirstBlockCache or
            MagCache is on: diffusers keeps these out of the compiler.
    """
    defaults: dict[str, Any] = {"fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # All blocks count as one for dynamo: dense and pruned, guided and not, each batch size.
        defaults["recompile_limit"] = RECOMPILE_LIMIT
    for attachment in _all_attached(target):
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
    attachments = _all_attached(target)
    for attachment in attachments:
        device = next(attachment.model.parameters()).device
        if device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need the model on a CUDA device, it is on {device}: move it there "
                "first."
            )
    for attachment in attachments:
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
            guidance=spec.guidance,
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
    transformer_2: Summary | None = None
    """The same of a pipeline's second transformer, if it has an adapter too."""

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
        if self.transformer_2 is not None:
            lines += ["the second transformer:", str(self.transformer_2)]
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
        num_tokens: Image tokens N; by default those of the last forward with the adapter on, and
            if none has run, those of the size that the model's config states.
        text_tokens: Text tokens T; as many as the model's pipelines use by default.
        num_inference_steps: What the pipeline will be called with: the summary is then what that
            run executes. Without it, it is for the `timesteps` given to `apply`, or else for the
            density of steps that the schedule was made for; a run meets the same mean over its own
            steps, by tokens that differ a little from these.

    Raises:
        ValueError: If no adapter is attached, or no forward has run of a model whose config
            states no size (Flux) and `num_tokens` is not given; for steps of a transformer without
            its pipeline.
    """
    attachment = _attached(target)
    asked = {"num_tokens": num_tokens, "num_inference_steps": num_inference_steps}
    for name, value in asked.items():
        if value is not None:
            whole_number(name, value, least=1, most=10**8 if name == "num_tokens" else 10_000)
    if text_tokens is not None:
        whole_number("text_tokens", text_tokens, least=0)
    num_tokens = _own_size(attachment) if num_tokens is None else num_tokens
    text_tokens = attachment.spec.text_tokens if text_tokens is None else text_tokens
    first = _summary(attachment, target, num_tokens, text_tokens, num_inference_steps)
    second = _second_summary(target, num_tokens, text_tokens, num_inference_steps)
    return first if second is None else replace(first, transformer_2=second)


def _summary(
    attachment: Attachment,
    target: Any,
    num_tokens: int,
    text_tokens: int,
    num_inference_steps: int | None,
) -> Summary:
    """What one attachment does."""
    model: Any = attachment.model
    run, law = _run(attachment, target, num_tokens, num_inference_steps)
    table = attachment.counts.table(num_tokens, run)
    pruned = [float(pruned_flops(attachment, num_tokens, text_tokens, row)) for row in table.counts]
    times = (0.95, 0.75, 0.5, 0.25, 0.05) if run is None else run
    return Summary(
        model_class=attachment.spec.model_class,
        num_tokens=num_tokens,
        text_tokens=text_tokens,
        law=law,
        keep_ratio=table.mean_keep_ratio,
        flops_dense=model_flops(model, num_tokens, text_tokens).dense(),
        flops_pruned=round(table.weighed(pruned)),
        rows=tuple((t, table.row(t)) for t in times),
    )


def _second_summary(
    target: Any, num_tokens: int, text_tokens: int, num_steps: int | None
) -> Summary | None:
    second = _attachments(target)[1:]
    if not second:
        return None
    return _summary(second[0], target, num_tokens, text_tokens, num_steps)


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
    sampler = Sampler.of(target, attachment.model)
    law = f"{num_steps} steps of {type(scheduler).__name__}"
    if sampler.is_shifted_by_target:
        # A picture that is given counts as tokens, but does not shift the times.
        is_last = num_tokens == attachment.forwards.num_tokens
        executed = clock.times.run if clock is not None and is_last else None
        if executed is not None and len(executed) == num_steps:
            return executed, f"{law}, as last executed"
        law += ", shifted as without a picture given"
    return tuple(sampler.times(attachment.spec, num_tokens, num_steps)), law


def _own_size(attachment: Attachment) -> int:
    """Image tokens of the last forward, else of the size that the model's config states."""
    size = attachment.forwards.num_tokens or attachment.spec.own_tokens(attachment.model)
    if size is None:
        raise ValueError(
            f"the config of {type(attachment.model).__name__} states no size, and no forward has "
            "run with the adapter on: pass num_tokens, or generate once first."
        )
    return size


def _attachments(target: Any) -> list[Attachment]:
    """What is attached to the transformers of a target, in order."""
    found = [attachment_of(model) for model in transformers_of(target)]
    return [attachment for attachment in found if attachment is not None]


def _all_attached(target: Any) -> list[Attachment]:
    return _attachments(target) or [_attached(target)]


def _attached(target: Any) -> Attachment:
    model = pipeline_transformer(target)
    attachment = attachment_of(model)
    if attachment is None:
        raise ValueError(
            f"no adapter is attached to this {type(model).__name__}: call shiva_dit.apply first."
        )
    return attachment
