"""JSON objects as frozen dataclasses, read and written according to their field types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from weightsmith.core.values import JsonValue, plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Measured: TypeAlias = Annotated[float, "null is not a number"]
"""A float that may be infinite or not a number: JSON has null for both, read back as NaN."""
_Value = TypeVar("_Value")
_SCALARS = frozenset({str, int, bool, NoneType})

INLINE = {"inline": True}
"""Metadata of a field of type `D | None` whose keys are inlined into the enclosing object;
the field is None if none of these keys is present."""
OMITTED = {"omitted": True}
"""Metadata of a field that is left out of the JSON if it equals its default."""


class JsonObject:
    """Base class of dataclasses that are JSON objects; the keys are the fields, in order."""

    __slots__ = ()

    @classmethod
    def from_json(cls, value: JsonValue) -> Self:
        """Read an object; raise ValueError naming a key that is missing or has the wrong type.

        Unknown keys are ignored. A field with a default may be missing or null.
        """
        kind: Any = cls
        return cast("Self", kind(**_fields_of(kind, value, "")))

    def to_json(self) -> dict[str, JsonValue]:
        """Return the JSON object; numbers that are not finite become null."""
        found: dict[str, JsonValue] = {}
        kind: Any = type(self)
        for one in _fields(kind):
            value = getattr(self, one.name)
            if is_inline(one):
                found |= value.to_json() if value is not None else {}
            elif not (is_omitted(one) and value == _default(one)):
                found[one.name] = _written(value)
        return found


def read_exactly(kind: type[_Value], value: JsonValue, place: str = "") -> _Value:
    """Read what `plain` wrote of a dataclass; raise ValueError naming what is wrong.

    Every field must be there, and nothing else. A `JsonObject` inside is read by its own rules.
    """
    return cast("_Value", _read(kind, value, place, exact=True))


def _default(one: Field[Any]) -> object:
    return one.default if one.default_factory is MISSING else one.default_factory()


def is_inline(one: Field[object]) -> bool:
    """Whether the keys of a field's value are inlined into the enclosing object."""
    return "inline" in one.metadata


def is_omitted(one: Field[object]) -> bool:
    """Whether a field is left out of the JSON if it equals its default."""
    return "omitted" in one.metadata


@cache
def types_of(kind: type[object]) -> Mapping[str, object]:
    """Return a dataclass's fields by name with their types."""
    return get_type_hints(kind, include_extras=True)


@cache
def _fields(kind: type[DataclassInstance]) -> tuple[Field[object], ...]:
    return fields(kind)


def _written(value: object) -> JsonValue:
    if type(value) in _SCALARS:  # a fast path for most values
        return cast("JsonValue", value)
    if isinstance(value, JsonObject):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _written(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_written(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    other: Any = value
    return cast("JsonValue", plain(other))


def _fields_of(
    kind: type[DataclassInstance], value: JsonValue, place: str, *, exact: bool = False
) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _another(value, "an object", place)
    if exact and (wrong := {one.name for one in _fields(kind)} ^ set(value)):
        raise ValueError(f"{place or 'it'}: missing or unknown keys: {', '.join(sorted(wrong))}")
    found: dict[str, object] = {}
    for one in _fields(kind):
        hint, path = types_of(kind)[one.name], f"{place}.{one.name}" if place else one.name
        if is_inline(one):
            inner = part_of(hint)
            if any(key.name in value for key in _fields(inner)):
                found[one.name] = inner(**_fields_of(inner, value, place))
            continue
        has_default = one.default is not MISSING or one.default_factory is not MISSING
        optional = not exact and has_default
        if value.get(one.name) is not None or (one.name in value and not optional):
            found[one.name] = _read(hint, value[one.name], path, exact=exact)
        elif not optional:
            raise ValueError(f"{path} is missing")
    return found


def part_of(hint: object) -> Any:
    """Return X of a type `X | None`."""
    return next(part for part in get_args(hint) if part is not NoneType)


def _read(hint: object, value: JsonValue, place: str, *, exact: bool) -> object:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return _written(value)
    if origin in (Union, UnionType):
        return None if value is None else _read(part_of(hint), value, place, exact=exact)
    if origin is Literal:  # in a record of a later version, it may be a new one
        if not isinstance(value, str) or (exact and value not in parts):
            raise _another(value, f"one of {', '.join(parts)}", place)
        return value
    if origin is Annotated:
        return math.nan if value is None else _read(parts[0], value, place, exact=exact)
    if origin is tuple:
        if not isinstance(value, list):
            raise _another(value, "a list", place)
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(value) != len(kinds):
            raise ValueError(f"{place} has {len(value)} values, not {len(kinds)}")
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(_read(kind, inner, f"{place}[{i}]", exact=exact) for i, (kind, inner) in pairs)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _another(value, "an object", place)
        return {
            key: _read(parts[1], inner, f"{place}.{key}", exact=exact)
            for key, inner in value.items()
        }
    kind: Any = hint
    if is_dataclass(hint):
        exact = exact and not issubclass(kind, JsonObject)
        return kind(**_fields_of(kind, value, place, exact=exact))
    return _scalar(kind, value, place)


def _scalar(kind: type, value: JsonValue, place: str) -> object:
    if kind is bool or isinstance(value, bool):  # a bool is an int in Python, but not in JSON
        right = kind is bool and isinstance(value, bool)
    elif kind is float:  # JSON has no number that is not finite, but Python reads NaN and 1e999
        right = isinstance(value, int | float) and abs(value) < math.inf
    else:
        right = isinstance(value, str if issubclass(kind, str | Path) else kind)
    if not right:
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        raise _another(value, names.get(kind, "text"), place)
    try:
        return value if kind in (bool, int, float, str) else kind(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _another(value: JsonValue, wanted: str, place: str) -> ValueError:
    return ValueError(f"{place or 'it'} is not {wanted}: {repr(value)[:80]}")
