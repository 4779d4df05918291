"""A model's forward at one row of counts, as a program of torch's own that needs none of our code.

What differs from one call of a sampling to the next is what a program has for good: how many tokens
each block keeps, which pass of guidance runs, shapes, and values that are no tensors. `calls_of`
watches a run for calls that differ so; `program_of` traces one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import ExportedProgram
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves, tree_map

from shiva_dit.models.attachment import Attachment
from shiva_dit.models.guidance import Pass
from shiva_dit.models.neighbours import strange_hook
from shiva_dit.models.spec import bind, given
from shiva_dit.models.token_times import Layout


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What a program is made of."""

    model: str
    """Class of the model."""
    inputs: dict[str, Any]
    """Arguments by name that are tensors, or hold some."""
    constants: dict[str, Any]
    """All others."""
    counts: tuple[int, ...]
    """k of every block."""
    which: Pass
    """The pass of guidance."""
    layout: Layout
    """Which of a sample's tokens have its time, and which are clean."""
    output: Any
    """What the model gave: a tensor, or a tuple of several."""


@dataclass(slots=True)
class Calls:
    """The calls of a run."""

    different: list[Call] = field(default_factory=list)
    """The first of each kind."""
    steps: list[tuple[float, int]] = field(default_factory=list)
    """Of every call its timestep, as the model was given it (that of noisy tokens, where each has
    one), and its place among the different."""


class Forward(nn.Module):
    """A model with its adapter, of which the tensors are the only arguments.

    Args:
        attachment: On the model.
        constants: All other arguments.
    """

    def __init__(self, attachment: Attachment, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = attachment.model
        self.learned = nn.ModuleList(attachment.learned)
        self.constants = dict(constants)
        self.train(attachment.model.training)

    def forward(self, **inputs: Any) -> Any:
        """The model's prediction; a tuple where it gives several tensors."""
        return plain_output(self.model(**inputs, **self.constants, return_dict=False))


class ForwardOf(nn.Module):
    """The same, with its weights as the first argument instead of its own.

    Args:
        forward: What it calls.
    """

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._held = (forward,)  # no submodule: its weights are not this one's

    def forward(self, weights: dict[str, Tensor], **inputs: Any) -> Any:
        """The model's prediction."""
        return functional_call(self._held[0], weights, (), inputs)


def weights_of(attachment: Attachment) -> dict[str, Tensor]:
    """All weights of a model and its adapter, contiguous, by name and in the names' order.

    Raises:
        ValueError: If some are no plain tensors: quantised, sharded or offloaded ones.
    """
    forward = Forward(attachment, {})
    found = {**dict(forward.named_parameters()), **dict(forward.named_buffers())}
    for name, value in found.items():
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta:
            kind = "lies on the meta device" if value.is_meta else f"is a {type(value).__name__}"
            raise ValueError(
                f"{name.removeprefix('model.')} {kind}, and programs of a run share plain weights: "
                "load the model without quantisation, sharding and offloading, and apply again."
            )
    return {name: found[name].detach().contiguous() for name in sorted(found)}


def program_of(
    attachment: Attachment, call: Call, weights: dict[str, Tensor] | None = None
) -> ExportedProgram:
    """Trace the model's forward at a call's counts.

    Args:
        attachment: On the model that was called.
        call: By `calls_of`, from an attachment that hasn't changed since.
        weights: By `weights_of`; they become the program's first argument. None: it has its own.

    Raises:
        ValueError: If torch can't trace the model.
    """
    own = Forward(attachment, call.constants)
    forward: nn.Module = own
    args: tuple[Any, ...] = ()
    if weights is not None:
        forward, args = ForwardOf(own).train(own.training), (weights,)
    held = attachment.forwards.held(call.counts, call.which, call.layout)
    with held, torch.no_grad(), _told(call.model):
        return torch.export.export(forward, args, call.inputs)


@contextmanager
def _told(model: str) -> Iterator[None]:
    """Within: what torch can't trace is an error of one line."""
    try:
        yield
    except (
        TorchDynamoException,
        DataDependentOutputException,
        DynamicOutputShapeException,
        GuardOnDataDependentSymNode,
    ) as error:
        raise ValueError(f"{model} can't be exported: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def calls_of(attachments: Sequence[Attachment], run: Callable[[], object]) -> list[Calls]:
    """Run something, and note the calls of models that differ.

    Args:
        attachments: On models.
        run: Calls them.

    Returns:
        Of each model its calls.

    Raises:
        ValueError: If a model or a call can't be exported, or one isn't called.
    """
    for attachment in attachments:
        _refuse(attachment)
    found = [Calls() for _ in attachments]
    handles: list[Any] = []
    try:
        for attachment, calls in zip(attachments, found, strict=True):
            watch = _Watch(attachment, calls)
            model = attachment.model
            handles.append(model.register_forward_pre_hook(watch.before, with_kwargs=True))
            handles.append(model.register_forward_hook(watch.after))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for attachment, calls in zip(attachments, found, strict=True):
        if not calls.steps:
            raise ValueError(
                f"{type(attachment.model).__name__} was not called: run what calls it, a pipeline "
                "or a loop over all steps."
            )
    return found


def at_counts(attachment: Attachment, call: Call, counts: Sequence[int]) -> Call:
    """A call as it would be with other counts.

    Args:
        attachment: On the model that was called.
        call: Its last one, by `calls_of`.
        counts: k of every block.

    Raises:
        ValueError: If these aren't counts of the model.
    """
    forwards = attachment.forwards
    assert forwards.num_tokens is not None
    attachment.counts.check(counts, forwards.num_tokens - forwards.num_references)
    with forwards.held(counts, call.which, call.layout), torch.no_grad():
        output = Forward(attachment, call.constants)(**call.inputs)
    return replace(call, counts=tuple(counts), output=output)


class _Watch:
    """Notes the calls of one model."""

    def __init__(self, attachment: Attachment, calls: Calls) -> None:
        self.attachment, self.calls = attachment, calls
        self._places: dict[str, int] = {}
        self._layouts: dict[torch.Size, Layout] = {}
        self._call: dict[str, Any] | None = None

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Torch pre-hook, after the attachment's: what the call has."""
        forwards = self.attachment.forwards
        counts, which = forwards.running_counts, forwards.running_pass()
        name = type(model).__name__
        if counts is None or which is None:
            raise ValueError(f"{name} was called with its adapter off: leave shiva_dit.disabled.")
        if which not in (Pass.ALONE, Pass.BOTH):
            raise ValueError(
                f"{name} is guided by two passes in turn, and the second keeps the first one's "
                "tokens, which no program of one call has: export within "
                'shiva_dit.guided(..., "alone"), where each pass chooses for itself.'
            )
        arguments = bind(model, args, kwargs)
        step = given(model, arguments, self.attachment.spec.timestep)
        if not isinstance(step, Tensor):
            raise ValueError(
                f"{name} was called with a number as timestep, which a program would have for "
                "good: pass a tensor."
            )
        layout = forwards.layout
        if self._layouts.setdefault(step.shape, layout) != layout:
            raise ValueError(
                f"{name} was called with other clean frames than before, and a program has them "
                "for good: export each such run into a folder of its own."
            )
        arguments.pop("return_dict", None)
        inputs = {n: v for n, v in arguments.items() if _has_tensors(v)}
        constants = {n: v for n, v in arguments.items() if n not in inputs}
        key = repr((counts, which, constants, tree_map(_shape, inputs)))
        place = self._places.setdefault(key, len(self._places))
        self.calls.steps.append((float(_times(step)[layout.place]), place))
        if place < len(self.calls.different):
            self._call = None
        else:
            self._call = {"constants": constants, "counts": counts, "which": which}
            self._call |= {"inputs": tree_map(_copied, inputs), "model": name, "layout": layout}

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Torch hook: what the model gives."""
        del model, args
        if self._call is not None:
            output = tree_map(_copied, plain_output(output))
            self.calls.different.append(Call(**self._call, output=output))


def plain_output(output: Any) -> Any:
    """A prediction out of what a model returns: a tensor, or a tuple where it gives several.

    Raises:
        ValueError: If it holds lists, as long as the batch is.
    """
    parts = output if isinstance(output, tuple) else tuple(output.values())
    for part in parts:
        if part is not None and not isinstance(part, Tensor):
            raise ValueError(
                f"a model that returns a {type(part).__name__} of pictures can't be exported: a "
                "program's prediction is one tensor of a shape that is known."
            )
    tensors = tuple(part for part in parts if part is not None)
    return tensors[0] if len(tensors) == 1 else tensors


def _refuse(attachment: Attachment) -> None:
    """Raise where something on the model would not go into a program."""
    found = None
    if attachment.whole_steps is not None:
        found = "shiva_dit.correct"
    elif attachment.forwards.graphs is not None:
        found = "shiva_dit.cuda_graphs"
    elif any("_compiled_call_impl" in block.__dict__ for block in attachment.blocks):
        found = "a compiled block"
    for module in attachment.model.modules():
        found = found or strange_hook(module)
    if found is not None:
        raise ValueError(
            f"{found} and export don't go together: what it does from call to call is in no "
            "program. Take it off or load the model anew, apply the adapter, and export that."
        )


def _times(timestep: Tensor) -> Tensor:
    """The first sample's, one for each of its tokens or frames, or one."""
    return timestep[0].flatten() if timestep.ndim > 1 else timestep.flatten()


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _shape(leaf: Any) -> Any:
    return (leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, Tensor) else leaf


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
