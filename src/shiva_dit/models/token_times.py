"""Times of a sample's tokens: which are of clean frames, and whose time is the sample's.

From image to video pipelines give each token, or each frame, a time: t, or 0 where the video is
known already. The clean ones are references (`core.roles`). Which these are must be known before
the forward: by a variable of the pipeline that makes the call, read from the device once in a run,
or else by the times themselves, once in a forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from shiva_dit.core.roles import REFERENCE, TARGET, Span
from shiva_dit.models.guidance import Running, running_call
from shiva_dit.models.pipelines import PIPELINES
from shiva_dit.models.spec import ModelSpec

CLEAN = 1e-3
"""Times up to this are those of clean data, where others of the sample are later."""
SAME = 1e-6
"""Times of a sample that differ by less, as a share of its largest, are one."""
KINDS = ("one", "clean", "several")
"""Of `ModelSpec.token_times`, by how much they allow."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the times of a sample's tokens, or frames, differ."""

    runs: tuple[tuple[bool, int], ...] = ()
    """Of its M entries, one after the other: whether they are clean, and how many; empty: all have
    one time."""
    place: int = 0
    """The first entry of the largest time, which is the sample's."""
    is_pure: bool = True
    """Whether all that aren't clean have this time."""

    @property
    def num_entries(self) -> int:
        """M."""
        return sum(number for _, number in self.runs)

    def spans(self, num_tokens: int) -> tuple[Span, ...]:
        """All N tokens by role; empty where none is clean.

        >>> Layout(((True, 1), (False, 2)), place=1).spans(6)
        (Span(role=1, size=2), Span(role=0, size=4))
        """
        if not any(clean for clean, _ in self.runs):
            return ()
        each = num_tokens // self.num_entries
        return tuple(Span(REFERENCE if clean else TARGET, each * n) for clean, n in self.runs)


ONE = Layout()
"""Of calls with one time for all tokens."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """A variable of a running call with the share of noise of each token, or what lacks of it."""

    name: str
    is_noise: bool = False
    """Whether 1 is noise; else 1 is clean."""
    by_latent: bool = False
    """Whether it has the latents' height and width, two for each token's."""


_CONDITIONED = _Mark("conditioning_mask")
MARKS = {
    "WanImageToVideoPipeline": _Mark("first_frame_mask", is_noise=True, by_latent=True),
    **dict.fromkeys(
        (
            "LTXConditionPipeline",
            "LTXImageToVideoPipeline",
            "LTXImage2VideoLoopDenoiser",
            "LTX2ConditionPipeline",
            "LTX2DFRPipeline",
            "LTX2HDRPipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2InContextPipeline",
            "LTX2LoopDenoiser",
        ),
        _CONDITIONED,
    ),
    "LTX2DFRTemporalRefinePipeline": _Mark("tile_conditioning_mask"),
    "LTXI2VLongMultiPromptPipeline": _Mark("cond_mask_tokens", is_noise=True),
    **dict.fromkeys(
        (
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        _Mark("cond_indicator"),
    ),
}
"""By pipeline, or block of a modular one."""

_KNOWN: Any = WeakIdKeyDictionary()
"""Of marks: their version, and the layout that was read from them."""


def num_times(timestep: Any) -> int:
    """How many times a call's timestep has for each sample: M, or 1."""
    return timestep.shape[1:].numel() if isinstance(timestep, Tensor) and timestep.ndim > 1 else 1


@torch.compiler.disable()
def layout_of(model: nn.Module, spec: ModelSpec, timestep: Any, num_tokens: int) -> Layout:
    """How the times of a call's tokens differ.

    Args:
        model: The transformer.
        spec: Its spec.
        timestep: As the call has it: with more dimensions than one it says a time for each of M
            tokens or frames of every sample, (B, M), or (B, 1, M, 1, 1).
        num_tokens: N, a multiple of M where times differ.

    Raises:
        ValueError: If times differ in another way than the class's pipelines make them differ, or
            not alike in all samples.
    """
    each = num_times(timestep)
    running = running_call()
    name = running.name if running is not None and running.is_known else ""
    if each == 1 or (name in PIPELINES and PIPELINES[name].times_are_equal):
        return ONE
    if running is not None and name in MARKS:
        marked = _marked(running, MARKS[name], each)
        if marked is not None:
            return marked
    found = _layout(spec.time(timestep.detach().float()))
    least = "one" if found == ONE else "clean" if found and found.is_pure else "several"
    if found is not None and KINDS.index(least) <= KINDS.index(spec.token_times):
        return found
    can = {
        "one": ".",
        "clean": ", with that of clean ones beside it, alike in all samples.",
        "several": ", with lower ones beside it, alike in all samples.",
    }
    raise ValueError(
        f"{type(model).__name__} was called with different times for the tokens of a sample, "
        f"{tuple(timestep.shape)}: what a block keeps depends on one time per sample"
        + can[spec.token_times]
    )


def _marked(running: Running, mark: _Mark, each: int) -> Layout | None:
    """What the running pipeline says of M entries; None if it says nothing."""
    found = running.scope.get(mark.name)
    if found is None:
        found = getattr(running.scope.get("block_state"), mark.name, None)
    if not isinstance(found, Tensor):
        return None
    version = None if found.is_inference() else found._version
    known = _KNOWN.get(found)
    if known is not None and version is not None and known[0] == version:
        layout = known[1]
    else:
        shares = found.detach().float()
        shares = shares[:, 0, :, ::2, ::2] if mark.by_latent else shares
        layout = _layout(shares if mark.is_noise else 1.0 - shares)
        _KNOWN[found] = version, layout
    return layout if layout is None or layout.num_entries in (0, each) else None


def _layout(times: Tensor) -> Layout | None:
    """The layout that all samples have, of times or shares of them, (B, ...); None if they differ.

    It is read from where they lie. A sample with nothing but zeros has every layout.
    """
    rows = times.flatten(1).cpu()  # (B, M)
    rows = rows[rows.amax(1) > 0.0]
    below = 1.0 - rows / rows.amax(1, keepdim=True)
    if bool((below <= SAME).all()):
        return ONE
    clean = (rows <= CLEAN) & (below > SAME)
    place = int((below[0] <= SAME).int().argmax())
    if bool((clean != clean[:1]).any()) or bool((below[:, place] > SAME).any()):
        return None
    kinds, numbers = clean[0].unique_consecutive(return_counts=True)
    runs = tuple(zip(kinds.tolist(), numbers.tolist(), strict=True))
    return Layout(runs, place, is_pure=not bool((below.masked_fill(clean, 0.0) > SAME).any()))
