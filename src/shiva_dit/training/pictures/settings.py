"""How pictures are taken and encoded."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import ImageColor

from shiva_dit.config import check_types, whole_number
from shiva_dit.training.pictures.buckets import shapes
from shiva_dit.training.pictures.encoders import Facts
from shiva_dit.training.pictures.entry import Words
from shiva_dit.training.pictures.scan import Taking


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How pictures are taken and encoded."""

    size: int = 1024
    """Side of the square in pixels."""
    buckets: bool = False
    """Whether pictures keep about their shape: the nearest of several of about the square's area.
    Otherwise each covers the square and is cut in the middle."""
    background: str = "white"
    """What shows through transparency: a name of CSS, or "#rrggbb"."""
    caption_column: str | None = None
    """Column of tables that holds captions; by default the first of text, caption, captions and
    prompt."""
    whole_captions: bool = False
    """Whether all lines of a caption's file are one caption, instead of one each."""
    repeats: bool = False
    """Whether pictures in a folder named "10_cats" count ten times."""
    skip_bad: bool = False
    """Whether to leave out what can't be taken, instead of stopping."""
    batch_size: int = 4
    """Pictures, or captions, that are encoded at once."""
    workers: int = 2
    """Threads that read and decode pictures."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("size", "batch_size", "workers"):
            whole_number(name, getattr(self, name), least=1)
        self.color()

    def color(self) -> tuple[int, int, int]:
        """The background.

        Raises:
            ValueError: If there is no such colour.
        """
        try:
            red, green, blue = ImageColor.getrgb(self.background)[:3]
        except ValueError as error:
            raise ValueError(
                f"background must be a colour such as white or #808080, got {self.background!r}."
            ) from error
        return red, green, blue

    def taking(self, facts: Facts) -> Taking:
        """How pictures are taken, for a pipeline."""
        among = shapes(self.size, facts.step, several=self.buckets, largest=facts.largest)
        return Taking(
            shapes=among,
            words=Words(column=self.caption_column, whole=self.whole_captions),
            background=self.color(),
            repeats=self.repeats,
            workers=self.workers,
        )
