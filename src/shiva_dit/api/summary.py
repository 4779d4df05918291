"""What an attached adapter does, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
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
    """N, references included."""
    text_tokens: int
    """T."""
    law: str
    """Whose steps all means are over: those of a run, or a density of steps over time."""
    keep_ratio: float
    """Mean of k / N over all these steps and prunable blocks: of the executed integers. Of the
    target's tokens, where references have a budget of their own."""
    flops_dense: int
    """FLOPs of one dense forward of one sample."""
    flops_pruned: int
    """The same with pruning, routers and whole steps included, averaged over these steps."""
    rows: tuple[tuple[float, tuple[int, ...]], ...]
    """(t, k of every block), noisiest first: of each step of a run, or at a few times. Of the
    target's tokens, as `keep_ratio`."""
    num_references: int = 0
    """How many of the N tokens are references' with a budget of their own."""
    references: tuple[int, ...] = ()
    """Their k of every block, at any time."""
    reference_keep_ratio: float | None = None
    """Mean of their k over the prunable blocks as a share of them; None where there are none."""
    whole_steps: tuple[int, ...] = ()
    """Steps, from 0, in which the unpruned model predicts (`shiva_dit.correct`)."""
    num_steps: int | None = None
    """Steps of the run that it makes, if the run is known."""
    transformer_2: Summary | None = None
    """The same of a pipeline's second transformer, if it has an adapter too."""

    @property
    def flops_saved(self) -> float:
        """Share of the FLOPs saved, in [0, 1)."""
        return 1.0 - self.flops_pruned / self.flops_dense

    @property
    def saved_by_both(self) -> float | None:
        """The same over the steps of both transformers; None where these aren't known."""
        both = [self] if self.transformer_2 is None else [self, self.transformer_2]
        if len(both) == 1 or any(one.num_steps is None for one in both):
            return None
        dense = sum((one.num_steps or 0) * one.flops_dense for one in both)
        return 1.0 - sum((one.num_steps or 0) * one.flops_pruned for one in both) / dense

    def __str__(self) -> str:
        blocks = len(self.rows[0][1])
        targets = self.num_tokens - self.num_references
        kept = self.references or (0,) * blocks
        pruned = sum(
            any(row[b] + kept[b] < self.num_tokens for _, row in self.rows) for b in range(blocks)
        )
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
        if self.reference_keep_ratio is not None:
            lines[0] = (
                f"{self.model_class}: {pruned} of {blocks} blocks pruned, {targets} image tokens "
                f"and {self.num_references} of references, {self.text_tokens} text tokens"
            )
            of_references = f"and {self.reference_keep_ratio:.1%} of the references'; FLOPs"
            lines[1] = lines[1].replace("; FLOPs", f" {of_references}")
        width = len(str(self.num_tokens))
        for t, row in self.rows:
            lines.append(f" {t:4.2f}  " + " ".join(f"{k:{width}d}" for k in row))
        if self.reference_keep_ratio is not None:
            told = " ".join(f"{k:{width}d}" for k in self.references)
            lines.append(f"  ref  {told}")
        if self.transformer_2 is not None:
            lines += ["the second transformer:", str(self.transformer_2)]
            if self.saved_by_both is not None:
                lines.append(f"both together: {self.saved_by_both:.1%} of a run's FLOPs saved")
        return "\n".join(lines)


def summary(
    target: Any,
    *,
    num_tokens: int | None = None,
    text_tokens: int | None = None,
    num_inference_steps: int | None = None,
    num_references: int | None = None,
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
        num_references: How many of the N tokens are references', where these have a budget of their
            own; by default as many as in the last forward, or none with another N.

    Raises:
        ValueError: If no adapter is attached, or no forward has run of a model whose config
            states no size (Flux) and `num_tokens` is not given; for steps of a transformer without
            its pipeline; with whole steps, if the number of steps isn't known; for references
            without a budget.
    """
    attachment = attached(target)
    asked = {"num_tokens": num_tokens, "num_inference_steps": num_inference_steps}
    for name, value in asked.items():
        if value is not None:
            whole_number(name, value, least=1, most=10**8 if name == "num_tokens" else 10_000)
    if text_tokens is not None:
        whole_number("text_tokens", text_tokens, least=0)
    num_references = _references(attachment, num_tokens, num_references)
    num_tokens = _own_size(attachment) if num_tokens is None else num_tokens
    if num_references >= num_tokens:
        raise ValueError(
            f"num_tokens are the target's and the references' together, {num_tokens}, and "
            f"num_references {num_references} of them: some must be the target's."
        )
    text_tokens = attachment.spec.text_tokens if text_tokens is None else text_tokens
    sizes = num_tokens, text_tokens, num_references
    first = _summary(attachment, target, sizes, num_inference_steps)
    second = _second_summary(target, sizes, num_inference_steps)
    return first if second is None else replace(first, transformer_2=second)


def _summary(
    attachment: Attachment,
    target: Any,
    sizes: tuple[int, int, int],
    num_inference_steps: int | None,
) -> Summary:
    """What one attachment does, for N, T, and how many of N are references'."""
    model: Any = attachment.model
    num_tokens, text_tokens, num_references = sizes
    targets, counts = num_tokens - num_references, attachment.counts
    run, law = _run(attachment, target, (num_tokens, num_references), num_inference_steps)
    table = counts.table(targets, run)
    kept = counts.reference_row(num_references) if num_references else ()
    last, by_frame = attachment.forwards, bool(num_references)
    if num_references == last.num_references:  # some tell each token the same time
        by_frame = last.by_frame
    by_frame = by_frame and attachment.spec.token_times != "one"

    def flops(row: Sequence[int]) -> float:
        row = [k + kept[block] for block, k in enumerate(row)] if kept else row
        return float(pruned_flops(attachment, num_tokens, text_tokens, row, by_frame))

    pruned = [flops(row) for row in table.counts]
    times = (0.95, 0.75, 0.5, 0.25, 0.05) if run is None else run
    dense = model_flops(model, num_tokens, text_tokens, by_frame).dense()
    mean, whole = table.weighed(pruned), attachment.whole_steps
    if whole is not None:
        if run is None:
            raise ValueError(
                "what whole steps cost depends on how many steps a run has: pass "
                "num_inference_steps, or take them off by shiva_dit.correct(target, 0)."
            )
        at = whole.of(len(run))
        spared = [run[step] for step in whole.unread(len(run))]
        less = [flops(table.row(t)) for t in spared]
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
        num_steps=None if run is None else len(run),
        whole_steps=() if whole is None or run is None else whole.of(len(run)),
        num_references=num_references,
        references=kept,
        reference_keep_ratio=_mean_kept(attachment, kept, num_references),
    )


def _mean_kept(attachment: Attachment, kept: Sequence[int], references: int) -> float | None:
    """Mean share of references' tokens kept over the prunable blocks."""
    if not kept:
        return None
    prunable = attachment.schedule.prunable_blocks
    return sum(kept[b] for b in prunable) / (references * len(prunable)) if prunable else 1.0


def _references(attachment: Attachment, num_tokens: int | None, asked: int | None) -> int:
    """How many tokens are references' with a budget of their own."""
    last = attachment.forwards
    if asked is None:
        return last.num_references if num_tokens in (None, last.num_tokens) else 0
    whole_number("num_references", asked, least=0)
    if asked and attachment.counts.references is None:
        raise ValueError(
            "references have no budget of their own here: leave num_references out, or apply with "
            "reference_keep_ratio."
        )
    return asked


def _second_summary(
    target: Any, sizes: tuple[int, int, int], num_steps: int | None
) -> Summary | None:
    second = attachments(target)[1:]
    return _summary(second[0], target, sizes, num_steps) if second else None


def _run(
    attachment: Attachment, target: Any, sizes: tuple[int, int], num_steps: int | None
) -> tuple[Run | None, str]:
    """The steps that a summary is over, if any are known, and their name.

    They may be shifted by N: without the tokens of pictures to go by, with those of clean frames.
    """
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
    num_tokens, references = sizes
    sampler = Sampler.of(target, attachment.model)
    law = f"{num_steps} steps of {type(scheduler).__name__}"
    if sampler.is_shifted_by_target:
        # A picture that is given counts as tokens, but does not shift the times.
        last = attachment.forwards
        is_last = num_tokens - references == (last.num_tokens or 0) - last.num_references
        executed = clock.times.run if clock is not None and is_last else None
        if executed is not None and len(executed) == num_steps:
            return executed, f"{law}, as last executed"
        law += ", shifted as without a picture given"
    shifting = num_tokens if attachment.spec.token_times != "one" else num_tokens - references
    return tuple(sampler.times(attachment.spec, shifting, num_steps)), law


def _own_size(attachment: Attachment) -> int:
    """Image tokens of the last forward, else of the size that the model's config states."""
    size = attachment.forwards.num_tokens or attachment.spec.own_tokens(attachment.model)
    if size is None:
        raise ValueError(
            f"the config of {type(attachment.model).__name__} states no size, and no forward has "
            "run with the adapter on: pass num_tokens, or generate once first."
        )
    return size
