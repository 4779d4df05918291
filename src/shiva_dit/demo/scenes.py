"""The scenes task: rendered groups of coloured shapes, captioned, with exact ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shiva_dit.demo.captions import CaptionEncoder
from shiva_dit.demo.shapes import SHAPES, draw
from shiva_dit.demo.task import PATCH, DemoTask
from shiva_dit.training.data import Batch

SHAPE_NAMES = tuple(SHAPES)
PLURALS = {name: name + ("es" if name.endswith("s") else "s") for name in SHAPE_NAMES}
COLOURS = {
    "red": (0.85, -0.65, -0.7),
    "green": (-0.7, 0.5, -0.5),
    "blue": (-0.6, -0.3, 0.9),
    "yellow": (0.9, 0.75, -0.7),
    "purple": (0.35, -0.55, 0.75),
    "white": (0.9, 0.9, 0.9),
}
COUNTS = ("a", "two", "three")
SIZES = ("small", "large")
PLACES = {
    "in the top left": (0.23, 0.23),
    "in the top right": (0.77, 0.23),
    "in the bottom left": (0.23, 0.77),
    "in the bottom right": (0.77, 0.77),
    "in the centre": (0.5, 0.5),
}
RADII = (0.1, 0.17)
"""Of small and large, as a share of the picture's side."""
LAYOUTS = (
    ((0.0, 0.0),),
    ((-0.11, 0.0), (0.11, 0.0)),
    ((-0.11, 0.09), (0.11, 0.09), (0.0, -0.1)),
)
"""Where the objects of a group of one, two or three stand around its place."""
MAX_GROUPS, MAX_COUNT = 2, len(LAYOUTS)
MAX_WORDS = 17
"""Text tokens: words of the longest caption."""
NUM_TRAINING, NUM_HELD_OUT = 40_000, 1_000

ATTRIBUTES = ("count", "shape", "colour", "size")
NUM_VALUES = (1 + MAX_COUNT, len(SHAPES), len(COLOURS), len(SIZES))
"""Values of each attribute that the judge tells apart at each place; count 0 is "nothing here"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenes:
    """Many scenes: what the captions say, and how chance has drawn it.

    Entries of absent groups are -1.
    """

    place: Int[Tensor, "M G"]
    count: Int[Tensor, "M G"]
    """1, 2 or 3."""
    shape: Int[Tensor, "M G"]
    colour: Int[Tensor, "M G"]
    size: Int[Tensor, "M G"]
    offset: Float[Tensor, "M G O 2"]
    """Of each object from where the layout puts it, as a share of the picture's side."""
    scale: Float[Tensor, "M G O"]
    """Of each object's radius."""
    angle: Float[Tensor, "M G O"]
    tint: Float[Tensor, "M G 3"]
    """Added to the group's colour."""

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, indices: Int[Tensor, " B"] | slice) -> Scenes:
        """Some of the scenes."""
        return Scenes(**{f.name: getattr(self, f.name)[indices] for f in fields(self)})

    @classmethod
    def concatenate(cls, first: Scenes, second: Scenes) -> Scenes:
        """All scenes of both."""
        return cls(
            **{
                f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)])
                for f in fields(cls)
            }
        )

    @classmethod
    def sample(cls, number: int, generator: torch.Generator, *, unseen: bool | None) -> Scenes:
        """Scenes drawn by chance.

        The n-th shape in the n-th colour (a red circle, a green square ...) is a combination that
        training never sees.

        Args:
            number: How many.
            generator: Source of everything.
            unseen: True: in every scene one group is such a combination; False: none is; None: as
                chance has it.
        """

        def draw_integers(high: int) -> Tensor:
            return torch.randint(high, (number, MAX_GROUPS), generator=generator)

        def uniform(width: float, *shape: int) -> Tensor:
            return width * (2.0 * torch.rand(number, *shape, generator=generator) - 1.0)

        # Places differ: the second is one of the other four.
        place = draw_integers(len(PLACES))
        place[:, 1] = (place[:, 0] + 1 + place[:, 1] % (len(PLACES) - 1)) % len(PLACES)
        shape = draw_integers(len(SHAPES))
        step = 1 + draw_integers(len(COLOURS) - 1)  # never 0: another colour than the shape's own
        if unseen is None:
            step = draw_integers(len(COLOURS))
        elif unseen:
            step[:, 0] = 0
        colour = (shape + step) % len(COLOURS)
        count = torch.tensor([1, 1, 1, 2, 3])[draw_integers(5)]
        size = torch.where(count == 1, draw_integers(len(SIZES)), 0)
        two_groups = torch.rand(number, generator=generator) < 0.65
        words = [place, count, shape, colour, size]
        for values in words:
            values[~two_groups, 1] = -1
        # A group alone, or the first of two: which of the two is named first is left to chance.
        swap = two_groups & (torch.rand(number, generator=generator) < 0.5)
        words = [torch.where(swap[:, None], values.flip(1), values) for values in words]
        objects = (MAX_GROUPS, MAX_COUNT)
        offset = uniform(0.02, MAX_GROUPS, 1, 2) + uniform(0.008, *objects, 2)
        return cls(
            place=words[0],
            count=words[1],
            shape=words[2],
            colour=words[3],
            size=words[4],
            offset=offset,
            scale=1.0 + uniform(0.07, *objects),
            angle=uniform(0.2, *objects),
            tint=uniform(0.08, MAX_GROUPS, 3),
        )

    def captions(self) -> list[str]:
        """What each scene shows: "a large red star in the centre and two small ..."."""
        return [
            " and ".join(
                _group_caption(*values) for values in zip(*row, strict=True) if values[0] >= 0
            )
            for row in zip(
                *(
                    getattr(self, name).tolist()
                    for name in ("place", "count", "shape", "colour", "size")
                ),
                strict=True,
            )
        ]

    def labels(self) -> Int[Tensor, "M 5 4"]:
        """Count, shape, colour and size at each place; count 0 and the others -1 where nothing is.

        The order is `PLACES` by `ATTRIBUTES`.
        """
        labels = torch.full((len(self), len(PLACES), len(ATTRIBUTES)), -1)
        labels[..., 0] = 0
        values = torch.stack([self.count, self.shape, self.colour, self.size], -1)  # (M, G, 4)
        for group in range(MAX_GROUPS):
            rows = (self.place[:, group] >= 0).nonzero().flatten()
            labels[rows, self.place[rows, group]] = values[rows, group]
        return labels

    def render(self, size: int) -> tuple[Float[Tensor, "M 3 H H"], Float[Tensor, "M H H"]]:
        """Pictures in [-1, 1], and the share of each pixel that objects cover."""
        number, objects = len(self), MAX_GROUPS * MAX_COUNT
        places = torch.tensor(list(PLACES.values()))[self.place]  # (M, G, 2)
        layout = torch.zeros(1 + MAX_COUNT, MAX_COUNT, 2)
        for count, offsets in enumerate(LAYOUTS, start=1):
            layout[count, :count] = torch.tensor(offsets)
        centre = places[:, :, None] + layout[self.count] + self.offset  # (M, G, O, 2)
        radius = torch.tensor(RADII)[self.size][..., None] * self.scale
        present = torch.arange(MAX_COUNT) < self.count[..., None]
        shape = torch.where(present, self.shape[..., None], -1)
        colour = (torch.tensor(list(COLOURS.values()))[self.colour] + self.tint).clamp(-1, 1)
        colour = colour[:, :, None].expand(-1, -1, MAX_COUNT, -1)
        return draw(
            shape.reshape(number, objects),
            centre.reshape(number, objects, 2),
            radius.reshape(number, objects),
            self.angle.reshape(number, objects),
            colour.reshape(number, objects, 3),
            size,
        )


def _group_caption(place: int, count: int, shape: int, colour: int, size: int) -> str:
    name = SHAPE_NAMES[shape]
    return " ".join(
        [
            COUNTS[count - 1],
            SIZES[size],
            list(COLOURS)[colour],
            name if count == 1 else PLURALS[name],
            list(PLACES)[place],
        ]
    )


def _half_unseen(count: int, seed: int) -> Scenes:
    """Scenes of which every second shows an unseen combination."""
    half = (count + 1) // 2
    seen, unseen = (
        Scenes.sample(half, torch.Generator().manual_seed(seed + add), unseen=bool(add))
        for add in (0, 1)
    )
    order = torch.arange(2 * half).view(2, half).T.flatten()  # seen, unseen, seen ...
    return Scenes.concatenate(seen, unseen)[order[:count]]


class ScenesTask(DemoTask):
    """Rendered scenes of one or two groups of shapes.

    40,000 scenes train the backbone. Of the 1,000 held-out ones every second shows a combination
    of shape and colour that training never shows. The judge is trained on scenes of its own,
    drawn afresh, with all combinations.

    Args:
        image_size: Pixels of a side: 32 (256 tokens) or 64 (1,024).
    """

    channels = 3
    feature_dim = 64

    def __init__(self, image_size: int = 32) -> None:
        self.image_size = image_size
        self.name = "scenes" if image_size == 32 else f"scenes{image_size}"
        words = ["and", *COUNTS, *SIZES, *COLOURS, *SHAPE_NAMES, *PLURALS.values()]
        words += dict.fromkeys(word for place in PLACES for word in place.split())
        self.captions = CaptionEncoder(tuple(words), MAX_WORDS, separator="and")
        self.scenes = Scenes.sample(NUM_TRAINING, torch.Generator().manual_seed(0), unseen=False)
        self.held_out = _half_unseen(NUM_HELD_OUT, seed=1)
        self.held_out_images, self._cover = self.held_out.render(image_size)
        self.held_out_labels = self.held_out.labels()

    def __len__(self) -> int:
        """Number of training scenes."""
        return len(self.scenes)

    def batch(self, indices: Int[Tensor, " B"], generator: torch.Generator) -> Batch:
        """Training scenes by index, with their captions."""
        del generator
        scenes = self.scenes[indices]
        return Batch(
            latents=scenes.render(self.image_size)[0],
            conditioning=self.conditioning(scenes.captions()),
        )

    def content(self) -> dict[str, Tensor]:
        """The scenes, and the side of their pictures."""
        drawn = {field.name: getattr(self.scenes, field.name) for field in fields(Scenes)}
        return {**drawn, "size": torch.tensor(self.image_size)}

    def held_out_captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of held-out scenes."""
        return self.held_out[torch.tensor(indices)].captions()

    def prompts(self, start: int, count: int) -> tuple[list[str], Int[Tensor, "N 5 4"]]:
        """Captions of the held-out scenes: every second an unseen combination."""
        if start + count > NUM_HELD_OUT:
            raise ValueError(
                f"the scenes have {NUM_HELD_OUT} prompts, {start + count} were asked for."
            )
        chosen = self.held_out[slice(start, start + count)]
        return chosen.captions(), chosen.labels()

    def real(self, count: int) -> tuple[Float[Tensor, "N 3 H W"], Int[Tensor, "N 5 4"]]:
        """Scenes drawn afresh by the law of the held-out ones."""
        scenes = _half_unseen(count, seed=3)
        return scenes.render(self.image_size)[0], scenes.labels()

    def ink(self, indices: Sequence[int]) -> Bool[Tensor, "B N"]:
        """Tokens of which an object covers half a pixel or more."""
        cover = F.max_pool2d(self._cover[list(indices)][:, None], PATCH)
        return cover.flatten(1) >= 0.5

    # --- the judge --------------------------------------------------------------------------

    num_logits = len(PLACES) * sum(NUM_VALUES)  # of every value of every attribute at every place

    def judge_batch(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, "B 5 4"]]:
        """Scenes drawn afresh, with all combinations of shape and colour."""
        scenes = Scenes.sample(count, generator, unseen=None)
        return scenes.render(self.image_size)[0], scenes.labels()

    def judge_loss(
        self, logits: Float[Tensor, "B K"], labels: Int[Tensor, "B 5 4"]
    ) -> Float[Tensor, ""]:
        """Cross entropy of each attribute, mean over places (where there is something)."""
        losses = [
            F.cross_entropy(
                values.flatten(0, 1),
                labels[..., i].flatten(),
                ignore_index=-1,
                label_smoothing=0.05,
            )
            for i, values in enumerate(self._attributes(logits))
        ]
        return torch.stack(losses).sum()

    def right(self, logits: Float[Tensor, "B K"], labels: Int[Tensor, "B 5 4"]) -> dict[str, float]:
        """Adherence by attribute, over all groups asked for; "all" is their mean.

        "place" is right for a group if something stands at its place, and it is counted against
        each group that something stands where nothing should.
        """
        read = torch.stack([values.argmax(-1) for values in self._attributes(logits)], -1)
        asked = labels[..., 0] > 0  # (B, 5)
        there = read[..., 0] > 0
        nothing_else = ~(there & ~asked).any(1, keepdim=True)
        shares = {
            name: float((read[..., i] == labels[..., i])[asked & there].sum() / asked.sum())
            for i, name in enumerate(ATTRIBUTES)
        }
        shares["place"] = float((there & nothing_else)[asked].double().mean())
        return {"all": sum(shares.values()) / len(shares), **shares}

    def _attributes(self, logits: Float[Tensor, "B K"]) -> list[Float[Tensor, "B 5 V"]]:
        by_place = logits.view(-1, len(PLACES), sum(NUM_VALUES))
        return list(by_place.split(NUM_VALUES, -1))
