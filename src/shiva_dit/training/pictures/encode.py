"""Encode captioned pictures once: only what is new or changed, into shards, in batches."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from shiva_dit.ownership import owned
from shiva_dit.training.pictures.about import ABOUT, LATENTS, TEXT, About, Sample
from shiva_dit.training.pictures.encoders import (
    Facts,
    digests,
    encode_captions,
    encode_pictures,
    fitted,
    kind_of,
    signature,
)
from shiva_dit.training.pictures.entry import Entry
from shiva_dit.training.pictures.pixels import PictureError, glance, read_picture
from shiva_dit.training.pictures.scan import (
    KEY,
    BadPicturesError,
    Picture,
    Scan,
    Taking,
    listed,
    ordered,
    picture_key,
    scan,
)
from shiva_dit.training.pictures.settings import Encoding
from shiva_dit.training.pictures.shards import Shards
from shiva_dit.training.pictures.sources import entries, find

GB = 1e9


def say(line: str) -> None:
    """Tell the user, beside a bar."""
    tqdm.write(line, file=sys.stderr)


def encode_folder(
    pipe: Any,
    images: Path,
    out: Path,
    *,
    size: int = 1024,
    show_progress: bool = True,
    **options: Any,
) -> Path:
    """Encode pictures and captions by a pipeline that is loaded (`encode`).

    Args:
        pipe: One of `PIPELINES`, with all its parts, on its device.
        images: Folder of captioned pictures, or a tar or parquet file.
        out: Folder to fill, or to go on in.
        size: Side in pixels.
        show_progress: Whether to tell what is found, and show bars.
        options: Further settings of `Encoding`.

    Returns:
        `out`, for `FolderData`.

    Raises:
        ValueError: As `encode`.
    """
    how, facts = Encoding(size=size, **options), Facts.of(pipe)
    return encode(facts, lambda: pipe, images, out, how, show_progress=show_progress)


def encode(
    facts: Facts,
    load: Callable[[], Any],
    images: Path,
    out: Path,
    how: Encoding,
    *,
    show_progress: bool = True,
    only_look: bool = False,
) -> Path:
    """Encode pictures and captions: what is cheap is checked first, and only what is new encoded.

    Latents are kept by a digest of the picture's file, size and autoencoder, captions by theirs and
    the text encoders'. Nothing is ever removed from `out`; a call that was stopped goes on.

    Args:
        facts: What is known of the pipeline before it is loaded.
        load: Gives the pipeline, on its device.
        images: Folder of captioned pictures, or a tar or parquet file.
        out: Folder for shards and `data.json`.
        how: The settings.
        show_progress: Whether to tell what is found, and show bars.
        only_look: Whether to stop after the look at pictures.

    Raises:
        BadPicturesError: If pictures or captions can't be taken, and `skip_bad` is off.
        ValueError: If the size doesn't fit the model, there are no pictures or there isn't space
            for them, `out` holds something else, or another process encodes into it.
    """
    facts.check(how.size)
    tell = say if show_progress else _silent
    taking = how.taking(facts)
    with owned(out):
        if (out / ABOUT).is_file():
            About.read(out)  # not ours to replace, if it can't be read
        before = _Before(out)
        found = scan(images, taking, before.has, leave_out=out, show_progress=show_progress)
        _check(found, images, how.skip_bad, tell)
        _tell_cost(found, facts, before, out, tell)
        if only_look:
            return out
        pipe = load()
        keys = digests(pipe)
        about = _about(found, keys, how, pipe, images)
        latents, texts = (Shards(about.folder(out, kind)) for kind in (LATENTS, TEXT))
        about.write(out)
        with _written(latents, texts):
            _encode_captions(pipe, found, texts, how, show_progress)
            new = _encode_pictures(pipe, images, out, found, latents, taking, how, show_progress)
    tell(f"{len(found.pictures)} pictures are in {out}, {new} of them encoded now.")
    return out


def _silent(line: str) -> None:
    del line


class _Before:
    """What was encoded earlier, by whatever encoders."""

    def __init__(self, out: Path) -> None:
        self.pictures, self.captions = (
            [Shards(folder) for folder in sorted((out / kind).glob("*")) if folder.is_dir()]
            for kind in (LATENTS, TEXT)
        )

    def has(self, key: str) -> bool:
        """Whether a picture was."""
        return any(key in shards for shards in self.pictures)

    def has_caption(self, caption: str) -> bool:
        """Whether a caption was."""
        return any(caption_key(caption) in shards for shards in self.captions)


def caption_key(caption: str) -> str:
    """What a caption is kept by."""
    return hashlib.sha256(caption.encode()).hexdigest()[:KEY]


def _check(found: Scan, images: Path, skip_bad: bool, tell: Callable[[str], None]) -> None:
    if found.problems and not skip_bad:
        raise BadPicturesError(found.problems, len(found.pictures))
    for line in listed(found.problems):
        tell(f"skipped: {line}")
    for line in found.summary():
        tell(line)
    if not found.pictures:
        left = ", ".join(found.left_out) or "nothing else either"
        raise ValueError(
            f"there are no pictures that can be taken in {images} ({left}): put some there, each "
            "with its caption."
        )


def _tell_cost(
    found: Scan, facts: Facts, before: _Before, out: Path, tell: Callable[[str], None]
) -> None:
    """Say what it will take on the disk, as far as is known before anything is loaded.

    Raises:
        ValueError: If there isn't as much.
    """
    pictures = {picture.key: picture for picture in found.pictures}
    captions = {caption for picture in found.pictures for caption in picture.captions}
    new = [picture for key, picture in pictures.items() if not before.has(key)]
    new_captions = sum(not before.has_caption(caption) for caption in captions)
    per_text = facts.text_bytes or 0
    need = sum(facts.latent_bytes(picture.shape) for picture in new) + new_captions * per_text
    each = facts.latent_bytes(found.pictures[0].shape)
    text = f"{per_text / 1e6:.2f} MB a caption" if per_text else "captions not counted"
    tell(
        f"to encode: {len(new)} pictures and {new_captions} captions, {need / GB:.2f} GB "
        f"({each / 1e6:.2f} MB a picture, {text}), or all if the encoders are others"
    )
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    if need > free:
        raise ValueError(
            f"{out} needs {need / GB:.1f} GB and has {free / GB:.1f} GB of space: choose another "
            "disk, a smaller size, or --precision bfloat16."
        )


def _about(found: Scan, keys: dict[str, str], how: Encoding, pipe: Any, images: Path) -> About:
    model = str(pipe.name_or_path)
    return About(
        samples=[
            Sample(
                picture.name,
                picture.key,
                picture.shape,
                tuple(caption_key(caption) for caption in picture.captions),
                picture.repeats,
            )
            for picture in found.pictures
        ],
        encoders=keys,
        empty=caption_key(""),
        size=how.size,
        pipeline=kind_of(pipe),
        model=model,
        source=str(images.absolute()),
        files=found.signature,
        saved_as=signature(model) if model else None,
        summary=found.summary(),
    )


@contextmanager
def _written(*shards: Shards) -> Iterator[None]:
    """Within: what is added is on the disk afterwards, also if it is interrupted."""
    try:
        yield
    finally:
        for each in shards:
            each.flush()


def _encode_captions(
    pipe: Any, found: Scan, texts: Shards, how: Encoding, show_progress: bool
) -> None:
    captions = ["", *(caption for picture in found.pictures for caption in picture.captions)]
    todo = [caption for caption in dict.fromkeys(captions) if caption_key(caption) not in texts]
    with tqdm(total=len(todo), desc="captions", disable=not show_progress) as bar:
        for start in range(0, len(todo), how.batch_size):
            some = todo[start : start + how.batch_size]
            for caption, made in zip(some, encode_captions(pipe, some), strict=True):
                texts.add(caption_key(caption), made)
            bar.update(len(some))


def _encode_pictures(
    pipe: Any,
    images: Path,
    out: Path,
    found: Scan,
    latents: Shards,
    taking: Taking,
    how: Encoding,
    show_progress: bool,
) -> int:
    """Encode those that aren't yet, those of one shape at a time; returns how many."""
    todo = {p.name: p for p in found.pictures if p.key not in latents}
    first = {picture.key: name for name, picture in reversed(todo.items())}
    todo = {name: picture for name, picture in todo.items() if first[picture.key] == name}
    if not todo:
        return 0
    again = entries(find(images, leave_out=out), taking.words)

    def decoded(entry: Entry) -> tuple[Picture, Image.Image]:
        return _decoded(entry, todo[entry.name], taking)

    waiting: dict[tuple[int, int], list[tuple[Picture, Image.Image]]] = {}

    def put(some: Sequence[tuple[Picture, Image.Image]]) -> None:
        made = encode_pictures(pipe, [image for _, image in some])
        for (picture, _), own in zip(some, made, strict=True):
            latents.add(picture.key, {LATENTS: own.clone()})
        bar.update(len(some))

    wanted = (entry for entry in again if entry.problem is None and entry.name in todo)
    with tqdm(total=len(todo), desc="pictures", disable=not show_progress) as bar:
        for picture, image in ordered(decoded, wanted, how.workers):
            some = waiting.setdefault(picture.shape, [])
            some.append((picture, image))
            if len(some) == how.batch_size:
                put(waiting.pop(picture.shape))
        for some in waiting.values():
            put(some)
    return len(todo)


def _decoded(entry: Entry, picture: Picture, taking: Taking) -> tuple[Picture, Image.Image]:
    try:
        data = entry.read()
        if picture_key(data, glance(data), picture.shape, taking) != picture.key:
            raise ValueError(f"{entry.path or entry.name} was changed meanwhile: encode again.")
        return picture, fitted(read_picture(data, taking.background), picture.shape)
    except PictureError as error:
        raise ValueError(f"{entry.path or entry.name} {error}.") from error
