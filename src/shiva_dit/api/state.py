"""An adapter that is on: taken off, off for a while, guided, corrected, compiled, replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from shiva_dit.api.attached import all_attached, attachments, reductions
from shiva_dit.models.attach import detach_all, paused
from shiva_dit.models.compiling import compile_options
from shiva_dit.models.correction import HALF_LIFE, WholeSteps
from shiva_dit.models.graphs import CudaRecorder
from shiva_dit.models.guidance import Pass
from shiva_dit.models.runs import OwnRun
from shiva_dit.models.target import transformers_of

T = TypeVar("T")


def remove(target: T) -> T:
    """Take the adapter or reducer off; the model is then as it was, to the bit.

    Without one, do nothing.

    LoRAs of your own stay as they are, fused ones included. A forward that runs in another thread
    is waited for.

    Raises:
        RuntimeError: If the model's own weights can't be given back, since those of the adapter
            were quantised, sharded or changed while they stood in their place; or from inside a
            forward. Nothing has changed then.
    """
    detach_all([*attachments(target), *reductions(target)])
    return target


@contextmanager
def disabled(target: Any) -> Iterator[None]:
    """Within: the dense model, its own weights included, for comparison; reducers are off too.

    Those that overlap, in several threads or tasks, last until the last one ends; an adapter that
    is applied within comes on then. A forward that runs in another thread is waited for.

    Raises:
        ValueError: If no adapter is attached, nor a reducer.
        RuntimeError: As `remove`.
    """
    if not reductions(target):
        all_attached(target)
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
        target: A pipeline or transformer with an adapter attached, or with a reducer.
        passes: "cond": the conditional pass of two, one call after the other; "uncond": the other
            one, which follows it and keeps its tokens; "both": both in one batch, as two halves
            in either order, which keep the tokens that either wants; "alone": every sample
            chooses for itself.

    Raises:
        ValueError: If no adapter is attached, or for another word.
    """
    known = [which.value for which in Pass if which is not Pass.PAIR]
    if passes not in known:
        raise ValueError(f"passes must be one of {', '.join(known)}; got {passes!r}.")
    with ExitStack() as stack:
        for attached in reductions(target) or all_attached(target):
            stack.enter_context(attached.passes.told(Pass(passes)))
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
    for attachment in all_attached(target):
        attachment.compile(**{**compile_options(), **options})
    return target


def correct(target: T, whole_steps: Any = 2, *, half_life: float = HALF_LIFE) -> T:
    """Let the unpruned model predict as well in a few steps of each run, and correct the others.

    At a whole step its prediction is taken, and what the pruned one's lacks of it is added to those
    that follow, the less the later. A whole step costs a forward of the unpruned model more; tuned
    weights then stand on the device together with the model's own. Until `remove`, or
    until another adapter is applied.

    Args:
        target: A pipeline or transformer with an adapter attached, or with a reducer.
        whole_steps: How many of a run's steps are whole: of 12 steps two are the 3rd and the 8th.
            Or a list of which ones, counted from 0. 0: none any more.
        half_life: The share of a run's steps after which half of a correction is left; `math.inf`:
            it holds until the next whole step, which is better without guidance.

    Raises:
        ValueError: If nothing is attached, or for numbers out of range. In a run: if nothing says
            which step a call is (`steps`); if FirstBlockCache, MagCache or cache-dit is on; in a
            whole step with gradients, which tuned weights don't let through.
    """
    if isinstance(whole_steps, list):
        whole_steps = tuple(whole_steps)
    if not isinstance(whole_steps, (int, tuple)):
        raise ValueError(
            f"whole_steps must be a whole number, or a list of them, got {whole_steps!r}."
        )
    whole = WholeSteps(whole_steps, half_life)
    for attached in reductions(target) or all_attached(target):
        attached.correct(whole if whole.steps else None)
    return target


def steps(target: Any, num_steps: int) -> OwnRun:
    """A run of a loop of your own, for whole steps and reducers that go by steps.

    Pipelines of diffusers need none of this. Each run has a memory of its own: begin one for every
    image or batch.

    Args:
        target: A transformer with an adapter attached, or with a reducer.
        num_steps: How many steps it has: `with run.step(i):` lies around the calls of each.

    Raises:
        ValueError: If nothing is attached, or to two transformers.
    """
    found = reductions(target) or all_attached(target)
    if len(found) > 1:
        raise ValueError("pass the transformer whose steps these are: the pipeline has two.")
    return OwnRun(found[0].runs, num_steps)


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
    found = all_attached(target)
    for attachment in found:
        device = next(attachment.model.parameters()).device
        if device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need the model on a CUDA device, it is on {device}: move it there "
                "first."
            )
    for attachment in found:
        attachment.use_graphs(CudaRecorder(), limit)
    return target
