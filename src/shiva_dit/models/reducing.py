"""Methods around parts of blocks (merging, pooling, widths): hooks on and off.

A `ModelHook` on each module that the method works around asks it for a plan, and runs the module on
what that leaves. As with adapters, nothing is patched, replaced or registered as a submodule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from shiva_dit.methods.base import Reducer, Selector, Site, Where
from shiva_dit.methods.plans import Plan
from shiva_dit.models import examples
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.block_hook import Uncopied
from shiva_dit.models.counted import recipe
from shiva_dit.models.families import block_spec, model_spec
from shiva_dit.models.neighbours import (
    REDUCER,
    forget_registries,
    refuse_neighbours,
    unhook,
    unregister,
)
from shiva_dit.models.skeleton import Skeleton
from shiva_dit.models.spec import SitePlace, bind, given, grid_of
from shiva_dit.models.turns import turns_of
from shiva_dit.models.undo import Undo


@dataclass(frozen=True, slots=True)
class _Forward:
    """The forward that is going on."""

    grid: tuple[int, int]
    """Height and width in tokens."""
    time: Tensor
    is_dense: bool
    """Whether the model runs as it is (`shiva_dit.disabled`)."""
    plans: dict[int, Plan | None] = field(default_factory=dict)
    """The last plan of each block."""


class Reduction(Uncopied):
    """A reducer on a model. Made by `attach_reducer`; `detach` takes it off again.

    `shiva_dit.remove` does too, and within `shiva_dit.disabled` the model runs as it is.
    """

    def __init__(self, model: nn.Module, reducer: Reducer) -> None:
        self.model, self.reducer = model, reducer
        self.spec = model_spec(model)
        self.turns = turns_of(model)
        self.running: _Forward | None = None
        self._undo = Undo()
        _refuse(model, reducer)
        self._hooks = [
            (module, SiteHook(self, block, site, place))
            for module, block, site, place in _places(self.spec.blocks(model), reducer.sites)
        ]

    def put_back(self) -> None:
        """Put on what was taken off: for undoing that."""
        self.put_on()

    def put_on(self) -> None:
        """Put the hooks on: all of them or, if something fails, none.

        Raises:
            ValueError: If something on the model can't go along with it.
        """
        with self.turns.switch():
            refuse_neighbours(self.model, self.model.modules())
            if attachment_of(self.model) is not None:
                raise ValueError(
                    "the model has an adapter or a selector on, and a reducer can't go along with "
                    "it: call shiva_dit.remove(model) first."
                )
            try:
                self._put_hooks_on()
            except BaseException:
                self._undo.run()
                raise

    def _put_hooks_on(self) -> None:
        model = self.model
        self._undo.add(partial(forget_registries, model))
        for module, hook in self._hooks:
            self._undo.add(partial(unregister, module, REDUCER))
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, REDUCER)
        self._undo.add(partial(unhook, model, self._before_model))
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self._undo.add(partial(unhook, model, self._after_model))
        model.register_forward_hook(self._after_model, always_call=True)
        forget_registries(model)

    def detach(self) -> None:
        """Take the hooks off. The model is then as it was, to bit and attribute."""
        with self.turns.switch():
            self._undo.run()

    @property
    def num_parameters(self) -> int:
        """Parameters of the reducer."""
        return sum(parameter.numel() for parameter in self.reducer.parameters())

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        """FLOPs of one forward of one sample, with what the plans multiply (matching, mixing).

        A model of shapes alone, built by the config, is run with the reducer on and counted.

        Args:
            height: Of the image, in tokens.
            width: Likewise.
            text_tokens: Text tokens T.
        """
        cls, config = recipe(self.model, self.spec, text_tokens)
        skeleton = Skeleton(cls, json.loads(config))
        reduction = attach_reducer(skeleton.model, self.reducer)
        try:
            run = skeleton.run_at(examples.Size(height=height, width=width, text=text_tokens))
        finally:
            reduction.detach()
        return sum(run.blocks) + run.outside

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.turns.start_forward()
        self.running = None  # an interrupted forward leaves it
        if torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs blocks anew after the forward, when their plans are "
                "gone: call model.disable_gradient_checkpointing() or detach the reducer."
            )
        arguments = bind(model, args, kwargs)
        sample = given(model, arguments, self.spec.sample)
        time = torch.as_tensor(given(model, arguments, self.spec.timestep), device=sample.device)
        is_dense = bool(self.turns.pauses)
        self.running = _Forward(grid_of(model, sample), time.flatten()[0].float(), is_dense)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args, output
        if self.turns.is_mine():  # not a forward that was refused
            self.running = None
            self.turns.end_forward()


class SiteHook(Uncopied, ModelHook):
    """Runs one module on what a plan leaves of its input.

    Args:
        owner: What it belongs to.
        block: Index of the module's block.
        site: What the module is there.
        place: How it returns the image's tokens.
    """

    def __init__(self, owner: Reduction, block: int, site: Site, place: SitePlace) -> None:
        super().__init__()
        self.owner, self.block, self.place = owner, block, place
        self.site: Site = site

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module within the plan; the module itself where there is none."""
        run = self.fn_ref.original_forward
        assert run is not None
        forward = self.owner.running
        if forward is None:
            raise RuntimeError(
                "a block ran outside of a call of its model, so that nothing says what its grid "
                "is: call model(...), not model.forward(...) or a block by itself."
            )
        if forward.is_dense:
            return run(*args, **kwargs)
        x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._check(module, x, forward.grid, kwargs)
        where = Where(
            site=self.site,
            block=self.block,
            grid=forward.grid,
            time=forward.time,
            earlier=forward.plans.get(self.block),
        )
        plan = forward.plans[self.block] = self.owner.reducer.plan(x, where)
        if plan is None:
            return run(*args, **kwargs)
        less = plan.reduce(x)
        if "hidden_states" in kwargs:
            kwargs = {**kwargs, "hidden_states": less}
        else:
            args = (less, *args[1:])
        output: Any = run(*args, **kwargs)
        place = self.place.output
        y: Tensor = output if place is None else output[place]
        if self.site == "block":
            rest = x
        else:  # an update of 0
            rest = y.new_zeros(()).expand(x.shape[0], x.shape[1], y.shape[-1])
        new = plan.restore(y, rest)
        return new if place is None else (*output[:place], new, *output[place + 1 :])

    def _check(
        self, module: nn.Module, x: Tensor, grid: tuple[int, int], kwargs: dict[str, Any]
    ) -> None:
        name = f"{self.place.module or 'the whole'} of block {self.block}"
        if x.ndim != 3 or x.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"{name} was called with {tuple(x.shape)}, not with the {grid[0]} x {grid[1]} "
                "tokens of the image: what splits them up (chunked feed-forward, context "
                "parallelism) can't be had beside a reducer."
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and self.site in ("block", "attention"):
            raise ValueError(
                f"{name} was called with a mask of the image's tokens, and {type(module).__name__} "
                "can't have one for tokens that are merged: call the model without attention_mask."
            )


def reduction_of(model: nn.Module) -> Reduction | None:
    """The reducer on a model, or None."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook(REDUCER)
        if isinstance(hook, SiteHook):
            return hook.owner
    return None


def _places(
    blocks: list[nn.Module], sites: tuple[Site, ...]
) -> Iterator[tuple[nn.Module, int, Site, SitePlace]]:
    """The modules around which a reducer works, in all blocks."""
    for index, block in enumerate(blocks):
        spec, modules = block_spec(block), dict(block.named_modules())
        whole = (SitePlace("", output=spec.output),)
        for site in sites:
            for place in whole if site == "block" else spec.sites[site]:
                if place.module in modules:
                    yield modules[place.module], index, site, place


def _refuse(model: nn.Module, reducer: Reducer) -> None:
    """Raise where a reducer can't work on a model."""
    if isinstance(reducer, Selector):
        raise ValueError(
            f"{type(reducer).__name__} chooses tokens, and a schedule says how many: put it on by "
            "shiva_dit.models.attach.attach(model, selector, schedule)."
        )
    spec = model_spec(model)
    kinds = {type(block).__name__: block_spec(block) for block in spec.blocks(model)}
    if not all(kind.sites for kind in kinds.values()) or (
        spec.inputs[spec.sample] is not examples.image
    ):
        raise ValueError(
            f"{type(model).__name__} can't take a reducer that merges: its tokens have places in "
            "attention (rotary embeddings), stand among the text's, or lie on no known grid. "
            "PixArt, DiT and Stable Diffusion 3 and 3.5 can."
        )
    if "block" in reducer.sites and len(reducer.sites) > 1:
        raise ValueError(
            f"a reducer works around whole blocks or around parts of them, got {reducer.sites}."
        )
    for name, kind in kinds.items():
        missing = [site for site in reducer.sites if site != "block" and site not in kind.sites]
        if missing:
            raise ValueError(f"{name} has no {missing[0]}: it has {', '.join(sorted(kind.sites))}.")
    if not list(_places(spec.blocks(model), reducer.sites)):
        raise ValueError(f"{type(model).__name__} has no module at {', '.join(reducer.sites)}.")


def attach_reducer(model: nn.Module, reducer: Reducer) -> Reduction:
    """Put a reducer on a model: Token Merging, for one, which needs no training.

    Args:
        model: PixArt, DiT, or Stable Diffusion 3 and 3.5: a transformer of diffusers.
        reducer: Such as `ToMeSD(keep_ratio=0.5)`.

    Returns:
        What `detach` takes off again.

    Raises:
        ValueError: If the model is not among these, or has an adapter or another reducer on.
    """
    reduction = Reduction(model, reducer)
    reduction.put_on()
    return reduction
