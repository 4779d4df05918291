"""Recipes: TOML and `key=value` to frozen dataclasses, strictly, and back."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


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
            nearest right one), or a value has the wrong type or lies outside its range.
    """
    return from_dict(cls, with_overrides(_read(path), overrides), where=str(path))


def _read(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's data, over that of the files that it is like."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        asked = f', which {readers[-1]} is "like"' if readers else ""
        raise ValueError(f"there is no recipe {path}{asked}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    like = data.pop("like", [])
    if not isinstance(like, str) and not (
        isinstance(like, list) and all(isinstance(name, str) for name in like)
    ):
        raise ValueError(f"{path}: like must name one recipe or a list of them, got {like!r}.")
    readers = (*readers, path)
    below: dict[str, Any] = {}
    for name in [like] if isinstance(like, str) else like:
        other = path.parent / name
        if other in readers:
            raise ValueError(f'{path} is "like" {other}, which is like itself in the end.')
        below = merged(below, _read(other, readers))
    return merged(below, data)


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


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Nested data to a dataclass, every key and type checked.

    Args:
        cls: A dataclass.
        data: Its values; what is left out takes its default.
        where: Named in errors.
    """
    hints = typing.get_type_hints(cls)
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
            raise ValueError(f"{where}: expected a table, got {value!r}.")
        return from_dict(hint, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(
                f"{where}: expected one of {', '.join(map(repr, args))}, got {value!r}."
            )
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}.")
        hints = args if args[-1] is not Ellipsis else (args[0],) * len(value)
        if len(hints) != len(value):
            raise ValueError(f"{where}: expected {len(hints)} values, got {value!r}.")
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)
    return _convert_plain(hint, value, where)


def _convert_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value!r}.")
    if hint in (int, float, str, bool, dict) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where}: expected {name}, got {value!r}.")


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
