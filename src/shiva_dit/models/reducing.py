"""Methods around parts of blocks (merging, pooling, widths): hooks on and off, and what they cost.

As with adapters, nothing is patched, replaced or registered as a submodule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from shiva_dit.methods.base import Lesson, Need, Reducer, Selector, Site, Where
from shiva_dit.methods.blocks import BlockReducer
from shiva_dit.models import examples
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.block_hook import Uncopied
from shiva_dit.models.correction import (
    Correction,
    WholeSteps,
    correction_of,
    put_correction_on,
    take_correction_off,
)
from shiva_dit.models.counted import recipe
from shiva_dit.models.families import block_spec, model_spec
from shiva_dit.models.guidance import Pass, Passes
from shiva_dit.models.joint_block import JointHook, refuse_other_blocks
from shiva_dit.models.neighbours import (
    REDUCER,
    forget_registries,
    refuse_neighbours,
    unhook,
    unregister,
)
from shiva_dit.models.parallelism import refuse_parallel
from shiva_dit.models.runs import Call, OwnRun, Runs
from shiva_dit.models.site_hook import Forward, ReducerHook, SiteHook
from shiva_dit.models.skeleton import Skeleton
from shiva_dit.models.spec import SitePlace, bind, given, grid_of
from shiva_dit.models.turns import turns_of
from shiva_dit.models.undo import Undo


class Reduction(Uncopied):
    """A reducer on a model. Made by `attach_reducer`; `detach` takes it off again.

    `shiva_dit.remove` does too, and within `shiva_dit.disabled` the model runs as it is.
    """

    def __init__(self, model: nn.Module, reducer: Reducer) -> None:
        self.model, self.reducer = model, reducer
        self.spec = model_spec(model)
        self.turns = turns_of(model)
        self.runs = Runs(Passes())
        self._correction: Correction | None = None
        self.running: Forward | None = None
        self._lesson: Lesson | None = None
        self._undo = Undo()
        _refuse(model, reducer)
        blocks = self.spec.blocks(model)
        self._hooks: list[tuple[nn.Module, ReducerHook]] = [
            (module, SiteHook(self, block, site, place))
            for module, block, site, place in _places(blocks, reducer.sites)
        ]
        if isinstance(reducer, BlockReducer):
            self._hooks = [(block, JointHook(self, index)) for index, block in enumerate(blocks)]

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
            refuse_parallel(self.model)
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
        self._undo.add(partial(take_correction_off, model))
        for module, hook in self._hooks:
            self._undo.add(partial(unregister, module, REDUCER))
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, REDUCER)
        self._undo.add(partial(unhook, model, self._before_model))
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self._undo.add(partial(unhook, model, self._after_model))
        model.register_forward_hook(self._after_model, always_call=True)
        if "embedding" in self.reducer.needs:
            assert self.spec.time_embedder is not None
            embedder = model.get_submodule(self.spec.time_embedder)
            self._undo.add(partial(unhook, embedder, self._after_embedder))
            embedder.register_forward_hook(self._after_embedder)
        forget_registries(model)

    def detach(self) -> None:
        """Take the hooks off. The model is then as it was, to bit and attribute."""
        with self.turns.switch():
            self._undo.run()
            self.runs.clear()

    @property
    def num_parameters(self) -> int:
        """Parameters of the reducer."""
        return sum(parameter.numel() for parameter in self.reducer.parameters())

    @property
    def passes(self) -> Passes:
        """Told by pipelines and by `shiva_dit.guided` which pass of guidance runs."""
        return self.runs.passes

    @contextmanager
    def taught(self, lesson: Lesson) -> Iterator[None]:
        """Within: forwards are of a training, and what they note is for its loss."""
        self._lesson = lesson
        try:
            yield
        finally:
            self._lesson = None

    def correct(self, whole: WholeSteps | None) -> None:
        """Run the model as it is in some steps, and correct the others by it; None: no longer."""
        with self.turns.switch():
            put_correction_on(self, whole)
            self._correction = correction_of(self.model)

    def running_pass(self) -> Pass | None:
        """Which pass the running forward is; None if the model runs as it is."""
        forward = self.running
        return None if forward is None or forward.is_dense else forward.call.which

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, in a forward: the model as it is."""
        forward = self.running
        assert forward is not None
        self.running = replace(forward, is_dense=True)
        try:
            yield
        finally:
            self.running = forward

    def flops(self, height: int, width: int, text_tokens: int) -> int:
        """FLOPs of one forward of one sample, with what the plans multiply (matching, mixing).

        A model of shapes alone, built by the config, is run with the reducer on and counted.

        Args:
            height: Of the image, in tokens.
            width: Likewise.
            text_tokens: Text tokens T.

        Raises:
            ValueError: If forwards of a run cost differently.
        """
        if "steps" in self.reducer.needs:
            raise ValueError(
                f"what {type(self.reducer).__name__} costs changes from step to step: "
                "run_flops(height, width, text_tokens, num_steps) is that of a whole run."
            )
        return self._counted(height, width, text_tokens, 1)

    def run_flops(self, height: int, width: int, text_tokens: int, num_steps: int) -> int:
        """FLOPs of a run of so many steps, of one sample and one pass of guidance.

        Args:
            height: Of the image, in tokens.
            width: Likewise.
            text_tokens: Text tokens T.
            num_steps: Each a forward.
        """
        if "steps" not in self.reducer.needs:
            return num_steps * self._counted(height, width, text_tokens, 1)
        return self._counted(height, width, text_tokens, num_steps)

    def _counted(self, height: int, width: int, text_tokens: int, num_steps: int) -> int:
        """FLOPs of all steps of a run."""
        if isinstance(self.reducer, BlockReducer):
            raise ValueError(
                f"what {type(self.reducer).__name__} costs depends on times and pictures: a "
                "comparison or a frontier counts what is executed."
            )
        cls, config = recipe(self.model, self.spec, text_tokens)
        skeleton = Skeleton(cls, json.loads(config), blocks_differ=True)
        reduction, total = attach_reducer(skeleton.model, self.reducer), 0
        own = OwnRun(reduction.runs, num_steps)
        own.run.is_guided = True
        try:
            for step in range(num_steps):
                with own.step(step):
                    size = examples.Size(height=height, width=width, text=text_tokens)
                    run = skeleton.run_at(size)
                own.run.show(torch.ones(1, height * width))
                total += sum(run.blocks) + run.outside
        finally:
            reduction.detach()
        return total

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
        is_dense, grid = bool(self.turns.pauses), grid_of(model, sample)
        needs: set[Need] = {*self.reducer.needs}
        if self._correction is not None:
            self._correction.check()
            needs.add("passes")
        name = type(self.reducer).__name__
        call = Call() if is_dense else self.runs.of_call(name, needs, len(sample))
        where = Where(
            site="block",
            block=0,
            num_blocks=len(self.spec.blocks(model)),
            grid=grid,
            time=time.flatten()[0].float(),
            times=self.spec.time(time.flatten().float()),
            lesson=self._lesson,
            **call.told(),
        )
        self.running = Forward(grid, sample.shape[1], call, where, is_dense)

    def _after_embedder(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        del module, args
        if self.running is not None:
            self.running.within["embedded"] = output

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args
        if self.turns.is_mine():  # not a forward that was refused
            forward, self.running = self.running, None
            self.turns.end_forward()
            if forward is None or output is None or forward.call.run is None:
                return
            if "guidance" in self.reducer.needs:  # what else a model predicts (variances) is last
                prediction = output[0][:, : forward.channels]
                forward.call.run.observe(forward.call.which, prediction, forward.grid)


def reduction_of(model: nn.Module) -> Reduction | None:
    """The reducer on a model, or None."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook(REDUCER)
        if isinstance(hook, ReducerHook):
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
    if isinstance(reducer, BlockReducer):
        refuse_other_blocks(model, reducer)
        return
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
