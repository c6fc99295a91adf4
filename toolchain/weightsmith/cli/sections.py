"""A section of the recipe as flags: name, type, default and help are those of its fields."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.recipe.section import FlagFields, fields_of, flag_of, spelling

_EXPECTED = {"int_parsing": "a whole number", "float_parsing": "a number"}
"""Kind of fault -> what a flag takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(FlagFields):
    """The flags that a command takes from one section, or from its request and the parts of it."""

    section: type[object]

    def _own(self) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in fields_of(self.section).items():
            if name not in self.without and (not self.only or name in self.only):
                yield name, field

    def fields(self) -> Iterator[tuple[str, FieldInfo, str | bool | None]]:
        """Yield the parameter, the field and the default of each flag."""
        for name, field in self._own():
            if part := _part(field):
                yield from part.fields()
            else:
                yield flag_of(field).name or name, field, self._default(field)

    def parameters(self) -> list[inspect.Parameter]:
        """Return the flags as parameters; Invoke reads the types from their defaults."""
        found = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            if flag_of(field).positional
            else inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, field, default in self.fields()
        ]
        return sorted(found, key=lambda one: one.kind)

    def help(self) -> dict[str, str]:
        """Return each flag's help by its parameter."""
        found = {}
        for parameter, field, _ in self.fields():
            text = _described(field)
            choices = [str(choice) for choice in _choices(field.annotation)]
            if not all(choice in text for choice in choices):
                *first, last = choices
                text += f". Choices: {', '.join(first)} or {last}" if first else f", or {last}"
            if example := flag_of(field).example:
                text += f": {example}"
            found[parameter] = f"{text}; repeat for several" if _is_many(field) else text
        return found

    def many(self) -> list[str]:
        """Return the flags that may be repeated."""
        return [parameter for parameter, field, _ in self.fields() if _is_many(field)]

    def positional(self) -> tuple[str, ...]:
        """Return what has no flag."""
        return tuple(name for name, field, _ in self.fields() if flag_of(field).positional)

    def read(self, arguments: dict[str, JsonValue]) -> Any:
        """Take the flags out of the arguments; return the section with those that were given.

        Raises UsageError naming the flag.
        """
        given, texts, missing = dict[str, JsonValue](), dict[str, JsonValue](), list[str]()
        for name, field in self._own():
            if part := _part(field):
                given[name] = part.read(arguments)
                continue
            value = arguments.pop(flag_of(field).name or name)
            if value in ("", [], None):
                # An empty path, as of a variable that is not set, would be the current folder.
                if field.is_required() or (value == "" and isinstance(field.default, Path)):
                    missing.append(name)
                continue
            if value == self._default(field):
                continue
            texts[name] = value
            value = _expanded(value) if _names_paths(field.annotation) else value
            if read := flag_of(field).read:
                try:
                    value = read(value)
                except ValueError as error:
                    flag = spelling(self.section, name)
                    raise UsageError(f"{flag} {value}: {error}", hint=_described(field)) from None
            choices = {str(choice): choice for choice in _choices(field.annotation)}
            given[name] = choices.get(value, value) if isinstance(value, str) else value
        for name, field in self._own():
            needed = flag_of(field).needed
            if needed and name not in texts and needed(texts):
                missing.append(name)
        if missing:
            flags = ", ".join(spelling(self.section, name) for name in missing)
            raise UsageError(f"missing: {flags}", hint="`--help COMMAND` lists every flag")
        try:
            return TypeAdapter(self.section).validate_python(given)
        except ValidationError as error:
            raise self._refused(error.errors(include_url=False), texts) from None

    def _refused(self, faults: list[ErrorDetails], texts: Mapping[str, JsonValue]) -> UsageError:
        name = str(faults[0]["loc"][0]) if faults[0]["loc"] else ""
        own = [fault for fault in faults if fault["loc"][:1] == (name,)]
        first = own[0] if name in texts else faults[0]
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[:1].lower() + problem[1:]
        if first["type"] == "string_pattern_mismatch":
            problem = "not in the expected form"
        if name not in texts:  # a rule about several fields
            flags = ", ".join(spelling(self.section, given) for given in texts)
            return UsageError(problem, hint=f"given: {flags}")
        expected = [
            str(fault["ctx"]["expected"]).replace("'", "")
            if fault["type"] == "literal_error"
            else _EXPECTED.get(fault["type"], "")
            for fault in own
        ]
        if any(expected):
            problem = f"expected {' or '.join(filter(None, expected))}"
        value = texts[name]
        shown = " ".join(value) if isinstance(value, list) else str(value)
        choices = [word for words in expected for word in re.split(r", | or ", words)]
        near = difflib.get_close_matches(shown.lower(), choices, 1)
        return UsageError(
            f"{spelling(self.section, name)} {shown}: {problem}",
            hint=(f"did you mean {near[0]}? " if near else "")
            + _described(fields_of(self.section)[name]),
        )

    def _default(self, field: FieldInfo) -> str | bool | None:
        if _is_many(field):
            return None
        if isinstance(field.default, bool):
            return field.default
        shown = field.default and not self.over_recipe and not field.is_required()
        if shown and isinstance(field.default, tuple):
            return ",".join(map(str, field.default))
        return str(field.default) if shown else ""


def _names_paths(annotation: object) -> bool:
    return annotation is Path or any(map(_names_paths, get_args(annotation)))


def _expanded(value: JsonValue) -> JsonValue:
    """Return paths with `~` expanded, which a shell leaves as it is in quotes and after `=`."""
    if isinstance(value, list):
        return [*map(_expanded, value)]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        raise UsageError(
            f"{value} begins with ~ and the name of a user who has no home folder",
            hint="write the folder in full",
        ) from None


def _part(field: FieldInfo) -> Flags | None:
    found = next((item for item in field.metadata if isinstance(item, FlagFields)), None)
    return Flags(section=cast("type[object]", field.annotation), **asdict(found)) if found else None


def _is_many(field: FieldInfo) -> bool:
    many = flag_of(field).many
    return get_origin(field.annotation) in (tuple, dict) if many is None else many


def _described(field: FieldInfo) -> str:
    text = field.description or next((t for t in field.metadata if isinstance(t, str)), "")
    text = text.replace("`", "").rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _choices(annotation: object) -> tuple[JsonValue, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for kind in get_args(annotation) for choice in _choices(kind))
    return ()
