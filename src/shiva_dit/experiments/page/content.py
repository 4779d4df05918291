"""What a page shows, whatever it is of, and how it is written."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from shiva_dit.pictures.generate import image_of

LONGEST = 768
"""Pixels of a picture's longer side on a page."""
SMALL = 256
"""Up to this side pictures are kept to the bit; larger ones are compressed."""
TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The pictures of one arm."""

    name: str
    note: str = ""
    pictures: Sequence[str]
    """As data URIs, in the order of the prompts; "" where there is none."""
    maps: Sequence[str] = ()
    """Kept tokens of each, white where always kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Header and rows of cells; a row whose cells are in ** is set in bold."""

    caption: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """All of a page."""

    title: str
    about: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[str, str]] = ()
    """Caption and data URI."""
    truth: Row | None = None
    """What the pictures of `rows` are held against, one for one."""
    rows: Sequence[Row] = ()
    prompts: Sequence[str] = ()
    pictures: str = ""
    """What the pictures have in common."""
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """Where it all comes from."""


def written(page: Page) -> str:
    """The page as HTML that needs nothing beside itself."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda cell: cell.removeprefix("**").removesuffix("**")
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page)


def picture_uri(values: Float[Tensor, "C H W"]) -> str:
    """A picture in [-1, 1] as a data URI."""
    return image_uri(image_of((values.float() + 1) / 2))


def image_uri(image: Image.Image) -> str:
    """A picture as a data URI; a large one smaller and compressed."""
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > LONGEST:
        sides = [max(1, round(side * LONGEST / longest)) for side in image.size]
        image = image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
    kind, options = ("PNG", {}) if longest <= SMALL else ("WEBP", {"quality": 90})
    made = io.BytesIO()
    image.save(made, format=kind, **options)
    return _uri(made.getvalue(), kind.lower())


def map_uri(shares: Float[Tensor, " N"], height: int, width: int) -> str:
    """Shares in [0, 1] of a picture's tokens, of a picture of these sides, as a data URI."""
    rows = round((len(shares) * height / width) ** 0.5)
    if rows == 0 or len(shares) % rows:
        return ""  # tokens that are no grid of the picture
    pixels = (255 * shares.float().view(rows, -1)).round().to(torch.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(made, format="PNG")
    return _uri(made.getvalue(), "png")


def file_uri(path: Path) -> str:
    """A PNG that is there as a data URI, as it is."""
    return _uri(path.read_bytes(), "png")


def drawn(draw: Callable[[Path], None]) -> str:
    """What a function draws into a PNG, as a data URI."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.png"
        draw(path)
        return file_uri(path)


def origin(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a record's provenance says, line by line."""
    versions = ", ".join(f"{name} {found}" for name, found in made["versions"].items() if found)
    commit = made["commit"] or "no checkout"
    dirty = " with changes" if made["dirty"] else ""
    return [
        ("code", f"{commit}{dirty}"),
        ("machine", f"{made['device']}, {made['threads']} threads"),
        ("versions", f"Python {made['python']}, {versions}"),
    ]


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
