"""Forwards captured once as CUDA graphs, and replayed: no launch costs, however small the blocks.

A graph holds fixed addresses and a fixed course. So there is one for each combination of what could
change either: shapes and plain values of the arguments, the numbers of tokens kept, and where the
weights lie. A combination is run as usual when it first comes, captured when it comes again. The
passes of guidance that run in turn are one combination with a graph for each: one chooses tokens,
the other is given them.

When there are as many combinations as the limit allows, a new one takes the place of the one that
hasn't come for longest, but only if it has itself come twice since that. Combinations that come in
turn, more of them than the limit, thus don't push each other out for ever: some are replayed, the
others run as usual, and the log says how many.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from shiva_dit.models.block_hook import BlockHook, Uncopied
from shiva_dit.models.block_state import BlockState
from shiva_dit.models.fingerprint import Fingerprint
from shiva_dit.models.neighbours import CORRECTION, register_innermost, strange_hook

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


@dataclass(slots=True)
class Combination:
    """What is known of one combination."""

    visit: int = 0
    """When it came last, counted in changes of the combination."""
    visit_before: int = 0
    """When it came before that; 0 for never."""
    passes: set[Hashable] = field(default_factory=set)
    """Passes that have run: the next of their kind can be captured."""
    graphs: dict[Hashable, Captured] = field(default_factory=dict)
    """By pass."""


REMEMBERED = 16
"""So many times the limit are combinations remembered that have no graph."""


class GraphRunner(Uncopied, ModelHook):
    """Stands in the place of a model's forward; see the module.

    Args:
        owner: The attachment.
        recorder: What captures.
        limit: Combinations at most that have graphs.
    """

    def __init__(self, owner: Any, recorder: Recorder, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        super().__init__()
        self.owner, self.recorder, self.limit = owner, recorder, limit
        self.known: dict[tuple[Hashable, ...], Combination] = {}
        self.replays = 0
        self._fingerprint = Fingerprint([owner.model, *owner.learned], self._look_round)
        self._is_watched = False
        self._current: Combination | None = None
        self._visits = 0
        self._inputs: dict[Hashable, list[Tensor]] = {}
        self._has_warned = False

    @property
    def graphs(self) -> list[Captured]:
        """All graphs."""
        return [graph for known in self.known.values() for graph in known.graphs.values()]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, or its replay."""
        forward = self.fn_ref.original_forward
        assert forward is not None
        leaves, tree = tree_flatten((args, kwargs))
        hooks: list[BlockHook] = self.owner.hooks
        led = [h.slot.state.chosen for h in hooks if h.slot.state.chosen is not None]
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        own = [leaves[place] for place in places]
        tensors = [*own, *led]
        weights = self._fingerprint.value()
        if torch.is_grad_enabled() or self.owner.forwards.is_watched or self._is_watched:
            return self._plain(forward, args, kwargs)
        values = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        layout = (str(tree), tuple(places), tuple(map(_shape, own)), _modes())
        course = (*map(_course, hooks), self.owner.forwards.layout)
        key = (layout, _hashable(values), course, weights)
        which = (tuple(map(_pass, hooks)), tuple(tokens.shape for tokens in led))
        known = self._visit(key)
        found = known.graphs.get(which)
        if found is None:
            if which not in known.passes or not self._has_room(known):
                known.passes.add(which)
                return self._plain(forward, args, kwargs)
            inputs = self._inputs.setdefault(layout, [tensor.clone() for tensor in own])
            inputs = [*inputs, *(tensor.clone() for tensor in led)]
            _fill(inputs, tensors)
            found = self._capture(forward, inputs, leaves, places, tree)
            known.graphs[which] = found
        _fill(found.inputs, tensors)
        found.replay()
        self.replays += 1
        output, chosen = tree_map(_cloned, found.output)
        for index, tokens in chosen.items():
            hooks[index].slot.state.chosen = tokens
        return output

    def _visit(self, key: tuple[Hashable, ...]) -> Combination:
        """A combination that comes now. Passes of one step follow each other: they count as one."""
        known = self.known.setdefault(key, Combination())
        if known is not self._current:
            self._visits += 1
            self._current = known
            known.visit_before, known.visit = known.visit, self._visits
            if not known.visit_before:
                self._forget_old()
        return known

    def _forget_old(self) -> None:
        """Keep the number of combinations without a graph in bounds."""
        bare = [key for key, known in self.known.items() if not known.graphs]
        if len(bare) > REMEMBERED * self.limit:
            del self.known[min(bare, key=lambda key: self.known[key].visit)]

    def _plain(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.owner.forwards.read_context(args, kwargs)
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
        was_watched, self._is_watched = self._is_watched, False
        for module in modules:
            _refuse(module)
            count = len(module._forward_hooks) + len(module._forward_pre_hooks)
            if module is not model and count > (module is own):
                self._is_watched = True
        if self._is_watched and not was_watched:
            logger.warning(
                "shiva_dit: CUDA graphs: torch hooks lie inside the model, which a replay would not"
                " call: forwards run without replays until they are removed."
            )

    def _has_room(self, known: Combination) -> bool:
        """Whether a combination may be captured; one that hasn't come for long makes room."""
        held = [other for other in self.known.values() if other.graphs]
        if known.graphs or len(held) < self.limit:
            return True
        oldest = min(held, key=lambda other: other.visit)
        if oldest.visit < known.visit_before:
            oldest.graphs.clear()
            used = {key[0] for key, other in self.known.items() if other.graphs}
            self._inputs = {key: value for key, value in self._inputs.items() if key in used}
            return True
        self._warn(known)
        return False

    def _warn(self, refused: Combination) -> None:
        """Say once that forwards run without a replay, and how many of how many."""
        if self._has_warned:
            return
        self._has_warned = True
        turn = [known for known in self.known.values() if known.visit >= refused.visit_before]
        logger.warning(
            "shiva_dit: CUDA graphs: %d different forwards come in turn, and %d of them run without"
            " a replay each time, since at most %d combinations have graphs. Apply with segments=8,"
            " which makes them few, or pass a larger limit to cuda_graphs.",
            sum(len(known.passes) for known in turn),
            sum(len(known.passes) for known in turn if not known.graphs),
            self.limit,
        )


def put_on(owner: Any, recorder: Recorder, limit: int) -> GraphRunner:
    """Let an attachment's model run by graphs, until it is detached."""
    runner = GraphRunner(owner, recorder, limit)
    for module in owner.model.modules():
        _refuse(module)
    register_innermost(owner.model, runner, GRAPHS)
    return runner


def _refuse(module: nn.Module) -> None:
    """Raise where a hook does something in each forward that a replay would pass over."""
    what = strange_hook(module, known=("shiva_dit", GRAPHS, CORRECTION))
    if what is not None:
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
        state.share,
        state.num_tokens,
        tuple((group.role, group.parts, int(group.k)) for group in state.groups),
    )


def _pass(hook: BlockHook) -> Hashable:
    """Whether a block's tokens are chosen for another pass, or by one."""
    state: BlockState = hook.slot.state
    return state.leads, state.chosen is not None


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
