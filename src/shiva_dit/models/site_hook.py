"""What happens to one module that a reducer works around: reduce, run, restore, by its plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from diffusers.hooks import ModelHook
from torch import Tensor, nn

from shiva_dit.methods.base import Site, Where
from shiva_dit.methods.plans import Plan
from shiva_dit.models.block_hook import Uncopied
from shiva_dit.models.guidance import Passes
from shiva_dit.models.runs import Call
from shiva_dit.models.spec import SitePlace


@dataclass(frozen=True, slots=True)
class Forward:
    """The forward that is going on."""

    grid: tuple[int, int]
    """Height and width in tokens."""
    channels: int
    """Of the latents."""
    call: Call
    where: Where
    """What a reducer is told, but of which module."""
    is_dense: bool
    """Whether the model runs as it is (`shiva_dit.disabled`)."""
    plans: dict[int, Plan | None] = field(default_factory=dict)
    """The last plan of each block."""
    within: dict[Any, Any] = field(default_factory=dict)
    """What reducers remember until its end."""


class ReducerHook(Uncopied, ModelHook):
    """Around one module of a block: runs it otherwise while a forward of the model goes on.

    Args:
        owner: The `Reduction` that it belongs to.
        block: Index of the module's block.
    """

    _is_stateful = True

    def __init__(self, owner: Any, block: int) -> None:
        super().__init__()
        self.owner, self.block = owner, block
        self.passes: Passes = owner.passes  # `cache_context` looks for it here

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline has ended: nothing is led any more."""
        self.passes.reset()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module as the reducer has it; the module itself where the model runs as it is."""
        run = self.fn_ref.original_forward
        assert run is not None
        forward: Forward | None = self.owner.running
        if forward is None:
            raise RuntimeError(
                "a block ran outside of a call of its model, so that nothing says what its grid "
                "is: call model(...), not model.forward(...) or a block by itself."
            )
        if forward.is_dense:
            return run(*args, **kwargs)
        return self.reduced(module, forward, run, args, kwargs)

    @abstractmethod
    def reduced(
        self,
        module: nn.Module,
        forward: Forward,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What the module gives in its place.

        Args:
            module: The module.
            forward: The forward that is going on.
            run: Its own forward.
            args: Of its call.
            kwargs: Of its call.
        """

    def where(self, forward: Forward, **more: Any) -> Where:
        """What the reducer is told of its place."""
        return replace(
            forward.where,
            block=self.block,
            within=forward.within,
            embedded=forward.within.get("embedded"),
            **more,
        )


class SiteHook(ReducerHook):
    """Runs one module on what a plan leaves of its input.

    Args:
        owner: The `Reduction` that it belongs to.
        block: Index of the module's block.
        site: What the module is there.
        place: How it returns the image's tokens.
    """

    def __init__(self, owner: Any, block: int, site: Site, place: SitePlace) -> None:
        super().__init__(owner, block)
        self.site, self.place = site, place

    def reduced(
        self,
        module: nn.Module,
        forward: Forward,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The module within the plan; the module itself where there is none."""
        x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._check(module, x, forward.grid, kwargs)
        where = self.where(
            forward,
            site=self.site,
            place=self.place.module,
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
