"""What happens to one block: gather, run, scatter, by the state of the running forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from shiva_dit.core.roles import REFERENCE, best_by_group, in_order
from shiva_dit.core.selection import Share, best_tokens, share_between_halves
from shiva_dit.methods.base import Mixture, Selector
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.methods.plans import GatherPlan
from shiva_dit.models.block_state import BlockState, Slot
from shiva_dit.models.context_parallel import ShardedPlan, Shards
from shiva_dit.models.families import block_spec
from shiva_dit.models.guidance import Passes
from shiva_dit.models.rows import apart, together
from shiva_dit.models.spec import BlockSpec, argument_place
from shiva_dit.modules.updates import RejectedUpdates


class Uncopied:
    """Belongs to one running model: neither copied nor pickled with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise RuntimeError(
            "a model with an adapter attached cannot be deep-copied: the copy would run the "
            "original's blocks. Call shiva_dit.remove(model) first, copy, and apply to both."
        )

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(
            "a model with an adapter attached cannot be pickled: use its save_pretrained and the "
            "adapter's, or call shiva_dit.remove(model) first, and apply again where it is loaded."
        )


class BlockHook(Uncopied, ModelHook):
    """Gather, run, scatter around one block.

    Args:
        owner: The attachment that it belongs to.
        selector: Scores the block's tokens.
        updates: What rejected tokens get; None leaves them as they are.
        module: The block.
        index: Its place among the blocks.
        passes: Told by the pipeline which pass runs.
    """

    _is_stateful = True

    def __init__(
        self,
        owner: object,
        selector: Selector,
        updates: RejectedUpdates | None,
        module: nn.Module,
        index: int,
        passes: Passes,
    ) -> None:
        super().__init__()
        self.owner = owner
        self.scores = selector.scorer(index)
        self.weights = None if selector.weighs is None else partial(selector.weights, block=index)
        self.weighs = selector.weighs
        self.update = None if updates is None else updates.group(index)
        self.index = index
        self.passes = passes
        self.spec: BlockSpec = block_spec(module)
        self.place = argument_place(module, self.spec.hidden)
        self.rows = [(n, argument_place(module, n), take) for n, take in self.spec.rows.items()]
        options = self.spec.counts_references
        self.options = None if options is None else (options, argument_place(module, options))
        self.slot = Slot()

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block on its chosen tokens; the unchanged block where nothing is pruned."""
        del module
        state = self.slot.state
        if state.dense:
            if state.idle:
                self.refuse_idle()
            return self.run(*args, **kwargs)
        if state.mixture is not None:
            return self._mixed(state.mixture, state, args, kwargs)
        return self._selected(state.k, state, args, kwargs)

    def _mixed(
        self, mixture: Mixture, state: BlockState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The mean, by weights, of what the block gives with other numbers of tokens."""
        outputs = [
            self.run(*args, **kwargs)
            if k == state.num_tokens
            else self._selected(k, state, args, kwargs)
            for k in mixture.counts
        ]
        weights = mixture.weights.unbind()
        if isinstance(outputs[0], Tensor):
            return _mean(outputs, weights)
        return tuple(_mean(parts, weights) for parts in zip(*outputs, strict=True))

    def _selected(
        self, k: int, state: BlockState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block on k tokens, and the others beside it."""
        by_name = self.spec.hidden in kwargs
        tokens = self.spec.turned(kwargs[self.spec.hidden] if by_name else args[self.place])
        where = self.spec.text
        shards = state.shards
        num_here = state.num_tokens if shards is None else shards.num_own
        text, x = apart(tokens, num_here, where)  # (B, T, D) or None, (B, N, D)
        if shards is not None:
            shards.check(x.shape[1])
        plan = self._choose(x, k, state)
        chosen = plan.chosen
        update = None if self.update is None else self.update(x, state.update_condition)
        before = plan.reduce(x)  # (B, k, D)
        gates = state.gates
        if gates is not None:
            x, before = self._learn(x, before, plan, state)
        if state.observer is not None:
            state.observer(self.index, chosen.sort(dim=-1).values)
        new = self.spec.turned(together(text, before, where))
        rows = self._rows_chosen(plan, x, text)
        args, kwargs = self._for_rows(new, *rows, state, args, kwargs)
        weights = None
        if self.weights is not None:
            weights = self.weights(before)[..., None].to(before.dtype)  # (B, k, 1)
            state.weights = weights if self.weighs == "feed_forward" else None
        output = self.run(*args, **kwargs)
        if self.weights is not None:
            state.weights = None
        place = self.spec.output
        after = self.spec.turned(output if place is None else output[place])
        text, after = apart(after, before.shape[1], where)
        if weights is not None and self.weighs == "block":
            after = before + weights * (after - before)
        rest = x if update is None else x + update
        new = plan.restore(after, rest)  # (B, N, D)
        if gates is not None:
            new = gates.leave(x, new, update)
        new = self.spec.turned(together(text, new, where))
        return new if place is None else (*output[:place], new, *output[place + 1 :])

    def _rows_chosen(self, plan: GatherPlan, x: Tensor, text: Tensor | None) -> tuple[Tensor, int]:
        """Chosen rows of the arguments, and of how many (`rows_of_all`)."""
        if isinstance(plan, ShardedPlan):
            return plan.own, plan.shards.num_tokens
        chosen, tokens = plan.chosen, x.shape[1]
        if text is None or not self.spec.rows_of_all:
            return chosen, tokens
        every = tokens + text.shape[1]
        beside = torch.arange(tokens, every, device=chosen.device).expand(len(chosen), -1)
        return torch.cat([chosen, beside], dim=1), every

    def _for_rows(
        self,
        tokens: Tensor,
        chosen: Tensor,
        num_tokens: int,
        state: BlockState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's arguments with its chosen tokens, and what lies beside these."""
        changed: dict[str, tuple[int, Any]] = {self.spec.hidden: (self.place, tokens)}
        groups, shards = state.groups, state.shards
        if self.options is not None and groups:
            name, place = self.options
            told = kwargs.get(name) if place >= len(args) else args[place]
            if told is not None and "num_ref_tokens" in told:
                kept = sum(group.k for group in groups if group.role == REFERENCE)
                changed[name] = place, {**told, "num_ref_tokens": kept}
        for name, row_place, take in self.rows:
            value = kwargs.get(name) if row_place >= len(args) else args[row_place]
            if value is not None:
                value = value if shards is None else shards.rows(name, value, take)
                changed[name] = row_place, take(value, chosen, num_tokens)
        for name, (at, value) in changed.items():
            if at < len(args):
                args = (*args[:at], value, *args[at + 1 :])
            else:
                kwargs = {**kwargs, name: value}
        return args, kwargs

    def _choose(self, x: Tensor, k: int, state: BlockState) -> GatherPlan:
        """The tokens that run, by the scores or another pass's."""
        if state.chosen is not None:
            return _plan(state.chosen, state)
        if state.gates is not None:
            # What terms tell is computed anew in backward (`_learn`).
            with torch.set_grad_enabled(state.terms is None and torch.is_grad_enabled()):
                state.scores = self._score(x, state)
            return GatherPlan(state.gates.choose(state.scores, k))
        scores = self._score(x, state)
        groups = state.groups
        plan = _plan(best_by_group(scores, groups) if groups else best_tokens(scores, k), state)
        if state.leads:
            state.chosen = plan.chosen
        return plan

    def _learn(
        self, x: Tensor, before: Tensor, plan: GatherPlan, state: BlockState
    ) -> tuple[Tensor, Tensor]:
        """Let gradients reach what has scored; all tokens and the chosen ones, on their way."""
        gates, scores = state.gates, state.scores
        assert gates is not None
        assert scores is not None
        has_order = gates.order is not None  # a choice that is given learns nothing
        if state.terms is not None and has_order and not scores.requires_grad:
            # Both halves have one order, so that sharing goes by rows there as well.
            score = partial(self._scored, share=state.share)
            state.scores = scores = gates.scored(score, state.terms, scores, x, before)
        gates.learn(scores)
        entered = gates.enter(x)
        return (x, before) if entered is x else (entered, plan.reduce(entered))

    def _score(self, x: Tensor, state: BlockState) -> Tensor:
        """Scores of all tokens, (B, N); the block's before, where that has run and they share."""
        shared = None if state.follows is None else state.follows.scores
        if shared is not None:
            return shared
        x, groups = x.detach(), state.groups
        if groups and state.terms is not None:
            parts = zip(groups, state.terms, strict=True)
            found = [self._scored(group.of(x), own, state.share) for group, own in parts]
            scores = in_order(groups, found)
        else:
            scores = self._scored(x, state.terms, state.share, state.shards)
        if state.is_followed:
            state.scores = scores
        return scores

    def _scored(
        self, x: Tensor, terms: Any, share: Share | None, shards: Shards | None = None
    ) -> Tensor:
        """Scores of the block's own tokens, shared where guidance halves share them."""
        scores = self.scores(x, terms)
        scores = scores if shards is None else shards.whole(scores)
        return scores if share is None else share_between_halves(scores, share)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline has ended: nothing is led any more."""
        self.passes.reset()
        return module

    def refuse_idle(self) -> None:
        """Raise where a block of a model with an adapter runs outside of the model's call."""
        if self.owner.enabled:  # type: ignore[attr-defined]
            raise RuntimeError(
                "a block ran outside of a call of its model, so that nothing says what to keep: "
                "call model(...), not model.forward(...) or a block by itself; for the dense model "
                "use shiva_dit.disabled."
            )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        forward = self.fn_ref.original_forward
        assert forward is not None
        return forward(*args, **kwargs)

    def weigh(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Torch hook on the block's feed-forward (`Selector.weighs`)."""
        del module, args
        weights = self.slot.state.weights
        return output if weights is None else output * weights

    def gate_value(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Torch hook on the block's value projections (KV gate); the text's values pass."""
        del module
        state = self.slot.state
        if state.gates is None:
            return output
        if self.spec.values_fused != "none":
            width = args[0].shape[-1]
            start = output.shape[-1] - width if self.spec.values_fused == "last" else 2 * width
            before, values, after = output.tensor_split((start, start + width), dim=-1)
            return torch.cat(
                [before, self._gate_image(state.gates, values, state.k), after], dim=-1
            )
        return self._gate_image(state.gates, output, state.k)

    def _gate_image(self, gates: SelectionGates, values: Tensor, k: int) -> Tensor:
        text = values.shape[1] - k
        if not text:
            return gates.value(values)
        if self.spec.values_of_text_last:
            return torch.cat([gates.value(values[:, :k]), values[:, k:]], dim=1)
        return torch.cat([values[:, :text], gates.value(values[:, text:])], dim=1)


def _plan(chosen: Tensor, state: BlockState) -> GatherPlan:
    """Keep these tokens, of all processes' where they are split among some."""
    return GatherPlan(chosen) if state.shards is None else ShardedPlan(chosen, state.shards)


def _mean(parts: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """Of all that blocks gave; the last block of some models gives no text."""
    products = [part * w for part, w in zip(parts, weights, strict=True) if part is not None]
    return sum(products[1:], products[0]) if products else None
