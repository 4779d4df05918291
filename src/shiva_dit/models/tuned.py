"""Tuned weights of an adapter on a model: merged where a layer is plain, beside it elsewhere.

No layer is wrapped or replaced. LoRAs of the user may come, go, be fused and unfused: they lie on
top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from shiva_dit.models.low_rank import Beside, forward_with_low_rank
from shiva_dit.models.neighbours import reaches
from shiva_dit.models.own_weights import OwnWeights
from shiva_dit.models.parallelism import is_part, why_not_beside
from shiva_dit.models.placement import place_low_rank, place_whole
from shiva_dit.models.places import (
    Place,
    fused_into,
    kept_copies,
    links,
    moves_weights,
    odd_fused,
    projections_are_fused,
    refuse_projections,
    wrappers,
)
from shiva_dit.models.undo import Undo
from shiva_dit.models.watch import Watch
from shiva_dit.models.weights import (
    Merged,
    exactly,
    exchange_weight,
    settle_paths,
    what_changed,
)
from shiva_dit.models.written import Written, digests

ADVICE = (
    "load, quantise, shard or fuse first and apply afterwards; or, for a LoRA or DoRA, apply with "
    "merge=False, which leaves the model's weights alone."
)


class TunedBackbone:
    """The backbone weights that belong to an adapter, on a model.

    Args:
        model: The transformer.
        weights: Weights of the LoRA or of the whole state; empty for a frozen backbone.
        lora: PEFT's settings if the weights are a LoRA's or DoRA's (rank = alpha).
        merge: Whether a LoRA or DoRA is merged into layers that are plain. Where one isn't
            (quantised, sharded), it lies beside in any case.
    """

    def __init__(
        self,
        model: Any,
        weights: Mapping[str, Tensor],
        lora: Mapping[str, Any] | None,
        *,
        merge: bool = True,
    ) -> None:
        self.model, self.weights = model, weights
        self.is_low_rank, self.merge = lora is not None, merge
        self.enabled = False
        self._merged: list[Merged] = []
        self.beside: list[Beside] = []
        """What lies beside layers, and costs something of its own."""
        self._before: tuple[list[Merged], list[Beside]] = [], []
        self._own = OwnWeights(model)

    def put_on(self) -> None:
        """Look where everything goes on the model as it is now, and put it there.

        Raises:
            ValueError: If the weights don't fit the model, or can't be put on it as it is. Nothing
                has changed then.
        """
        self._merged, self.beside = [], []
        with exactly(self.model):
            if self.is_low_rank:
                self._merged, self.beside = place_low_rank(self.model, self.weights, self.merge)
            elif self.weights:
                self._merged = place_whole(self.model, self.weights)
        for attention, path in self._attentions():
            refuse_projections(attention, path)
        self._refuse_fused_under_dora()
        self.enable(True)

    def _touched(self) -> set[str]:
        """Paths of all layers that hold something of ours."""
        merged = {entry.place.path.rpartition(".")[0] for entry in self._merged}
        return merged | {beside.path for beside in self.beside}

    def _attentions(self) -> Iterator[tuple[nn.Module, str]]:
        """Modules above our layers whose projections may be fused, and their paths."""
        for path in sorted(self._touched()):
            above: list[str] = []
            for parent, name, _ in links(self.model, path):
                if hasattr(parent, "fuse_projections"):
                    yield parent, ".".join(above)
                above.append(name)

    def _scaled(self) -> dict[int, Beside]:
        """Layers that a DoRA beside them scales, by id."""
        return {id(beside.layer): beside for beside in self.beside if beside.scales}

    def _refuse_fused_under_dora(self) -> None:
        """A DoRA beside a layer would scale what the user has fused into that."""
        for number, layers in wrappers(self.model).items() if self._scaled() else ():
            if number in self._scaled() and fused_into(layers):
                path = self._scaled()[number].path
                raise ValueError(
                    f"a LoRA of yours is fused into {path}, and the adapter's DoRA beside that "
                    "would scale it: call unfuse_lora() first."
                )

    # --- on and off -------------------------------------------------------------------------

    def enable(self, enabled: bool) -> None:
        """Put the tuned weights on, or the model's own back: all of them or, if that fails, none.

        Raises:
            RuntimeError: If the weights were replaced or changed meanwhile, so that the model's
                own can't be given back.
        """
        if enabled == self.enabled:
            return
        over = wrappers(self.model) if self._merged else {}
        undo = Undo()
        with exactly(self.model):
            if enabled:
                self._check_reachable(over)
            else:
                self._check_untouched(over)
            try:
                for entry in self._merged:
                    exchange_weight(entry, over.get(id(entry.layer), []), enabled, undo)
                for beside in self.beside:
                    undo.add(beside.take_off if enabled else beside.put_on)
                    (beside.put_on if enabled else beside.take_off)()
            except BaseException:
                undo.run()
                raise
        self.enabled = enabled
        if not enabled:
            self._own.forget()
            for entry in self._merged:
                entry.own = entry.base = None

    def restore(self) -> None:
        """Give the model its own weights back, to the bit, until `put_on` or `put_back`.

        Raises:
            RuntimeError: As `enable`. Nothing has changed then.
        """
        self.enable(False)
        if self._merged or self.beside:
            self._before, self._merged, self.beside = (self._merged, self.beside), [], []

    def put_back(self) -> None:
        """Put on what was taken off, where it was: for undoing that."""
        self._merged, self.beside = self._before
        self.enable(True)

    def _check_copies(self) -> None:
        """An exchange would not reach what offloading keeps aside."""
        copies = kept_copies(self.model) if self._merged else None
        if copies is not None:
            raise RuntimeError(
                f"the model's weights can't be exchanged under {copies}, which brings copies of "
                "its own: apply a LoRA or DoRA with merge=False there, or load the model again."
            )

    def _check_reachable(self, over: Mapping[int, list[Any]]) -> None:
        self._check_copies()
        for entry in self._merged:
            odd = odd_fused(entry.fused_now(over.get(id(entry.layer), [])))
            why = entry.place.obstacle() or (odd and f"a {odd} of yours is fused into it")
            if why is not None:
                raise RuntimeError(
                    f"the adapter's {entry.place.path} can't be put on: {why}. Unfuse what is "
                    f"yours; {ADVICE}"
                )

    def _check_untouched(self, over: Mapping[int, list[Any]]) -> None:
        """Raise unless the tuned weights still stand where they were put, and only there."""
        self._check_copies()
        for attention, path in self._attentions() if self._merged else ():
            if projections_are_fused(attention):
                raise RuntimeError(
                    f"the projections of {path} were fused while the adapter's weights were on "
                    "them, so that they hold copies of these: call unfuse_qkv_projections() first."
                )
        for entry in self._merged:
            why = what_changed(entry, over.get(id(entry.layer), []))
            if why is not None:
                raise RuntimeError(
                    f"the model's own weights can't be given back: {why} since the adapter's were "
                    "put in their place (by training, load_state_dict, or a LoRA that was fused "
                    f"and then unloaded). Undo that, or load the model again. Next time {ADVICE}"
                )
        settle_paths(self._merged)

    def lifted(self) -> AbstractContextManager[None]:
        """Within, in a forward: the model's own weights, of which the device then keeps a copy."""
        over = wrappers(self.model) if self._merged else {}
        return self._own.in_place(self._merged, self.beside, over, self._check_untouched)

    def forget_own(self) -> None:
        """Let go of the copies that `lifted` keeps."""
        self._own.forget()

    # --- what must hold ---------------------------------------------------------------------

    def watch(self, watch: Watch) -> None:
        """Have it checked before each forward that all of this still acts.

        A judge raises a RuntimeError where it doesn't.
        """
        for entry in self._merged:
            judge = partial(self._judge_weights, entry)
            watch.add(entry.layer.__dict__, "_hf_hook", judge)
            watch.add(*entry.place.entry(), judge)
        self._watch_values(watch)
        for path in sorted(self._touched()):
            for parent, name, child in links(self.model, path):
                watch.add(parent._modules, name, partial(self._judge_link, parent, name, child))
        for beside in self.beside:
            judge = partial(self._judge_forward, beside)
            watch.add(beside.layer.__dict__, "forward", judge)
            watch.add(beside.layer._parameters, "weight", partial(self._judge_part, beside))
        scaled = self._scaled()
        for number, layers in wrappers(self.model).items() if scaled else ():
            if number in scaled:
                for layer in layers:
                    watch.add_length(layer.merged_adapters, self._refuse_fused_under_dora)
        for attention, path in self._attentions():
            judge = partial(self._judge_projections, attention, path)
            watch.add(attention.__dict__, "fused_projections", judge)
            watch.add(attention.__dict__, "processor", judge)
            watch.add(attention._modules, "processor", judge)

    def _watch_values(self, watch: Watch) -> None:
        moving = moves_weights(self.model)
        merged = [entry for entry in self._merged if entry.place.obstacle() is None]
        held = [entry.place.holder() for entry in merged]
        watch.add_values(Written(held, is_moving=moving), partial(self._judge_written, merged))
        scaled = [(b, Place(b.layer, "weight", b.path)) for b in self.beside if b.scales]
        scaled = [(beside, place) for beside, place in scaled if place.obstacle() is None]
        held = [place.holder() for _, place in scaled]
        watch.add_values(Written(held, is_moving=moving), partial(self._judge_norms, scaled))

    def _judge_norms(self, scaled: list[tuple[Beside, Place]], places: list[int]) -> None:
        written = [scaled[i] for i in places if scaled[i][1].obstacle() is None]
        if not self.enabled or not written:
            return
        found = digests([place.get() for _, place in written])
        for (beside, _), digest in zip(written, found, strict=True):
            if digest == beside.seen:
                continue
            with exactly(self.model):
                if not beside.fits():
                    raise RuntimeError(
                        f"the weight of {beside.path} was changed while the adapter's DoRA was "
                        "beside it, which is scaled by its norms: call shiva_dit.apply again."
                    )
            beside.seen = digest

    def _judge_written(self, entries: list[Merged], places: list[int]) -> None:
        written = [entries[i] for i in places if entries[i].place.obstacle() is None]
        if not self.enabled or not written:
            return
        over = wrappers(self.model)
        found = digests([entry.place.get() for entry in written])
        for entry, digest in zip(written, found, strict=True):
            if digest != entry.seen:
                self._judge_weights(entry, over)

    def _judge_weights(self, entry: Merged, over: Mapping[int, list[Any]] | None = None) -> None:
        over = wrappers(self.model) if over is None else over
        with exactly(self.model):
            why = what_changed(entry, over.get(id(entry.layer), []))
        if self.enabled and why is not None and not why.endswith("sharded"):
            raise RuntimeError(f"{why} while the adapter's weights were on it: {ADVICE}")
        if self.enabled and entry.place.obstacle() is None:
            entry.seen = digests([entry.place.get()])[0]

    def _judge_forward(self, beside: Beside) -> None:
        forward = beside.layer.__dict__.get("forward")
        if self.enabled and not reaches(forward, forward_with_low_rank):
            raise RuntimeError(
                f"the layer {beside.path} runs past the adapter's LoRA: its forward was replaced, "
                "or put back by something that was on the model before. Call shiva_dit.apply again."
            )

    def _judge_part(self, beside: Beside) -> None:
        if self.enabled and is_part(self.model, beside.layer):
            raise RuntimeError(why_not_beside(beside.path))

    def _judge_link(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        now = parent._modules.get(name)
        while now is not None and now is not child:
            now = now._modules.get("base_layer")
        if self.enabled and now is None:
            raise RuntimeError(
                f"the layer {name!r} of a {type(parent).__name__} was replaced while the adapter's "
                f"weights were on it: {ADVICE if self.is_merged else 'call shiva_dit.apply again.'}"
            )

    def _judge_projections(self, module: nn.Module, path: str) -> None:
        if self.enabled and projections_are_fused(module):
            raise RuntimeError(
                f"the projections of {path} were fused while the adapter's "
                "weights were on them: call unfuse_qkv_projections() first."
            )

    @property
    def is_merged(self) -> bool:
        """Whether weights of the model are replaced."""
        return bool(self._merged)
