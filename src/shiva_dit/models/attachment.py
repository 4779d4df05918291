"""One selector on one model: hooks on, off, off for a while, and what must hold meanwhile.

A `ModelHook` on every block gathers, runs the block, and scatters; torch hooks on the model and its
time embedder say what each block does in a forward (`shiva_dit.models.forward`). Nothing is
patched, replaced or registered as a submodule, so the state dict is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.base import Selector
from shiva_dit.models.block_hook import BlockHook, Uncopied
from shiva_dit.models.clock import Clock
from shiva_dit.models.compiling import compile_blocks
from shiva_dit.models.context_parallel import refuse_context_parallel
from shiva_dit.models.correction import (
    WholeSteps,
    correction_of,
    put_correction_on,
    take_correction_off,
)
from shiva_dit.models.counts import Counts
from shiva_dit.models.families import model_spec
from shiva_dit.models.forward import Forwards
from shiva_dit.models.gating import gate_values, ungate_values, unweigh_updates, weigh_updates
from shiva_dit.models.graphs import GRAPHS, Recorder, put_on
from shiva_dit.models.guidance import Pass, Passes
from shiva_dit.models.neighbours import (
    forget_registries,
    reaches,
    refuse_neighbours,
    register_innermost,
    unhook,
    unregister,
)
from shiva_dit.models.runs import Runs
from shiva_dit.models.tuned import TunedBackbone
from shiva_dit.models.turns import turns_of
from shiva_dit.models.undo import Undo
from shiva_dit.models.watch import Watch
from shiva_dit.modules.updates import RejectedUpdates

HOOK_NAME = "shiva_dit"


class Attachment(Uncopied):
    """A selector on a model. Made by `attach`; `detach` takes it off again."""

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        schedule: Schedule,
        *,
        updates: RejectedUpdates | None = None,
        multiple: int | None = None,
        segments: int | None = None,
        select_every: int = 1,
        reference_keep_ratio: float | None = None,
        gate_values: bool = False,
        backbone: TunedBackbone | None = None,
        freeze: bool = False,
        clock: Clock | None = None,
        adapter: Any = None,
    ) -> None:
        self.spec = model_spec(model)
        self.model, self.selector = model, selector
        self.updates, self.gates_values = updates, gate_values
        self.enabled = True
        self.backbone = backbone
        """Tuned weights; they come and go with the hooks."""
        self.adapter = adapter
        """What it was made from, for whoever asks."""
        self._is_on = False
        self._checked_in: object = None
        self.was_enabled = True
        """Whether it is on again when the last `disabled` block ends."""
        self.compiled: dict[str, Any] | None = None
        self.whole_steps: WholeSteps | None = None
        """Those that are on."""
        self.blocks = self.spec.blocks(model)
        self.turns = turns_of(model)
        self._undo = Undo()
        self.counts = Counts(
            model,
            schedule,
            multiple=multiple,
            segments=segments,
            select_every=select_every,
            reference_keep_ratio=reference_keep_ratio,
            clock=clock,
        )
        self.passes = Passes()
        self.runs = Runs(self.passes)
        """The samplings that call it; asked for whole steps."""
        self.hooks = [
            BlockHook(self, selector, updates, block, index, self.passes)
            for index, block in enumerate(self.blocks)
        ]
        # Where hooks that come later are looked for: they are put on all blocks, or on the model.
        self._watched = [model, *self.blocks[0].modules(), *self.blocks[-1].modules()]
        self.forwards = Forwards(
            model,
            self.blocks,
            self.hooks,
            selector=selector,
            updates=updates,
            counts=self.counts,
            passes=self.passes,
            is_pruned=self._is_pruned,
            undo=self._undo,
            freeze=freeze,
        )

    def put_on(self) -> None:
        """Put tuned weights and hooks on: all of them or, if something fails, none.

        Raises:
            ValueError: If something on the model can't go along with it.
        """
        self._put(self._put_weights_on)

    def put_back(self) -> None:
        """Put on what was taken off, as it was: for undoing that."""
        self._put(self._put_weights_back)

    def _put(self, put_weights: Callable[[], None]) -> None:
        with self.turns.switch():
            if self._is_on:
                return
            refuse_neighbours(self.model, self.model.modules())
            refuse_context_parallel(self)
            try:
                self._undo.add(self._take_weights_off)
                put_weights()
                self._put_hooks_on()
                self.watch = Watch(self._watch)
                self._is_on = True
                if self.turns.pauses:
                    self.enable(False)
            except BaseException:
                self._is_on = False
                self._undo.run()
                raise

    def _put_weights_on(self) -> None:
        if self.backbone is not None:
            self.backbone.put_on()

    def _put_weights_back(self) -> None:
        if self.backbone is not None:
            self.backbone.put_back()
            self.backbone.enable(self.enabled)

    def _take_weights_off(self) -> None:
        if self.backbone is not None:
            self.backbone.restore()

    def _put_hooks_on(self) -> None:
        self._undo.add(partial(forget_registries, self.model))
        for block, hook in zip(self.blocks, self.hooks, strict=True):
            self._undo.add(partial(unregister, block, HOOK_NAME))
            register_innermost(block, hook, HOOK_NAME)
        if self.gates_values:
            self._undo.add(partial(ungate_values, self.blocks, self.hooks))
            gate_values(self.blocks, self.hooks)
        if self.selector.weighs == "feed_forward":
            self._undo.add(partial(unweigh_updates, self.blocks, self.hooks))
            weigh_updates(self.blocks, self.hooks)
        model, forwards = self.model, self.forwards
        self._undo.add(partial(unhook, model, forwards.before_model))
        model.register_forward_pre_hook(forwards.before_model, with_kwargs=True)
        self._undo.add(partial(unhook, model, forwards.after_model))
        model.register_forward_hook(forwards.after_model, always_call=True)
        if self.spec.time_embedder is not None:
            embedder = model.get_submodule(self.spec.time_embedder)
            self._undo.add(partial(unhook, embedder, forwards.after_time_embedding))
            embedder.register_forward_hook(forwards.after_time_embedding)
        if self.backbone is not None and self.backbone.is_merged:
            self._undo.add(partial(self.model.__dict__.pop, "save_pretrained", None))
            self.model.save_pretrained = self._save_bare  # type: ignore[assignment]
        forget_registries(self.model)
        if self.compiled is not None:
            self.compile(**self.compiled)
        self._undo.add(partial(take_correction_off, self.model))
        put_correction_on(self, self.whole_steps)

    def _save_bare(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `save_pretrained`, with its own weights."""
        assert self.backbone is not None
        with self.turns.switch():
            before = self.backbone.enabled
            self.backbone.enable(False)
            try:
                return type(self.model).save_pretrained(self.model, *args, **kwargs)  # type: ignore[attr-defined]
            finally:
                self.backbone.enable(before)

    def detach(self) -> None:
        """Take hooks and tuned weights off. The model is then as it was, to bit and attribute.

        Raises:
            RuntimeError: If the model's own weights can't be given back (`TunedBackbone.restore`);
                nothing has changed then.
        """
        with self.turns.switch():
            self._take_weights_off()
            self._is_on = False
            self._undo.run()

    def enable(self, enabled: bool) -> None:
        """Run pruned and with tuned weights, or as the model itself.

        Raises:
            RuntimeError: As `detach`.
        """
        with self.turns.switch(interruptible=not enabled):
            if not self._is_on:
                return  # taken off meanwhile
            if self.backbone is not None:
                self.backbone.enable(enabled)
            self.enabled = enabled

    def _is_pruned(self) -> bool:
        """Whether a forward is a pruned one; raises where what was put on no longer acts."""
        if not self.enabled:
            return False
        run = self.counts.running
        begins = run is None or run is not self._checked_in
        captures = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        self.watch.check(reads=begins and not captures)
        self._checked_in = run
        refuse_neighbours(self.model, self._watched)
        refuse_context_parallel(self)
        return True

    def _watch(self, watch: Watch) -> None:
        """What must hold before each forward (`Watch`)."""
        for hook, block in zip(self.hooks, self.blocks, strict=True):
            watch.add(block.__dict__, "forward", partial(self._judge_forward, hook, block))
        correction = correction_of(self.model)
        if correction is not None:
            watch.add(self.model.__dict__, "forward", correction.check)
        index = 0
        for name in self.spec.block_lists:
            held = self.model.get_submodule(name)
            for key in held._modules:
                watch.add(held._modules, key, partial(self._judge_block, held, key, index))
                index += 1
        if self.backbone is not None:
            self.backbone.watch(watch)

    def _judge_forward(self, hook: BlockHook, block: nn.Module) -> None:
        if not reaches(block.__dict__.get("forward"), hook):
            raise RuntimeError(
                f"block {hook.index} runs past the adapter: its forward was replaced, or put back "
                "by something that was on the model before. Call shiva_dit.apply again."
            )

    def _judge_block(self, held: nn.Module, key: str, index: int) -> None:
        if held._modules.get(key) is not self.blocks[index]:
            raise RuntimeError(
                f"block {index} was replaced while the adapter was on: call shiva_dit.remove, "
                "replace it, and apply again."
            )

    @property
    def schedule(self) -> Schedule:
        """Keep ratios over time and depth."""
        return self.counts.schedule

    @property
    def num_parameters(self) -> int:
        """Parameters of the selector and of what rejected tokens get."""
        return sum(p.numel() for module in self.learned for p in module.parameters())

    @property
    def learned(self) -> list[Selector | RejectedUpdates]:
        """What the adapter brings: selector and, where there are any, updates."""
        return self.forwards.learned

    @contextmanager
    def values_gated(self) -> Iterator[None]:
        """Within: value projections pass through the gates, on a model attached without them."""
        try:
            gate_values(self.blocks, self.hooks)
            yield
        finally:
            ungate_values(self.blocks, self.hooks)

    def compile(self, **options: Any) -> None:
        """Compile each block by itself; `detach` takes that back too.

        Raises:
            ValueError: If a cache is on the blocks and they shall be one graph each.
        """
        refuse_context_parallel(self, "shiva_dit.compile")
        compile_blocks(self.blocks, options, self._undo)
        self.compiled = options

    def correct(self, whole: WholeSteps | None) -> None:
        """Run the unpruned model in some steps, and correct the others by it; None: no longer."""
        with self.turns.switch():
            if whole is not None:
                refuse_context_parallel(self, "shiva_dit.correct")
            put_correction_on(self, whole)
            self.whole_steps = whole
            if whole is None and self.backbone is not None:
                self.backbone.forget_own()
            self.watch = Watch(self._watch)

    def running_pass(self) -> Pass | None:
        """Which pass the running forward is; None if it is the unpruned model's."""
        return self.forwards.running_pass()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, in a forward: the unpruned model, with its own weights.

        Raises:
            ValueError: With gradients, which would be the tuned weights'.
        """
        own: AbstractContextManager[None] = nullcontext()
        if self.backbone is not None:
            if torch.is_grad_enabled():
                raise ValueError(
                    "a whole step of an adapter with tuned weights has no gradients: run it within "
                    "torch.no_grad(), or call shiva_dit.correct(model, whole_steps=0)."
                )
            own = self.backbone.lifted()
        with self.forwards.unpruned(), own:
            yield

    def use_graphs(self, recorder: Recorder, limit: int) -> None:
        """Capture forwards and replay them, until `detach`."""
        if self.forwards.graphs is None:
            self._undo.add(self._stop_graphs)
            self.forwards.graphs = put_on(self, recorder, limit)

    def _stop_graphs(self) -> None:
        self.forwards.graphs = None
        unregister(self.model, GRAPHS)
