"""Recipes: TOML and `key=value` to frozen dataclasses, strictly, and back."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import os
import reprlib
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
NONE = "none"
"""How TOML, which has no such value, says None."""
LARGEST_SEED = 2**32 - 1
"""Seeds of epochs and images are made from a run's by products that must stay below 2^63."""


def load_recipe(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """A recipe file and command-line overrides to a config.

    Args:
        cls: A dataclass.
        path: A TOML file whose tables are the nested dataclasses. `like = "other.toml"` puts it
            over another one, a list over several, each over those before it; paths are relative
            to the file.
        overrides: `key=value` or `table.key=value`; the value in TOML, or a bare string.

    Raises:
        ValueError: If the file is missing or no TOML, a key is unknown (the error names the
            nearest right one), or a value has the wrong type or lies outside its range. If a file
            sets nothing: all defaults are hardly what its writer meant.
    """
    try:
        return from_dict(cls, with_overrides(_read(path), overrides), where=str(path))
    except RecursionError as error:
        raise ValueError(f"{path}, or what is set over it, is nested too deeply.") from error


def _read(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's data, over that of the files that it is like."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        asked = f', which {readers[-1]} is "like"' if readers else ""
        raise ValueError(
            f"there is no recipe {path}{asked}: check the path. Examples lie in recipes/ of "
            "shiva-dit's repository."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, as TOML is: {error}") from error
    except ValueError as error:  # TOML's own errors, and numbers of thousands of digits
        raise ValueError(f"{path} is not TOML: {error}") from error
    like = data.pop("like", [])
    if not isinstance(like, str) and not (
        isinstance(like, list) and all(isinstance(name, str) for name in like)
    ):
        raise ValueError(f"{path}: like must name one recipe or a list of them, got {like!r}.")
    if like == [] and not _sets_something(data):
        raise ValueError(
            f"{path} is an empty recipe, it sets nothing: write into it what shall differ from the "
            'defaults, or like = "other.toml" for the recipe that it goes on from.'
        )
    readers = (*readers, path)
    below: dict[str, Any] = {}
    for name in [like] if isinstance(like, str) else like:
        other = path.parent / usable_path(f"{path}: like", name)
        if os.path.realpath(other) in map(os.path.realpath, readers):
            raise ValueError(f'{path} is "like" {other}, which is like itself in the end.')
        below = merged(below, _read(other, readers))
    return merged(below, data)


def _sets_something(data: Any) -> bool:
    """Whether nested data holds a value: empty tables hold none."""
    return not isinstance(data, Mapping) or any(map(_sets_something, data.values()))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested data with the values of other nested data put over it.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def with_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested data with `table.key=value` assignments applied.

    >>> with_overrides({"a": {"b": 1}}, ["a.b=2", "name=digits"])
    {'a': {'b': 2}, 'name': 'digits'}
    """
    result = copy.deepcopy(dict(data))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ValueError(f"expected key=value or table.key=value, got {override!r}.")
        *tables, key = path.strip().split(".")
        target = result
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ValueError(f"{override!r}: {table!r} is a value, not a table.")
        target[key] = _parse_value(text.strip())
    return result


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
    except RecursionError as error:
        raise ValueError(f"{text[:20]}... is nested too deeply.") from error


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Nested data to a dataclass, every key and type checked.

    Args:
        cls: A dataclass.
        data: Its values; what is left out takes its default.
        where: Named in errors.
    """
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    prefix = f"{where}: " if where else ""
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{prefix}unknown key {key!r}; {hint}Known: {', '.join(fields)}.")
    values = {
        key: _convert(hints[key], value, f"{where}.{key}" if where else key)
        for key, value in data.items()
    }
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ValueError(f"{prefix}{name!r} is missing.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a table, got {_shown(value)}.")
        return from_dict(hint, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(
                f"{where}: expected one of {', '.join(map(repr, args))}, got {_shown(value)}."
            )
        return value
    if origin in (typing.Union, types.UnionType):
        if value in (None, NONE) and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {_shown(value)}.")
        hints = args if args[-1] is not Ellipsis else (args[0],) * len(value)
        if len(hints) != len(value):
            raise ValueError(f"{where}: expected {len(hints)} values, got {_shown(value)}.")
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)
    return _convert_plain(hint, value, where)


def _convert_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float:
        return finite_number(where, value)
    if hint is int:
        return whole_number(where, value)
    if hint is Path and isinstance(value, (str, Path)):
        return usable_path(where, value)
    if hint in (str, bool, dict) and isinstance(value, hint):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where}: expected {name}, got {_shown(value)}.")


def check_seeds(seeds: Sequence[int]) -> None:
    """Check several runs' seeds, before the first of them.

    Raises:
        ValueError: If one lies outside [0, 2^32).
    """
    for seed in seeds:
        whole_number("each of seeds", seed, least=0, most=LARGEST_SEED)


def usable_path(name: str, value: str | Path) -> Path:
    """A path that a caller gave.

    Raises:
        ValueError: If it is empty, which would mean the current folder, or no system takes it.

    >>> usable_path("out", "runs/train").name
    'train'
    """
    if not str(value):
        raise ValueError(f"{name}: expected a path, got ''; the current folder is '.'.")
    if "\0" in str(value):
        raise ValueError(f"{name}: a path can't hold a NUL character, got {_shown(str(value))}.")
    return Path(value)


def check_types(config: object) -> None:
    """Check the types of a dataclass's values against its annotations; for `__post_init__`.

    An int stands for a float, but no bool for a number, and no float for an int. Numbers are
    finite.

    Raises:
        ValueError: Names the field, what was expected and what came.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not (dataclasses.is_dataclass(hint) and isinstance(value, hint)):  # type: ignore[arg-type]
            _convert(hint, value, name)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number that a caller gave: no bool, and no float, even one such as 2.0.

    Args:
        name: Named in errors.
        value: What came.
        least: Smallest that is allowed.
        most: Largest that is allowed.

    Raises:
        ValueError: If it is none, or out of range.

    >>> whole_number("steps", 3, least=1)
    3
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected int, got {_shown(value)}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {_shown(value)}.")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {_shown(value)}.")
    if abs(value) > sys.float_info.max:
        raise ValueError(f"{name}: expected a whole number below 10^308, got {_shown(value)}.")
    return value


def finite_number(name: str, value: Any) -> float:
    """A finite number that a caller gave, as a float: no bool, no NaN.

    Raises:
        ValueError: If it is none.

    >>> finite_number("rate", 1)
    1.0
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected float, got {_shown(value)}.")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}.")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}.")
    return float(value)


def _shown(value: Any) -> str:
    """A value in an error, whatever its size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def to_dict(config: object) -> dict[str, Any]:
    """A dataclass to nested plain data that `from_dict` takes back."""
    data = dataclasses.asdict(config)  # type: ignore[call-overload]
    return {key: _plain(value) for key, value in data.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
