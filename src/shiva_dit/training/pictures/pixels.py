"""Pictures read for what their pixels mean: turned, in 8 bits, in sRGB, on a background."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

READING = 1
"""Version of the rules here: another reading is another picture."""
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "TGA"),
    *("QOI", "DDS", "ICO", "PCX", "SGI", "HEIF"),  # the last where a plugin brings it
)
"""Formats of pixels that Pillow reads; none that runs programs or renders pages."""
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, TypeError, KeyError),
    *(IndexError, AttributeError, OverflowError, RuntimeError),
)
"""What Pillow's readers raise on damaged files: whatever their parsers stumble over."""


class PictureError(ValueError):
    """Why a picture can't be taken; begins with a verb, after the picture's name."""


ORIENTATION = 0x0112
SWAPPED = (5, 6, 7, 8)
"""Orientations that exchange width and height."""
DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")
"""Modes of gray in 16 bits; some formats come in 32 that hold 16."""
SIXTEEN = ("PNG", "PPM", "JPEG2000")
"""Formats whose mode "I" holds 16 bits."""
ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}


@dataclass(frozen=True, slots=True)
class Looks:
    """What a picture's first bytes say."""

    width: int
    """In pixels, as it is looked at: turned."""
    height: int
    transparent: bool
    """Whether a background shows through, or might."""
    frames: int
    """Pictures in the file: more than one in an animation, or in pages."""
    profile: str
    """"" without a colour profile or with one that is used; otherwise why it isn't."""


@lru_cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@lru_cache
def suffixes() -> frozenset[str]:
    """Endings of files that are read as pictures, in lower case."""
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, name in known if name in formats())


def look(data: bytes) -> Looks:
    """What a picture is, decoded wholly: what is damaged is found.

    Raises:
        PictureError: If it can't be read; says why and what to do.
    """
    with _opened(data) as image:
        if image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (1, 1))  # all of it is read, an eighth of it computed
        image.load()
    return glance(data)


def glance(data: bytes) -> Looks:
    """What a picture is by its first bytes alone.

    Raises:
        PictureError: If it is no picture.
    """
    with _opened(data) as image:
        width, height = image.size
        if image.getexif().get(ORIENTATION) in SWAPPED:
            width, height = height, width
        clear = image.mode in ALPHA or "transparency" in image.info
        frames = 1 if image.format in ("MPO", "ICO") else getattr(image, "n_frames", 1)
        _check_mode(image)
        return Looks(width, height, clear, frames, _why_not(image))


def read_picture(data: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A picture in RGB: the first of an animation, turned as EXIF says, in sRGB.

    16 bits become 8; a colour profile is applied where it fits the pixels; what is transparent
    shows the background.

    Raises:
        PictureError: If it can't be read; says why and what to do.
    """
    with _opened(data) as opened:
        opened.load()
        _check_mode(opened)
        image: Image.Image = ImageOps.exif_transpose(opened)
        profile = opened.info.get("icc_profile")
    clear, key = image.mode in ALPHA, image.info.get("transparency")
    alpha: Image.Image | None = None
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64)
        if key is not None:
            alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        scaled = (values.clip(0, 65535) * 255 + 32767) // 65535
        image = Image.fromarray(scaled.astype(np.uint8))
    elif clear or key is not None:
        whole = image.convert("RGBA")
        alpha = whole.getchannel("A")
        gray = image.mode in ("LA", "La", "L", "1")
        image = whole.convert("RGB").getchannel(0) if gray else whole.convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    image = _in_srgb(image, profile)
    if alpha is None or alpha.getextrema()[0] == 255:
        return image
    below = Image.new("RGB", image.size, background)
    return Image.composite(image, below, alpha)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "LAB":
        return _lab().apply(image)
    plain = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
    if profile:
        transform = _transform(profile, plain.mode)
        if not isinstance(transform, str):
            return plain.convert("RGB") if transform is None else transform.apply(plain)
    return plain.convert("RGB")


@lru_cache(maxsize=256)
def _transform(profile: bytes, mode: str) -> Any:
    """From a profile's colours to sRGB; None where it does nothing, and text: why it can't."""
    try:
        given: Any = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = given.profile.xcolor_space.strip()
        if space != {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[mode]:
            return f"is for {space}"
        made = ImageCms.buildTransform(
            given,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, *UNREADABLE):
        return "is damaged"
    if mode == "CMYK":
        return made
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        probe = Image.fromarray(lattice)
    before, after = (
        np.asarray(p.convert("RGB"), dtype=np.int16) for p in (probe, made.apply(probe))
    )
    return made if np.abs(before - after).max() > 2 else None  # sRGB itself, but for rounding


@lru_cache(maxsize=1)
def _lab() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB", flags=ImageCms.Flags.NOCACHE)


def _why_not(image: Image.Image) -> str:
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "LAB":
        return ""
    gray = image.mode in ("L", "LA", "La", "1", *DEEP)
    mode = "L" if gray else "CMYK" if image.mode == "CMYK" else "RGB"
    found = _transform(profile, mode)
    return found if isinstance(found, str) else ""


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN):
        raise PictureError("has 32 bits a pixel, of which no one says what is white: save it in 16")


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Within: an image by Pillow; what it raises on damaged files becomes one kind of error."""
    if not data:
        raise PictureError("is an empty file: fetch it again")
    try:
        with Image.open(BytesIO(data), formats=formats()) as image:
            yield image
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"is too large a picture, make it smaller: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"can't be read as a picture: {_content(data)}") from error
    except UNREADABLE as error:
        said = str(error) or type(error).__name__
        raise PictureError(f"can't be read as a picture, fetch or save it again: {said}") from error


def _content(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head")):
        return "it is a web page, fetch the picture itself"
    if start.startswith((b"<svg", b"<?xml")):
        return "it is a drawing in XML, save it as PNG"
    return "its content is none of the formats that Pillow reads, save it as PNG or JPEG"
