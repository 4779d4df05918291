"""A model of shapes alone: what it does in one forward is seen without weights or a device.

Parameters are torch's fake tensors, inputs are real ones: what code reads (lengths of texts, masks,
places) is there to be read, and what is computed with weights has a shape and no values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from shiva_dit.models.examples import Size
from shiva_dit.models.families import block_spec, model_spec
from shiva_dit.models.spec import bind
from shiva_dit.modules.context import TIME_FEATURES


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """What a router is built from."""

    num_blocks: int
    """L."""
    width: int
    """D of the image tokens."""
    time_dim: int
    """Width of the time embedding."""
    context_dim: int
    """Width of the pooled text or class embedding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one forward of one sample showed."""

    num_tokens: int
    """N."""
    blocks: tuple[int, ...]
    """FLOPs of each block."""
    outside: int
    """FLOPs of all else."""
    rows: Mapping[str, int]
    """Rows that each linear layer saw, by its path."""


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What hooks have seen of the run that is going on."""

    rows: dict[str, int]
    blocks: list[int]
    inside: int = 0
    """FLOPs of the blocks that ran."""
    ran: dict[Any, tuple[Any, int, dict[str, int]]] = field(default_factory=dict)
    """What a block gave, its FLOPs, and its layers' rows, by what those depend on."""
    width: int = 0
    time_dim: int = TIME_FEATURES
    only_widths: bool = False
    counter: FlopCounterMode = field(
        default_factory=lambda: FlopCounterMode(
            display=False, custom_mapping={CPU_ATTENTION: attention_flops}
        )
    )


class _AtFirstBlock(Exception):  # noqa: N818
    pass


class Skeleton:
    """A model built from its config, of shapes alone.

    Args:
        cls: Its class.
        config: What the class is built with.
        blocks_differ: Whether every block is run, also those that are like others.
    """

    def __init__(
        self, cls: type[nn.Module], config: Mapping[str, Any], *, blocks_differ: bool = False
    ) -> None:
        with _undisturbed(), FakeTensorMode(allow_non_fake_inputs=True):
            self.model: Any = cls(**config).eval().requires_grad_(False)
        self.spec = model_spec(self.model)
        blocks = self.spec.blocks(self.model)
        names = {id(module): name for name, module in self.model.named_modules()}
        self.block_of: dict[str, int] = {}
        """The block of each linear layer that is in one, by its path."""
        self._linears = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        for index, block in enumerate(blocks):
            inside = f"{names[id(block)]}."
            self.block_of.update((n, index) for n in self._linears if n.startswith(inside))
            likeness = index if blocks_differ else _likeness(block)
            block.forward = partial(self._block, index, inside, likeness, block.forward)
        for name in self._linears:
            self.model.get_submodule(name).register_forward_hook(partial(self._linear, name))
        if self.spec.time_embedder is not None:
            embedder = self.model.get_submodule(self.spec.time_embedder)
            embedder.register_forward_hook(self._time)
        self._blocks = blocks
        self.parts = tuple(frozenset(block._modules) for block in blocks)
        """Names of what each block is made of."""
        for module in self.model.modules():  # whatever the process has chosen for its models
            if hasattr(getattr(module, "processor", None), "_attention_backend"):
                module.processor._attention_backend = AttentionBackendName.NATIVE

    def widths(self, example: int, text_tokens: int) -> Widths:
        """What a forward knows when it reaches the first block; the arguments are `run`'s."""
        self._begin(only_widths=True)
        inputs = self._inputs(self._size(example, text_tokens))
        with _undisturbed(), torch.no_grad():
            with suppress(_AtFirstBlock), _KnownMasks():
                self.model(**inputs)
            context = self.spec.context(self.model, inputs)
        return Widths(
            num_blocks=len(self._blocks),
            width=self._seen.width,
            time_dim=self._seen.time_dim,
            context_dim=context.shape[-1],
        )

    def run(self, example: int, text_tokens: int, by_frame: bool = False) -> Run:
        """One forward of one of the family's small examples.

        Args:
            example: Which one, from 1.
            text_tokens: T.
            by_frame: Whether it is told a time for each frame, not one for all.
        """
        return self.run_at(self._size(example, text_tokens), by_frame)

    def run_at(self, size: Size, by_frame: bool = False) -> Run:
        """One forward of one sample of a size."""
        seen, inputs = self._begin(), self._inputs(size, by_frame)
        with _undisturbed(), torch.no_grad(), seen.counter, _KnownMasks():
            self.model(**inputs)
        return Run(
            num_tokens=self.spec.tokens_of(self.model, inputs),
            blocks=tuple(seen.blocks),
            outside=seen.counter.get_total_flops() - seen.inside,
            rows=seen.rows,
        )

    def _begin(self, only_widths: bool = False) -> _Seen:
        rows = dict.fromkeys(self._linears, 0)
        self._seen = _Seen(rows=rows, blocks=[0] * len(self._blocks), only_widths=only_widths)
        return self._seen

    def _size(self, example: int, text_tokens: int) -> Size:
        frames, height, width = self.spec.sizes(self.model, example)
        return Size(frames=frames, height=height, width=width, text=text_tokens)

    def _inputs(self, size: Size, by_frame: bool = False) -> dict[str, Any]:
        with _undisturbed():
            time = self.spec.timestep_at(torch.full((size.batch,), 0.5))
            times: dict[str, Any] = self.spec.times(time)
            if by_frame:
                each = time[:, None].repeat(1, size.frames)
                times = self.spec.times_by_frame(each, size.height * size.width, time)
            return {**self.spec.example(self.model, size), **times}

    def _block(
        self,
        index: int,
        inside: str,
        likeness: Any,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A block's forward; one like an earlier one, with arguments like its, is not run again."""
        seen, block = self._seen, self._blocks[index]
        if not seen.width:
            seen.width = bind(block, args, kwargs)[block_spec(block).hidden].shape[-1]
        if seen.only_widths:
            raise _AtFirstBlock
        key = likeness, _shapes((args, kwargs))
        if key not in seen.ran:
            before = seen.counter.get_total_flops()
            output = forward(*args, **kwargs)
            cost = seen.counter.get_total_flops() - before
            seen.inside += cost
            rows = {n.removeprefix(inside): r for n, r in seen.rows.items() if n.startswith(inside)}
            seen.ran[key] = output, cost, rows
        output, seen.blocks[index], rows = seen.ran[key]
        seen.rows.update((inside + name, number) for name, number in rows.items())
        return output

    def _linear(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        self._seen.rows[name] += output.numel() // output.shape[-1]

    def _time(self, module: nn.Module, args: Any, output: Tensor) -> None:
        del module, args
        self._seen.time_dim = output.shape[-1]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within: as in a fresh process on a CPU, and no word of what the user's model warned of."""
    with torch.inference_mode(False), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _KnownMasks(TorchDispatchMode):
    """Rows picked by a mask whose values are there: how many they are is known."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.index.Tensor:
            values, indices = args
            picked: list[Tensor | None] = []
            for index in indices:
                if index is not None and index.dtype == torch.bool:
                    picked.extend(index.nonzero().unbind(1))
                else:
                    picked.append(index)
            args = values, picked
        return func(*args, **(kwargs or {}))


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Attention on a CPU, which torch's counter doesn't know."""


def attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **options: Any
) -> int:
    """FLOPs of attention: scores, and weighted values."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _shapes(arguments: Any) -> tuple[Any, ...]:
    """What a block's cost depends on of its arguments."""
    return tuple(
        tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, PLAIN) else None
        for leaf in tree_leaves(arguments)
    )


PLAIN = (int, float, str, bool, type(None))
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _likeness(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that do the same with other weights."""
    return tuple(
        (name, type(module), tuple(p.shape for p in module.parameters(False)), _settings(module))
        for name, module in block.named_modules()
    )


def _settings(thing: Any) -> str:
    """What an object holds beside parameters and modules."""
    held = {n: v for n, v in vars(thing).items() if n not in OF_EVERY_MODULE}
    return repr([(name, _setting(held[name])) for name in sorted(held)])


def _setting(value: Any) -> Any:
    if isinstance(value, (*PLAIN, tuple, list, torch.dtype)):
        return value
    if isinstance(value, Tensor):
        return value.shape
    if hasattr(value, "__qualname__"):  # a function or a class
        return value.__qualname__
    return type(value).__qualname__, _settings(value) if hasattr(value, "__dict__") else ""
