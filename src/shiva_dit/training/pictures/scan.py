"""A look at every picture before anything heavy is loaded: what can be taken, and all problems."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from shiva_dit.provenance import data_digest
from shiva_dit.training.pictures.buckets import kept_share, nearest
from shiva_dit.training.pictures.entry import Entry, Problem, Words
from shiva_dit.training.pictures.pixels import READING, Looks, PictureError, glance, look
from shiva_dit.training.pictures.sources import entries, find, orphans, shared_captions

T = TypeVar("T")
R = TypeVar("R")
SHOWN = 10
"""Problems that are listed; of the others the number is said."""
KEY = 32
"""Letters of a digest that are kept: 128 bits."""
REPEATS = re.compile(r"(\d+)_")


class BadPicturesError(ValueError):
    """Some pictures can't be taken; `problems` says which and why."""

    def __init__(self, problems: list[Problem], count: int) -> None:
        self.problems = problems
        what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        self.said = (
            f"{what} beside {count} good pictures: mend them, or leave them out by --skip-bad."
        )
        super().__init__(f"{'; '.join(self.lines())}; {self.said}")

    def lines(self) -> list[str]:
        """The first of them, and how many there are more."""
        return listed(self.problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One that can be taken."""

    name: str
    key: str
    """Digest of its file, of the size that it is brought to, and of how it is read."""
    shape: tuple[int, int]
    captions: tuple[str, ...]
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Taking:
    """How pictures are taken."""

    shapes: list[tuple[int, int]]
    """Sizes that they may be brought to."""
    words: Words = field(default_factory=Words)
    background: tuple[int, int, int] = (255, 255, 255)
    """What shows through transparency, in sRGB."""
    repeats: bool = False
    """Whether a folder named "10_cats" counts ten times."""
    workers: int = 2
    """Threads that read and decode."""


@dataclass(slots=True, kw_only=True)
class Scan:
    """What was found."""

    pictures: list[Picture] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    """How many pictures something is to be said of."""
    left_out: Counter[str] = field(default_factory=Counter)
    signature: str = ""
    """Of the files' names, sizes and times."""

    def summary(self) -> list[str]:
        """What is taken, left out, and changed by being taken; a line each."""
        taken = f"{len(self.pictures)} pictures taken"
        kinds = Counter(problem.kind for problem in self.problems)
        bad = [f"{count} for {kind}" for kind, count in kinds.most_common()]
        lines = [f"{taken}, {len(self.problems)} problems ({', '.join(bad)})" if bad else taken]
        lines += [f"{count} {note}" for note, count in self.notes.items() if count]
        if self.left_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.left_out.items()))
            lines.append(f"files left out: {kinds} (pictures of these kinds: save them as .png)")
        return lines


def listed(problems: list[Problem]) -> list[str]:
    """The first problems as lines, and how many there are more."""
    lines = [problem.line for problem in problems[:SHOWN]]
    more = len(problems) - SHOWN
    return [*lines, f"and {more} more"] if more > 0 else lines


def scan(
    source: Path,
    taking: Taking,
    known: Callable[[str], bool],
    *,
    leave_out: Path | None = None,
    show_progress: bool = True,
) -> Scan:
    """Look at every picture: its whole content, save where the same was found good before.

    Args:
        source: Folder, tar or parquet file.
        taking: How pictures are taken.
        known: Whether a key was encoded before; such pictures aren't decoded again.
        leave_out: Folder that is not looked into.
        show_progress: Whether a bar counts pictures.

    Raises:
        ValueError: If there is nothing there.
        ImportError: If a library for tars or parquet is missing.
    """
    found = find(source, leave_out=leave_out)
    result = Scan(problems=found.problems, left_out=found.left_out, signature=found.signature())

    def each(entry: Entry) -> tuple[list[Problem], Picture | None, list[str]]:
        problems = [] if entry.problem is None else [entry.problem]
        if entry.path is None and entry.data is None:
            return problems, None, []
        seen, notes = _seen(entry, taking, known)
        if isinstance(seen, Problem):
            return [*problems, seen], None, []
        return (problems, None, []) if problems else ([], seen, notes)

    told = tqdm(
        ordered(each, entries(found, taking.words), taking.workers),
        desc="look",
        unit=" pictures",
        disable=not show_progress,
    )
    for problems, picture, notes in told:
        result.notes.update(notes)
        result.problems += problems
        result.pictures += [] if picture is None else [picture]
    result.notes["captions have no picture"] = orphans(found)
    result.notes["share their caption's file with another picture"] = shared_captions(found)
    _note(result, taking)
    return result


def _note(result: Scan, taking: Taking) -> None:
    """What is to be said of captions and repeated pictures."""
    notes, pictures = result.notes, result.pictures
    notes["have several captions (one is drawn each time)"] = sum(
        len(picture.captions) > 1 for picture in pictures
    )
    notes["have an empty caption"] = sum("" in picture.captions for picture in pictures)
    twice = Counter((picture.key, picture.captions) for picture in pictures)
    notes["are there more than once"] = sum(count for count in twice.values() if count > 1)
    if taking.repeats:
        notes["samples with repeats"] = sum(picture.repeats for picture in pictures)


def _seen(
    entry: Entry, taking: Taking, known: Callable[[str], bool]
) -> tuple[Picture | Problem, list[str]]:
    """A picture that can be taken, or why it can't, and what is to be said of it."""
    name = str(entry.path or entry.name)
    try:
        data = entry.read()
        looks = glance(data)
        shape = nearest(looks.width, looks.height, taking.shapes)
        key = picture_key(data, looks, shape, taking)
        if not known(key):
            look(data)
    except PictureError as error:
        return Problem("picture", f"{name} {error}"), []
    except OSError as error:
        said = "leads nowhere" if entry.path and entry.path.is_symlink() else error.strerror
        return Problem("file", f"{name} can't be read: {said or error}"), []
    notes = list(_notes_of(looks, shape))
    times = REPEATS.match(entry.folder)
    if times and not taking.repeats:
        notes.append("lie in folders named 10_name, and count once: --repeats takes the number")
    repeats = max(int(times[1]), 1) if times and taking.repeats else 1
    captions = entry.captions
    return Picture(name=entry.name, key=key, shape=shape, captions=captions, repeats=repeats), notes


def _notes_of(looks: Looks, shape: tuple[int, int]) -> Iterator[str]:
    if looks.frames > 1:
        yield "are animations or have pages, of which the first is taken"
    if looks.width < shape[0] or looks.height < shape[1]:
        yield "are enlarged"
    if kept_share(looks.width, looks.height, shape) < 0.5:
        yield "lose more than half to the crop (--buckets keeps more shapes)"
    if looks.profile:
        yield "have a colour profile that can't be used, and are read as sRGB"


def picture_key(data: bytes, looks: Looks, shape: tuple[int, int], taking: Taking) -> str:
    """What a picture is kept by."""
    background = taking.background if looks.transparent else None
    digest = hashlib.sha256(data).hexdigest()
    return data_digest([digest, shape, background, READING])[:KEY]


def ordered(work: Callable[[T], R], given: Iterable[T], workers: int) -> Iterator[R]:
    """Results in the order of what is given, by threads, a few of it at a time in memory."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for one in given:
                waiting.append(pool.submit(work, one))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
