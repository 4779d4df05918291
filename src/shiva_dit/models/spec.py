"""What the adapter must know of a model: where tokens, time and text are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from jaxtyping import Float, Shaped
from torch import Tensor, cat, nn
from torch.nn.functional import pad

from shiva_dit.core.roles import Span
from shiva_dit.methods.base import Site
from shiva_dit.models.examples import Input, Size, patches
from shiva_dit.models.rows import Text

BESIDE = "beside"
"""Name among a batch's conditioning, which no argument has: of channels that the model reads after
those of the noisy sample, in the same argument (a mask, a picture to go by)."""

REFERENCES = "references"
"""Name there as well: of packed rows (B, R, C) of pictures to go by, which the model reads after
those of the noisy sample."""

TakeRows = Callable[[Any, Tensor, int], Any]
"""An argument, the chosen tokens (B, k) and N, to the argument for these tokens (`Rows`)."""


@dataclass(frozen=True, slots=True)
class SitePlace:
    """A module of a block that reducers can work around: it takes the image tokens first."""

    module: str
    """Its path in the block; absent ones are skipped."""
    output: int | None = None
    """Place of the image tokens in the returned tuple; None if the tensor itself is returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """What a block takes and returns."""

    block_class: str
    """Class name, looked up over the block's `__mro__`."""
    hidden: str = "hidden_states"
    """Argument that holds the image tokens, (B, N, D)."""
    text: Text = "none"
    """Where that argument holds the text's tokens too, if it does."""
    tokens_first: bool = False
    """Whether what it takes and returns is (N, B, D)."""
    output: int | None = None
    """Place of the image tokens in the returned tuple; None if the tensor itself is returned."""
    value_modules: tuple[str, ...] = ()
    """Value projections (for the KV gate); absent ones are skipped."""
    values_of_text_last: bool = False
    """Whether these, where they project the text too, have its tokens after the image's."""
    values_fused: Literal["none", "third", "last"] = "none"
    """Whether these give queries and keys of the same width as well: values are the third part
    (more may follow) or the last."""
    rows_of_all: bool = False
    """Whether rows of its arguments count what lies last beside the image's tokens (`text`) as the
    image's."""
    counts_references: str | None = None
    """Argument with options, where "num_ref_tokens" is the number of its references' tokens."""
    rows: Mapping[str, TakeRows] = field(default_factory=dict)
    """Arguments that hold something per image token, and how the chosen rows are taken."""
    sites: Mapping[Site, tuple[SitePlace, ...]] = field(default_factory=dict)
    """Where reducers can work (`attach_reducer`): where no token has a place of its own in
    attention (rotary embeddings) and no other tokens stand among the image's."""

    def turned(self, tokens: Tensor) -> Tensor:
        """A block's tokens with the batch first, and back."""
        return tokens.transpose(0, 1) if self.tokens_first else tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Where a model keeps its blocks, its time and its pooled text, and what it is called with."""

    model_class: str
    """Class name, looked up over the model's `__mro__`."""
    name: str
    """As people call it."""
    context_is: str = "mean of the text"
    """What `context` gives, in words."""
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    """Attributes that hold the blocks, in the order in which they run."""
    depths: tuple[str, ...] = ("num_layers", "num_single_layers")
    """The settings that say how many blocks these hold."""
    sample: str = "hidden_states"
    """Argument of the model's forward that holds the latents."""
    padded_like: str | None = None
    """Argument with a row for each token of text and image: where the latents have one as well, of
    zeros for the text, which comes first. Training data has the image's alone."""
    channels: int | None = None
    """Axis of its channels; by default the last of three dimensions, the second of others."""
    timestep: str = "timestep"
    """Argument that holds the timestep."""
    same_times: tuple[str, ...] = ()
    """Further arguments that hold the same time."""
    noised: tuple[str, ...] = ()
    """Further arguments that hold samples at that time (of the sound of a video)."""
    noise_timestep: float = 1000.0
    """What the model calls pure noise, t = 1."""
    clean_timestep: float = 0.0
    """What it calls clean data, t = 0."""
    learned_by: Literal["flow matching", "diffusion schedule", "cosine schedule"] = "flow matching"
    """How its releases were trained (`training.paths`)."""
    time_embedder: str | None
    """Submodule whose output is the time embedding; None where none serves all blocks: routers
    then read sinusoids of t."""
    context: Callable[[nn.Module, Mapping[str, Any]], Tensor]
    """Pooled text or class embedding, (B, Dc), from the model and a call's arguments."""
    guidance: Literal["one batch", "in turn"] = "in turn"
    """How its pipelines run the two passes of guidance, as a rule (`pipelines.PIPELINES`)."""
    told_guidance: float = 1.0
    """What a model that is told its guidance calls a scale of 1."""
    not_recomputed: str | None = None
    """Argument that diffusers leaves out where it recomputes blocks (gradient checkpointing)."""
    text_tokens: int
    """Text tokens T of the model's own pipelines, by default."""
    full_blocks: Callable[[nn.Module], tuple[int, ...]] = lambda model: ()
    """Blocks that can't be pruned, since they change tokens that they aren't given."""
    least_tokens: int = 1
    """Fewest image tokens that a block can run on."""
    frame_axis: int = 2
    """Of a video's latents, (B, C, F, H, W) by default."""
    tokens: Callable[[nn.Module, Any], int] = lambda model, sample: count_tokens(model, sample)
    """Number of image tokens N for latents, as the model takes them."""
    called_tokens: Callable[[Mapping[str, Any]], int] | None = None
    """N of a call, from its arguments, where its latents may hold other tokens as well."""
    references: Callable[[nn.Module, Mapping[str, Any]], tuple[Span, ...]] | None = None
    """A call's image tokens by role (`models.references`); None where all are the target's."""
    token_times: Literal["one", "clean", "several"] = "one"
    """Times of a sample's tokens (`models.token_times`): one; those of clean frames, which are
    references, beside it; or these, and lower ones where frames are given by halves."""
    frame_times: Callable[[Tensor], Tensor] | None = None
    """The timestep of times by frame, (B, F); None where it is by token, (B, N)."""
    frame_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of calls with times by frame."""
    noised_times: tuple[str, ...] = ()
    """Arguments with the time of what is `noised`; by default it is the video's."""
    caches_references: str | None = None
    """Argument with which keys of references are kept over steps: by blocks that all have the same
    number of them, so that these need a budget of their own."""
    returns_text: bool = False
    """Whether rows of the text come before the image's in what its forward returns."""
    own_tokens: Callable[[nn.Module], int | None] = lambda model: own_square(model)
    """N of the size that its config states; None where it states none."""
    inputs: Mapping[str, Input]
    """How the arguments of a forward are made for an example of a given size (`examples`), but
    the time: for counting, measuring and tests."""
    by_layer: tuple[str, ...] = ()
    """Arguments that are lists of tensors (B, ...), one for each layer of an encoder: training data
    has each as one tensor (B, layers, ...)."""
    sizes: Callable[[Any, int], tuple[int, int, int]] = lambda model, i: (1, 2, 2 * i)
    """Frames, height and width, in tokens, of the i-th of several small examples."""
    for_text: Callable[[Mapping[str, Any], int], Mapping[str, Any]] = lambda config, text: {}
    """Settings, from the others and T, by which a model takes T text tokens: of models whose
    config states a number or a longest one."""

    def time(self, timestep: Any) -> Any:
        """T in [0, 1], 1 for pure noise, of a model's timestep (a number or a tensor)."""
        return (timestep - self.clean_timestep) / (self.noise_timestep - self.clean_timestep)

    def timestep_at(self, t: Tensor) -> Tensor:
        """What the model calls times t in [0, 1]."""
        return self.clean_timestep + t * (self.noise_timestep - self.clean_timestep)

    def times(self, timestep: Tensor) -> dict[str, Tensor]:
        """The arguments that tell the model its time."""
        return dict.fromkeys((self.timestep, *self.same_times), timestep)

    def times_by_frame(self, by_frame: Tensor, each: int, of_sample: Tensor) -> dict[str, Any]:
        """The arguments that tell the model a time for each frame, in its own units.

        Args:
            by_frame: The times, (B, F).
            each: Tokens of a frame.
            of_sample: The time of each sample as a whole, (B,).
        """
        given = by_frame.repeat_interleave(each, dim=1)
        if self.frame_times is not None:
            given = self.frame_times(by_frame)
        beside = dict.fromkeys((*self.same_times, *self.noised_times), of_sample)
        return {self.timestep: given, **beside, **self.frame_options}

    def tokens_of(self, model: nn.Module, arguments: Mapping[str, Any]) -> int:
        """N of a call, from its arguments."""
        if self.called_tokens is not None:
            return self.called_tokens(arguments)
        return self.tokens(model, given(model, arguments, self.sample))

    def example(self, model: nn.Module, size: Size) -> dict[str, Any]:
        """Arguments of a forward but the time, for an example of a size."""
        made = {name: make(model, size) for name, make in self.inputs.items()}
        return {name: value for name, value in made.items() if value is not None}

    def arguments_of(self, noisy: Tensor, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """Noisy samples and a batch's conditioning as the model takes them (`BESIDE` ...).

        Raises:
            ValueError: If there are references, and the model takes none.
        """
        axis = self.channels or (-1 if noisy.ndim == 3 else 1)
        beside = conditioning.get(BESIDE)
        sample = noisy if beside is None else cat([noisy, beside.to(noisy)], dim=axis)
        rows = conditioning.get(REFERENCES)
        if rows is not None:
            if self.references is None:
                raise ValueError(
                    f"{self.name} reads no pictures to go by behind its latents: leave "
                    f'"{REFERENCES}" out of the conditioning.'
                )
            sample = cat([sample, rows.to(sample)], dim=1)
        if self.padded_like is not None:
            missing = conditioning[self.padded_like].shape[1] - sample.shape[1]
            sample = pad(sample, (0, 0, missing, 0))
        others = {
            name: list(value.unbind(1)) if name in self.by_layer else value
            for name, value in conditioning.items()
            if name not in (BESIDE, REFERENCES)
        }
        return {self.sample: sample, **others}

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """All blocks in the order in which they run."""
        return [
            block for name in self.block_lists for block in model.get_submodule(name).children()
        ]


def given(model: nn.Module, arguments: Mapping[str, Any], name: str) -> Any:
    """An argument that a forward needs.

    Raises:
        ValueError: If the call didn't pass it.
    """
    value = arguments.get(name)
    if value is None:
        raise ValueError(f"{type(model).__name__} was called without {name!r}.")
    return value


def count_tokens(model: Any, sample: Shaped[Tensor, "B ..."]) -> int:
    """Image tokens of latents (B, C, H, W) or (B, C, F, H, W) by the config's patches.

    Latents of three dimensions, (B, N, C), are one row per token already.
    """
    if sample.ndim == 3:
        return sample.shape[1]
    sides = sample.shape[2:]
    return math.prod(s // p for s, p in zip(sides, patches(model, len(sides)), strict=True))


def grid_of(model: Any, sample: Shaped[Tensor, "B ..."]) -> tuple[int, int]:
    """Height and width of an image in tokens, by the config's patches.

    Raises:
        ValueError: If the latents are not those of an image, (B, C, H, W).
    """
    if sample.ndim != 4:
        raise ValueError(
            f"{type(model).__name__}'s latents are {tuple(sample.shape)}: only those of images, "
            "(B, C, H, W), say how high and wide the grid of tokens is."
        )
    high, wide = patches(model, 2)
    return sample.shape[2] // high, sample.shape[3] // wide


def own_square(model: Any) -> int | None:
    """Image tokens of the square latents that a model's config states, if it does."""
    side = model.config.get("sample_size")
    return None if side is None else (side // model.config.patch_size) ** 2


def pooled_text(model: nn.Module, arguments: Mapping[str, Any]) -> Float[Tensor, "B Dc"]:
    """Context of a model that is handed pooled text."""
    return given(model, arguments, "pooled_projections")


def mean_text(
    text: Float[Tensor, "B T Dc"], mask: Shaped[Tensor, "B ..."] | None
) -> Float[Tensor, "B Dc"]:
    """Context of a model without pooled text: the mean of its text's embeddings.

    Args:
        text: Embeddings of the text tokens.
        mask: 1 (or True) for text and 0 for padding, (B, T), or a bias (B, 1, T) that is 0 for
            text; None if all is text.
    """
    if mask is None:
        return text.mean(1)
    is_text = mask if mask.ndim == 2 else mask.flatten(1) == 0
    weights = is_text.to(text.dtype)[..., None]
    return (text * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def text_mean(padding: str | None = None) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
    """The context of a model without pooled text: the mean of its text's embeddings.

    Args:
        padding: What tells padding: the name of the mask among the arguments (of the text, or of
            text and image), "zeros" where pipelines pad by zeros, None where nothing does.
    """

    def context(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        text: Tensor = given(model, arguments, "encoder_hidden_states")
        if padding == "zeros":
            return mean_text(text, text.any(-1))
        mask = None if padding is None else arguments.get(padding)
        if mask is not None and mask.ndim == 2:
            mask = mask[:, : text.shape[1]]
        return mean_text(text, mask)

    return context


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward call by name, however they were passed."""
    return {**dict(zip(_arguments(type(module)), args, strict=False)), **kwargs}


@cache
def _arguments(kind: type[nn.Module]) -> list[str]:
    """Names of what a class's forward takes."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def argument_place(module: nn.Module, name: str) -> int:
    """Position of a named argument in a module's forward.

    Raises:
        ValueError: If the forward has no such argument: another version of the model's code.
    """
    names = _arguments(type(module))
    if name not in names:
        raise ValueError(
            f"{type(module).__name__}.forward has no argument {name!r} (it has "
            f"{', '.join(names)}): this version of diffusers is not supported; 0.42.1 is."
        )
    return names.index(name)
