"""Forwards captured once as CUDA graphs, and replayed: no launch costs, however small the blocks.

A graph holds fixed addresses and a fixed course. So there is one for each combination of what could
change either: shapes and plain values of the arguments, the numbers of tokens kept, and where the
weights lie. A combination is run as usual when it first comes, captured when it comes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from shiva_dit.models.block_hook import BlockHook, BlockState, Uncopied
from shiva_dit.models.fingerprint import Fingerprint

logger = logging.getLogger("shiva_dit")
GRAPHS = "shiva_dit_graphs"
Call = Callable[[], Any]


@runtime_checkable
class Recorder(Protocol):
    """Captures calls. Apart from the runner, so that its bookkeeping can be tested anywhere."""

    def record(self, call: Call) -> tuple[Call, Any]:
        """Capture a call: what replays it, and what it returned, which each replay fills anew."""
        ...


class CudaRecorder:
    """Captures on the current device; all graphs share one memory pool."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, call: Call) -> tuple[Call, Any]:
        """Capture a call that has run before, so that nothing is compiled or tuned in it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = call()
        return graph.replay, output


@dataclass(frozen=True, slots=True)
class Captured:
    """One graph."""

    replay: Call
    inputs: list[Tensor]
    """Where it reads arguments, and the tokens that another pass has chosen."""
    output: Any
    """Where it writes what the model returns, and the tokens chosen by block."""


class GraphRunner(Uncopied, ModelHook):
    """Stands in the place of a model's forward; see the module.

    Args:
        owner: The attachment.
        recorder: What captures.
        limit: Graphs at most; combinations beyond them run as usual.
    """

    def __init__(self, owner: Any, recorder: Recorder, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        super().__init__()
        self.owner, self.recorder, self.limit = owner, recorder, limit
        self.graphs: dict[Hashable, Captured] = {}
        self.replays = 0
        self._fingerprint = Fingerprint([owner.model, *owner.learned], self._look_round)
        self._is_watched = False
        self._seen: set[Hashable] = set()
        self._inputs: dict[Hashable, list[Tensor]] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, or its replay."""
        forward = self.fn_ref.original_forward
        assert forward is not None
        leaves, tree = tree_flatten((args, kwargs))
        hooks: list[BlockHook] = self.owner.hooks
        led = [h.slot.state.chosen for h in hooks if h.slot.state.chosen is not None]
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [*(leaves[place] for place in places), *led]
        weights = self._fingerprint.value()
        if torch.is_grad_enabled() or self.owner.is_watched or self._is_watched:
            return self._plain(forward, args, kwargs)
        values = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        layout = (str(tree), tuple(places), tuple(map(_shape, tensors)), _modes())
        key = (layout, _hashable(values), tuple(map(_course, hooks)), weights)
        found = self.graphs.get(key)
        if found is None and key not in self._seen:
            self._seen.add(key)
            return self._plain(forward, args, kwargs)
        if found is None:
            if not self._has_room(key):
                return self._plain(forward, args, kwargs)
            inputs = self._inputs.setdefault(layout, [tensor.clone() for tensor in tensors])
            _fill(inputs, tensors)
            found = self._capture(forward, inputs, leaves, places, tree)
            self.graphs[key] = found
        _fill(found.inputs, tensors)
        found.replay()
        self.replays += 1
        output, chosen = tree_map(_cloned, found.output)
        for index, tokens in chosen.items():
            hooks[index].slot.state.chosen = tokens
        return output

    def _plain(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.owner.read_context(args, kwargs)
        return forward(*args, **kwargs)

    def _capture(
        self,
        forward: Callable[..., Any],
        inputs: list[Tensor],
        leaves: list[Any],
        places: list[int],
        tree: TreeSpec,
    ) -> Captured:
        hooks: list[BlockHook] = self.owner.hooks
        held = list(leaves)
        for place, tensor in zip(places, inputs, strict=False):
            held[place] = tensor
        args, kwargs = tree_unflatten(held, tree)
        led = iter(inputs[len(places) :])
        for hook in hooks:
            if hook.slot.state.chosen is not None:
                hook.slot.state.chosen = next(led)

        def call() -> Any:
            output = self._plain(forward, args, kwargs)
            states = {hook.index: hook.slot.state for hook in hooks}
            return output, {i: s.chosen for i, s in states.items() if s.leads and not s.dense}

        replay, output = self.recorder.record(call)
        logger.debug("shiva_dit: forward %d captured", len(self.graphs) + 1)
        return Captured(replay, inputs, output)

    def _look_round(self, modules: list[nn.Module]) -> None:
        """After a change: what must not be there, and whether torch hooks of others lie inside.

        These would miss the replays, so that forwards run as usual while they are on.
        """
        model, embedder = self.owner.model, self.owner.spec.time_embedder
        own = None if embedder is None else model.get_submodule(embedder)
        self._is_watched = False
        for module in modules:
            _refuse(module)
            count = len(module._forward_hooks) + len(module._forward_pre_hooks)
            if module is not model and count > (module is own):
                self._is_watched = True

    def _has_room(self, key: tuple[Hashable, ...]) -> bool:
        """Whether one more graph may be captured; those of other weights make room."""
        if len(self.graphs) >= self.limit:
            for other in [other for other in self.graphs if other[-1] != key[-1]]:  # type: ignore[index]
                del self.graphs[other]
        return len(self.graphs) < self.limit


def put_on(owner: Any, recorder: Recorder, limit: int) -> GraphRunner:
    """Let an attachment's model run by graphs, until it is detached."""
    runner = GraphRunner(owner, recorder, limit)
    for module in owner.model.modules():
        _refuse(module)
    registry = HookRegistry.check_if_exists_or_initialize(owner.model)
    registry.register_hook(runner, GRAPHS)
    return runner


def _refuse(module: nn.Module) -> None:
    """Raise where a hook does something in each forward that a replay would pass over."""
    registry = module.__dict__.get("_diffusers_hook")
    known = {"shiva_dit", GRAPHS}
    strange = [] if registry is None else [name for name in registry.hooks if name not in known]
    if strange or "_hf_hook" in module.__dict__:
        what = f"the hook {strange[0]!r}" if strange else "offloading"
        raise ValueError(
            f"CUDA graphs and {what} don't go together (found on a {type(module).__name__}): what "
            "it does in each forward would not be done in a replay. Switch it off, or apply the "
            "adapter anew without cuda_graphs."
        )


def _modes() -> Hashable:
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.is_inference_mode_enabled(), autocast


def _course(hook: BlockHook) -> Hashable:
    """What a block's state says of the course of a forward."""
    state: BlockState = hook.slot.state
    return (
        int(state.k),
        state.dense,
        state.share_halves,
        state.leads,
        state.chosen is not None,
        state.num_tokens,
    )


def _shape(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _hashable(values: tuple[Any, ...]) -> Hashable:
    """Plain values as they are, objects by identity."""
    plain = (bool, int, float, str, type(None))
    return tuple(value if isinstance(value, plain) else id(value) for value in values)


def _fill(inputs: list[Tensor], tensors: list[Tensor]) -> None:
    for held, tensor in zip(inputs, tensors, strict=True):
        if held is not tensor:
            held.copy_(tensor)


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
