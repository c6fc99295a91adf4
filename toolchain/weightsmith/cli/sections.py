"""A section of the recipe as flags: name, type, default and help are those of its fields."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from weightsmith.errors import UsageError
from weightsmith.recipe_section import fields_of, flag_of, spelling

_EXPECTED = {"int_parsing": "a whole number", "float_parsing": "a number"}
"""Kind of fault -> what a flag takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The flags that a command takes from one section."""

    section: type[Any]
    only: tuple[str, ...] = ()
    """Fields that are flags; by default all."""
    without: tuple[str, ...] = ()
    """Fields that are not flags."""
    over_recipe: bool = False
    """Whether the command also reads a recipe. It has the other values, so no default is shown."""

    def fields(self) -> Iterator[tuple[str, str, FieldInfo]]:
        """Yield the parameter, the field's name and the field of each flag."""
        for name, field in fields_of(self.section).items():
            if name not in self.without and (not self.only or name in self.only):
                yield flag_of(field).name or name, name, field

    def parameters(self) -> list[inspect.Parameter]:
        """Return the flags as parameters; Invoke reads the types from their defaults."""
        kind = inspect.Parameter.KEYWORD_ONLY
        return [
            inspect.Parameter(parameter, kind, default=self._default(field))
            for parameter, name, field in self.fields()
        ]

    def help(self) -> dict[str, str]:
        """Return each flag's help by its parameter."""
        return {parameter: _help(field) for parameter, name, field in self.fields()}

    def many(self) -> tuple[str, ...]:
        """Return the flags that may be repeated."""
        return tuple(p for p, name, field in self.fields() if _is_many(field))

    def read(self, arguments: dict[str, Any]) -> Any:
        """Take the flags out of the arguments; return the section with those that were given.

        Raises UsageError naming the flag.
        """
        given = {}
        texts = {}
        for parameter, name, field in self.fields():
            value = arguments.pop(parameter)
            if value in ("", [], None) or value == self._default(field):
                continue
            texts[name] = value
            if read := flag_of(field).read:
                try:
                    value = read(value)
                except ValueError as error:
                    flag = spelling(self.section, name)
                    raise UsageError(f"{flag} {value}: {error}", hint=_described(field)) from None
            choices = {str(choice): choice for choice in _choices(field.annotation)}
            given[name] = choices.get(value, value) if isinstance(value, str) else value
        try:
            return TypeAdapter(self.section).validate_python(given)
        except ValidationError as error:
            raise self._refused(error.errors(include_url=False), texts) from None

    def _refused(self, faults: list[ErrorDetails], texts: Mapping[str, Any]) -> UsageError:
        name = str(faults[0]["loc"][0]) if faults[0]["loc"] else ""
        if name not in texts:  # a rule about several fields
            flags = ", ".join(spelling(self.section, given) for given in texts)
            return UsageError(_message(faults[0]), hint=f"given: {flags}")
        own = [fault for fault in faults if fault["loc"][:1] == (name,)]
        expected = [text for fault in own if (text := _expected(fault))]
        problem = f"expected {' or '.join(expected)}" if expected else _message(own[0])
        value = texts[name]
        shown = " ".join(value) if isinstance(value, list) else str(value)
        return UsageError(
            f"{spelling(self.section, name)} {shown}: {problem}",
            hint=_described(fields_of(self.section)[name]),
        )

    def _default(self, field: FieldInfo) -> Any:
        if _is_many(field):
            return None
        if isinstance(field.default, bool):
            return field.default
        return "" if self.over_recipe or not field.default else str(field.default)


def given(key: str, section: BaseModel) -> list[str]:
    """Return what was given of a section as `key.path=value` settings of a recipe."""
    values = section.model_dump(mode="json", exclude_unset=True)
    return [f"{key}.{name}={json.dumps(value)}" for name, value in values.items()]


def _help(field: FieldInfo) -> str:
    """Return a field's description as a flag's help, and add choices that it does not name."""
    text = _described(field)
    choices = [str(choice) for choice in _choices(field.annotation)]
    if not all(choice in text for choice in choices):
        *first, last = choices
        text += f". Choices: {', '.join(first)} or {last}" if first else f", or {last}"
    if example := flag_of(field).example:
        text += f": {example}"
    return f"{text}; repeat for several" if _is_many(field) else text


def _is_many(field: FieldInfo) -> bool:
    many = flag_of(field).many
    return get_origin(field.annotation) in (tuple, dict) if many is None else many


def _described(field: FieldInfo) -> str:
    """Return a field's description as the command line writes it."""
    text = (field.description or "").replace("`", "").rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values that an annotation lists."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for kind in get_args(annotation) for choice in _choices(kind))
    return ()


def _expected(fault: ErrorDetails) -> str:
    if fault["type"] == "literal_error":
        return str(fault["ctx"]["expected"]).replace("'", "")
    return _EXPECTED.get(fault["type"], "")


def _message(fault: ErrorDetails) -> str:
    if fault["type"] == "string_pattern_mismatch":
        return "not in the expected form"
    text = fault["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
