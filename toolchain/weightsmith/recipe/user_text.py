"""What users write: YAML read strictly, and values checked once, so that no later code meets more.

Recipes, fleet files, the configuration, `--set` and mappings of Python callers all pass here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from weightsmith.core.errors import UsageError
from weightsmith.core.safe_parse import DEEPEST, given_content, parse_yaml
from weightsmith.core.values import JsonValue

_MERGE = "tag:yaml.org,2002:merge"
_JSON = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
)
_NOT_JSON = "only text, numbers, true, false, null, lists and mappings are read here"
_SHOWN = 60


class StrictLoader(yaml.SafeLoader):
    """YAML of JSON's types alone, without duplicate keys: the second would silently win.

    A date without quotes is text as it stands.
    """

    yaml_implicit_resolvers: ClassVar[Any] = {  # type: ignore[misc]  # the stubs say otherwise
        first: [(tag, pattern) for tag, pattern in rows if tag in _JSON or tag == _MERGE]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar[Any] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag in _JSON
    }

    def compose_mapping_node(self, anchor: dict[str, yaml.Node]) -> yaml.MappingNode:
        """Return a mapping as it is written, before keys that it shares are merged into it."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):  # refused later: no key of a mapping
                continue
            merges = key_node.tag == _MERGE  # `<<: *shared`, which gives way to keys beside it
            key = "<<" if merges else self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return node


def _of_other_type(_loader: StrictLoader, node: yaml.Node) -> NoReturn:
    kind = str(node.tag).replace("tag:yaml.org,2002:", "!!")
    raise yaml.constructor.ConstructorError(
        None, None, f"type {kind[:_SHOWN]}: {_NOT_JSON}", node.start_mark
    )


StrictLoader.add_constructor(None, _of_other_type)


def read_mapping(path: Path, *, kind: str, missing: str, begins: str) -> dict[str, JsonValue]:
    """Return the mapping that a user's YAML file holds; raises UsageError naming file and line.

    `kind` is what the file is, `missing` the hint if it does not exist, `begins` how one starts.
    """
    try:
        data = read_yaml(path, hint=f"a {kind} begins with {begins}")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such {kind}", hint=missing) from None
    if not isinstance(data, dict):
        raise UsageError(
            f"{path}: a {kind} is a mapping of keys, this is not", hint=f"it begins with {begins}"
        )
    return data


def read_yaml(path: Path, *, hint: str) -> JsonValue:
    """Return the value of a user's YAML file, None of an empty one.

    Raises FileNotFoundError if there is no such file, UsageError for any other fault.
    """
    try:
        text = given_content(path).decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read: {error}", hint="give a file of UTF-8 text"
        ) from None
    try:
        value: JsonValue = parse_yaml(text, StrictLoader)
    except ValueError as error:
        raise UsageError(
            f"{path}: not valid YAML: {_yaml_fault(error)}", hint=f"correct that line; {hint}"
        ) from None
    return value


def read_setting(text: str) -> JsonValue:
    """Return the value of a setting's text: YAML, else the text as it stands.

    Raises ValueError, for a list or mapping that is not valid.
    """
    try:
        value: JsonValue = parse_yaml(text, StrictLoader)
    except ValueError as error:
        if text.lstrip().startswith(("{", "[")):
            raise ValueError(_yaml_fault(error)) from None
        return text
    return value


def _yaml_fault(error: ValueError) -> str:
    cause = error.__cause__
    if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark is not None:
        mark = cause.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {cause.problem}"
    return str(error)


def require_plain(data: Mapping[str, object], where: str, hint: str, *place: str) -> None:
    """Raise UsageError for values that are not JSON's, with their places; `place` is `data`'s own.

    Text without NUL and half characters, finite numbers of 64 bits, and keys of text: all of it can
    be a file's name, be written as JSON and be read by engines.
    """
    faults = [fault for fault, _ in zip(_faults(data, place), range(5), strict=False)]
    if faults:
        raise UsageError(f"{where}: {'; '.join(faults)}", hint=hint)


def _faults(value: object, place: tuple[str, ...]) -> Iterator[str]:
    """Yield what is wrong with a value and with what it holds, each with its place."""
    here = f"`{'.'.join(place)}`" if place else "it"
    if len(place) > DEEPEST:
        yield f"{here[:_SHOWN]}…: nested deeper than {DEEPEST} levels"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                named = _of_number(key) or key
                yield f"{here}: the key {named} is no text; write it in quotes"
            elif problem := _of_text(key):
                yield f"{here}: a key {problem}"
            else:
                yield from _faults(inner, (*place, key[:_SHOWN]))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _faults(inner, (*place, str(number)))
    elif problem := _of_text(value) if isinstance(value, str) else _of_number(value):
        yield f"{here}: {problem}"


def _of_number(value: object) -> str:
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return "a number of more than 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if value is not None and not isinstance(value, int | float):
        return f"a {type(value).__name__}; {_NOT_JSON}"
    return ""


def _of_text(text: str) -> str:
    if "\0" in text:
        return "holds the character NUL, which no file's name and no argument can"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return f"is not UTF-8: {text[:_SHOWN]!r}"
    return ""
