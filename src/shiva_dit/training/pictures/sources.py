"""Where captioned pictures are, found without reading: in folders, tars and parquet files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shiva_dit.provenance import data_digest
from shiva_dit.training.pictures.entry import Entry, Problem, Words, is_hidden
from shiva_dit.training.pictures.metadata import METADATA, Metadata, read_metadata
from shiva_dit.training.pictures.packed import parquet_entries, tar_entries
from shiva_dit.training.pictures.pixels import suffixes

CAPTIONS = (".txt", ".caption")
TARS = (".tar", ".tar.gz", ".tgz")
PARQUET = ".parquet"
HIDDEN = "hidden"


@dataclass(slots=True)
class Found:
    """What lies in a folder, by kind; each list in the order of names."""

    root: Path
    pictures: list[Path] = field(default_factory=list)
    captions: dict[tuple[Path, str], list[Path]] = field(default_factory=dict)
    """By folder and name without its ending."""
    metadata: list[Path] = field(default_factory=list)
    tars: list[Path] = field(default_factory=list)
    parquet: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files of other kinds, by ending."""
    problems: list[Problem] = field(default_factory=list)

    def signature(self) -> str:
        """Digest of names, sizes and times of all that is read, to tell later that one changed."""
        texts = [path for paths in self.captions.values() for path in paths]
        every = [*self.pictures, *texts, *self.metadata, *self.tars, *self.parquet]
        return data_digest(sorted(_stamp(path, self.root) for path in every))


def find(source: Path, *, leave_out: Path | None = None) -> Found:
    """What lies in a folder and below, links followed once, or a single tar or parquet file.

    Args:
        source: The folder or file.
        leave_out: A folder that is not looked into: what is written.

    Raises:
        ValueError: If there is nothing there.
    """
    if not source.exists():
        raise ValueError(
            f"{source} is not there: name a folder of pictures, a tar or parquet file."
        )
    found = Found(source if source.is_dir() else source.parent)
    if source.is_dir():
        _walk(source, found, leave_out)
    else:
        _sort_in(source, found)
        if found.left_out or found.pictures:
            raise ValueError(f"{source} is a file: name its folder, or a tar or parquet file.")
    return found


def _walk(source: Path, found: Found, leave_out: Path | None) -> None:
    seen: set[tuple[int, int]] = set()
    skipped = None if leave_out is None else leave_out.absolute()

    def unreadable(error: OSError) -> None:
        name = Path(error.filename or source)
        found.problems.append(Problem("folder", f"{name} can't be read: {error.strerror}"))

    for top, folders, files in os.walk(source, onerror=unreadable, followlinks=True):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:  # linked from two places, or to itself
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = [name for name in folders if is_hidden(name)]
        found.left_out[HIDDEN] += len(hidden)
        here = Path(top)
        folders[:] = sorted(n for n in {*folders} - {*hidden} if (here / n).absolute() != skipped)
        for name in sorted(files):
            _sort_in(here / name, found)
    found.left_out += Counter()  # without zeros
    for paths in (found.pictures, found.metadata, found.tars, found.parquet):
        paths.sort()


def _sort_in(path: Path, found: Found) -> None:
    name, ending = path.name.lower(), path.suffix.lower()
    if is_hidden(path.name):
        found.left_out[HIDDEN] += 1
    elif name in METADATA:
        found.metadata.append(path)
    elif name.endswith(TARS):
        found.tars.append(path)
    elif ending == PARQUET:
        found.parquet.append(path)
    elif ending in CAPTIONS:
        found.captions.setdefault((path.parent, path.stem), []).append(path)
    elif ending in suffixes():
        found.pictures.append(path)
    else:
        found.left_out[ending or "without an ending"] += 1


def _stamp(path: Path, root: Path) -> tuple[str, int, int]:
    name = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except OSError:
        return name, -1, -1
    return name, status.st_size, status.st_mtime_ns


def entries(found: Found, words: Words) -> Iterator[Entry]:
    """Every picture with its captions, in order; what is wrong with one is said in it.

    Those of a folder are read when they are looked at; of tars and parquet one after the other.
    """
    metadata = read_metadata(found.metadata, words)
    for problem in metadata.problems:
        yield Entry(name="", problem=problem)
    for path in found.pictures:
        yield _of_file(path, found, metadata, words)
    for path, line in metadata.unused():
        said = f"{line} names {path.name}, which is not there: put it there, or remove the line"
        yield Entry(name=str(path), problem=Problem("named but not there", said))
    for path in found.tars:
        yield from tar_entries(path, found.root, words)
    for path in found.parquet:
        yield from parquet_entries(path, found.root, words)


def _of_file(path: Path, found: Found, metadata: Metadata, words: Words) -> Entry:
    name = path.relative_to(found.root).as_posix()
    captions = list(metadata.take(path))
    texts = found.captions.get((path.parent, path.stem), [])
    for text in texts:
        try:
            captions += words.lines(text.read_bytes(), str(text))
        except ValueError as error:
            return Entry(name=name, path=path, problem=Problem("caption", str(error)))
        except OSError as error:
            said = f"{text} can't be read: {error.strerror or error}"
            return Entry(name=name, path=path, problem=Problem("caption", said))
    if not captions and not texts:
        said = f"{path} has no caption: write it into {path.stem}.txt beside it"
        if found.metadata:
            said += f", or into {found.metadata[0].name}"
        return Entry(name=name, path=path, problem=Problem("no caption", said))
    return Entry(
        name=name, path=path, captions=tuple(dict.fromkeys(captions)), folder=path.parent.name
    )


def orphans(found: Found) -> int:
    """How many captions' files have no picture beside them."""
    names = {(path.parent, path.stem) for path in found.pictures}
    return sum(len(texts) for key, texts in found.captions.items() if key not in names)


def shared_captions(found: Found) -> int:
    """How many pictures have a caption's file that is another picture's, too."""
    names = Counter((path.parent, path.stem) for path in found.pictures)
    return sum(count for key, count in names.items() if count > 1 and key in found.captions)
