# SPDX-License-Identifier: Apache-2.0
"""Mappings, as of YAML, into dataclasses; each error names the key by its whole path."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from cumo.data.yaml_text import shown

T = TypeVar("T")


def build(cls: type[T], values: Any, where: str = "") -> T:
    """An instance of a dataclass from a mapping of its fields.

    Fields may be of type bool, int, float, str, None, a dataclass, `dict[str, Any]`, a list, or a union of these. A
    number may come as a string, since YAML takes `1e-3` for one.

    Args:
        cls: a dataclass.
        values: the mapping.
        where: path of `values` in the whole, for errors.

    Raises:
        ValueError: a key is unknown or missing, or a value is of another type or refused by the dataclass.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'recipe'}: expected keys and values, got {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ValueError(f"{joined(where, key)}: expected one of {list(fields)}{hint(str(key), list(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{joined(where, name)}: expected a value, got none")
    arguments = {key: convert(value, hints[key], joined(where, key)) for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(joined(where, str(error)[:1000])) from error


def joined(where: str, key: object) -> str:
    """A path one step longer."""
    return f"{where}.{key}" if where else str(key)


def hint(key: str, known: Sequence[str]) -> str:
    """A suggestion for a mistyped key, to end a message with."""
    close = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def convert(value: Any, kind: Any, where: str) -> Any:
    """A value as the type `kind`.

    Raises:
        ValueError: it is none.
    """
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    plain = [option for option in options if not dataclasses.is_dataclass(option)]
    for option in plain:
        found, result = _as(value, option, where)
        if found:
            return result
    for option in options:
        if dataclasses.is_dataclass(option):
            if isinstance(value, option):  # type: ignore[arg-type]
                return value
            if isinstance(value, Mapping):
                return build(option, value, where)  # type: ignore[arg-type]
    raise ValueError(f"{where}: expected {' or '.join(map(_name, options))}, got {shown(value)}")


def _as(value: Any, kind: Any, where: str) -> tuple[bool, Any]:
    """Whether a value is of a plain type, and the value."""
    if kind is Any:
        return True, value
    if kind is type(None):
        return value is None, None
    if kind in (bool, str):
        return isinstance(value, kind), value
    if kind in (int, float):
        return _number(value, kind)
    origin = typing.get_origin(kind)
    if origin is list and isinstance(value, (list, tuple)):
        (inner,) = typing.get_args(kind)
        return True, [convert(item, inner, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return True, dict(value)
    return False, None


def _number(value: Any, kind: type) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return False, None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return False, None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    return fits, kind(value) if fits else None


def _name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if dataclasses.is_dataclass(kind):
        return "keys and values"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}.get(kind, str(kind))


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings in one, where they differ that of `above`; nested mappings are merged as well."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            value = merged(result[key], value)
        result[key] = value
    return result
