"""Pictures in tars (webdataset) and parquet files (datasets), by the libraries made for them."""

from __future__ import annotations

import glob
import importlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shiva_dit.training.pictures.entry import Entry, Problem, Words, is_hidden
from shiva_dit.training.pictures.pixels import suffixes

TEXTS = ("txt", "caption", "text")
IMAGES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
"""Names of columns of pictures; where none is there, the first column that holds bytes."""
ROWS = 16
"""Rows of a parquet file in memory at once."""


def needed(module: str, what: str) -> Any:
    """A module of a library that not everybody has.

    Raises:
        ImportError: If it isn't installed; says what to do.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{what} are read by {package}, which is not installed: pip install 'shiva-dit[data]'"
        ) from error


def tar_entries(tar: Path, root: Path, words: Words) -> Iterator[Entry]:
    """The samples of a webdataset shard, in its order."""
    read = needed("webdataset.tariterators", "tar files")
    name = tar.relative_to(root).as_posix()
    count = 0
    try:
        with tar.open("rb") as stream:
            source = {"url": str(tar), "stream": stream}
            for sample in read.group_by_keys(read.tar_file_expander([source])):
                count += 1
                yield from _of_sample(sample, name, words)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = error.args[0] if error.args else error
        said = f"{tar} is damaged after {count} samples, fetch it again: {reason}"
        yield Entry(name=name, problem=Problem("tar", said))


def _of_sample(sample: Mapping[str, Any], tar: str, words: Words) -> Iterator[Entry]:
    key = f"{tar}/{sample['__key__']}"
    if any(is_hidden(part) for part in key.split("/")):
        return
    fields = {field: value for field, value in sample.items() if not field.startswith("__")}
    pictures = [field for field in fields if f".{field.rpartition('.')[2]}" in suffixes()]
    pictures = [field for field in pictures if "." not in field] or pictures
    if not pictures:
        there = ", ".join(fields)
        said = f"{key} holds no picture ({there}): add one, or remove the sample"
        yield Entry(name=key, problem=Problem("no picture", said))
        return
    try:
        captions = _captions(fields, key, words)
    except ValueError as error:
        yield Entry(name=key, problem=Problem("caption", str(error)))
        return
    for field in pictures:
        name = f"{key}.{field}"
        if captions is None:
            said = f"{name} has no caption: add a {key.rpartition('/')[2]}.txt to the tar"
            yield Entry(name=name, data=fields[field], problem=Problem("no caption", said))
        else:
            yield Entry(name=name, data=fields[field], captions=captions)


def _captions(fields: Mapping[str, Any], key: str, words: Words) -> tuple[str, ...] | None:
    found: list[str] = []
    for field in TEXTS if words.column is None else (words.column,):
        if field in fields:
            found += words.lines(fields[field], f"{key}.{field}")
    if "json" in fields and not found:
        try:
            row = json.loads(fields["json"])
        except ValueError as error:
            raise ValueError(f"{key}.json is damaged, it is not JSON: {error}") from error
        if isinstance(row, dict):
            found += words.of_row(row, f"{key}.json") or []
    return tuple(dict.fromkeys(found)) or None


def parquet_entries(file: Path, root: Path, words: Words) -> Iterator[Entry]:
    """The rows of a parquet file, in its order; a part of it in memory at a time."""
    datasets = needed("datasets", "parquet files")
    damaged = (needed("pyarrow", "parquet files").ArrowException, OSError, ValueError)
    damaged += (datasets.exceptions.DatasetGenerationError,)
    logging = datasets.utils.logging

    name, count = file.relative_to(root).as_posix(), 0
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it has to say is said here
    try:
        rows = datasets.load_dataset(
            "parquet",
            data_files=[glob.escape(str(file.absolute()))],
            split="train",
            streaming=True,
            batch_size=ROWS,
        ).decode(False)
        for row in rows:
            yield _of_row(row, f"{name} row {count}", file, words)
            count += 1
    except damaged as error:
        said = f"{file} is damaged after {count} rows, fetch it again: {error}"
        yield Entry(name=name, problem=Problem("parquet", said))
    finally:
        logging.set_verbosity(level)


def _of_row(row: Mapping[str, Any], name: str, file: Path, words: Words) -> Entry:
    column = next((n for n in (*IMAGES, *row) if _is_picture(row.get(n))), None)
    if column is None:
        said = f"{name} holds no picture (columns: {', '.join(row)}): add one, or remove the row"
        return Entry(name=name, problem=Problem("no picture", said))
    try:
        captions = words.of_row({n: v for n, v in row.items() if n != column}, name)
    except ValueError as error:
        return Entry(name=name, problem=Problem("caption", str(error)))
    if captions is None:
        said = f"{name} has {words.missing(row, column)}"
        return Entry(name=name, problem=Problem("no caption", said))
    captions = tuple(dict.fromkeys(captions))
    value = row[column]
    if isinstance(value, bytes):
        return Entry(name=name, data=value, captions=captions)
    if value.get("bytes") is not None:
        return Entry(name=name, data=value["bytes"], captions=captions)
    return Entry(name=name, path=file.parent / value["path"], captions=captions)


def _is_picture(value: Any) -> bool:
    """Whether a cell holds a picture: bytes, or bytes and path as `datasets` writes them."""
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)
    return isinstance(value, bytes)
