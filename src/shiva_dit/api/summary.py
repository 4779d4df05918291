"""What an attached adapter does, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from shiva_dit.api.attached import attached, attachments
from shiva_dit.config import whole_number
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.clock import ListedTimes, Run
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_flops
from shiva_dit.models.sampling import Sampler


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
    """The same with pruning, routers and whole steps included, averaged over these steps."""
    rows: tuple[tuple[float, tuple[int, ...]], ...]
    """(t, k of every block), noisiest first: of each step of a run, or at a few times."""
    whole_steps: tuple[int, ...] = ()
    """Steps, from 0, in which the unpruned model predicts (`shiva_dit.correct`)."""
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
        if self.whole_steps:
            steps = ", ".join(str(step + 1) for step in self.whole_steps)
            lines.insert(2, f"the unpruned model predicts in step {steps} as well")
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
            its pipeline; with whole steps, if the number of steps isn't known.
    """
    attachment = attached(target)
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
    dense = model_flops(model, num_tokens, text_tokens).dense()
    mean, whole = table.weighed(pruned), attachment.whole_steps
    if whole is not None:
        if run is None:
            raise ValueError(
                "what whole steps cost depends on how many steps a run has: pass "
                "num_inference_steps, or take them off by shiva_dit.correct(target, 0)."
            )
        at = whole.of(len(run))
        spared = [run[step] for step in whole.unread(len(run))]
        less = [
            float(pruned_flops(attachment, num_tokens, text_tokens, table.row(t))) for t in spared
        ]
        mean += (len(at) * dense - sum(less)) / len(run)
    return Summary(
        model_class=attachment.spec.model_class,
        num_tokens=num_tokens,
        text_tokens=text_tokens,
        law=law,
        keep_ratio=table.mean_keep_ratio,
        flops_dense=dense,
        flops_pruned=round(mean),
        rows=tuple((t, table.row(t)) for t in times),
        whole_steps=() if whole is None or run is None else whole.of(len(run)),
    )


def _second_summary(
    target: Any, num_tokens: int, text_tokens: int, num_steps: int | None
) -> Summary | None:
    second = attachments(target)[1:]
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
