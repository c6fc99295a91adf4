"""What a section of the recipe is: checked fields, each with its flag on the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Self, get_type_hints

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Base class of the recipe's sections; other keys than their fields are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), defer_build=True
    )

    def changed(self, **values: object) -> Self:
        """Return it with other values, checked as a user's are; raises pydantic's error."""
        given = {
            field.alias or name: values.get(name, getattr(self, name))
            for name, field in type(self).model_fields.items()
            if name in self.model_fields_set | values.keys()
        }
        return type(self).model_validate(given)


@dataclass(frozen=True, slots=True)
class Flag:
    """How a field is spelled on the command line, where it differs from the field's own name."""

    name: str = ""
    """The flag, as a Python name."""
    read: Callable[[Any], Any] | None = None
    """What the flag's text stands for, or the list of its texts where it may be repeated."""
    example: str = ""
    """One text of the flag, where the description's example is another."""
    many: bool | None = None
    """Whether it may be repeated; by default, whether the field holds several values."""
    positional: bool = False
    """Whether it has no flag, but is the command's first word."""
    needed: Callable[[Collection[str]], bool] | None = None
    """Whether it must be given beside these fields, if it has a default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagFields:
    """Which fields of a section are flags of a command."""

    only: tuple[str, ...] = ()
    """Fields that are flags; by default all."""
    without: tuple[str, ...] = ()
    """Fields that are not flags."""
    over_recipe: bool = False
    """Whether the command also reads a recipe. It has the other values, so no default is shown."""


class PathUse(Enum):
    """What a command does in the folder or with the file that a field names."""

    READ = "read"
    WRITTEN = "written"


def is_section(kind: object) -> bool:
    """Return whether a type is a section; one that builders read too is a plain dataclass."""
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind))


def fields_of(section: type) -> Mapping[str, FieldInfo]:
    """Return a section's fields by name."""
    if issubclass(section, BaseModel):
        return section.model_fields
    kind: Any = section
    return _fields_of(kind)


@cache  # all commands have fields of the same sections, and every start reads them
def _fields_of(section: Any) -> Mapping[str, FieldInfo]:
    hints = get_type_hints(section, include_extras=True)
    return {
        one.name: FieldInfo.from_annotated_attribute(hints[one.name], one)
        for one in fields(section)
    }


def flag_of(field: FieldInfo) -> Flag:
    """Return how a section's field is spelled on the command line."""
    return next((item for item in field.metadata if isinstance(item, Flag)), Flag())


def spelling(section: type, name: str) -> str:
    """Return the flag that changes a field, such as `--keep-module` for `keep`."""
    field = fields_of(section)[name]
    no = "no-" if field.default is True else ""
    # A field that Python's own words would hide ends with one.
    return f"--{no}{(flag_of(field).name or name).rstrip('_').replace('_', '-')}"
