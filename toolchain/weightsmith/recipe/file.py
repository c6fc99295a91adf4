"""Reads recipes: YAML, settings of the command line on top, and what is wrong in plain words."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from weightsmith.core.errors import UsageError
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.section import fields_of, is_section
from weightsmith.recipe.sources import is_remote
from weightsmith.recipe.user_text import read_mapping, read_setting, require_plain

_Section = TypeVar("_Section")

_SCALARS: Mapping[type, str] = {bool: "true or false", int: "a number", float: "a number"}
"""Type that YAML gives to a text without quotes -> what it is."""
_HINT = "docs/reference/recipe.md lists every key"
_QUOTED = re.compile(r"'([^']*)'")
_OR_A_WORD: Mapping[str | int, str] = {"int": "a whole number", "bool": "true, false"}
"""Type that a field takes beside a word, such as `auto`, by pydantic's name -> what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFile:
    """A checked recipe and the folder that its relative paths start from."""

    recipe: Recipe
    folder: Path
    path: Path | None = None
    """The file, unless the command line changed its sources."""
    lasting: bool = True
    """Whether the file and its lock outlive the command."""


def read_recipe(path: Path, settings: Sequence[str] = ()) -> RecipeFile:
    """Read and check a recipe file; `settings` are `key.path=value` overrides.

    Raises UsageError naming the file, the key and its nearest known spelling.
    """
    if path.is_dir():
        path = path / "recipe.yaml"
    data = read_mapping(
        path,
        kind="recipe",
        missing="give one with --recipe FILE, or --base and --adapter for a one-off build",
        begins="`name: …` and `base: {source: …}`",
    )
    if isinstance(image := data.get("image"), dict):  # others may be named in the lock as they are
        data["image"] = placed(image, path.parent, ("image",))
    own = not any(setting.startswith(("base", "adapters")) for setting in settings)
    return RecipeFile(
        recipe=check_recipe(with_settings(data, settings), str(path)),
        folder=path.parent,
        path=path if own else None,
    )


def check_recipe(data: Mapping[str, object], where: str) -> Recipe:
    """Return the recipe that a mapping describes, or raise UsageError listing every fault."""
    require_plain(data, where, _HINT)
    return validated(Recipe, data, where)


def check_section(section: type[_Section], data: Mapping[str, object], where: str) -> _Section:
    """Return one section of a recipe, checked as in a whole one; UsageError lists every fault."""
    key = next(
        field.alias or name
        for name, field in Recipe.model_fields.items()
        if any(
            isinstance(kind, type) and (issubclass(section, kind) or issubclass(kind, section))
            for kind in (field.annotation, *get_args(field.annotation))
        )
    )
    require_plain(data, where, _HINT, key)
    return validated(section, data, where, key)


def validated(
    section: type[_Section], data: Mapping[str, object], where: str, *place: str
) -> _Section:
    """Return a section or a request of its fields; UsageError lists every fault."""
    try:
        return TypeAdapter(section).validate_python(dict(data))
    except ValidationError as error:
        errors = error.errors(include_url=False)
    for item in errors:
        item["loc"] = _written(data, (*place, *item["loc"]))
    # Of a number or a word, pydantic says for each that it is not that.
    words = {
        item["loc"][:-1]: item["ctx"]["expected"]
        for item in errors
        if item["loc"] and str(item["loc"][-1]).startswith("literal[")
    }
    faults = []
    for item in errors:
        *outer, last = item["loc"] or ("",)
        word = words.get(tuple(outer))
        if word and last in _OR_A_WORD:
            at = ".".join(map(str, outer))
            faults.append(f"`{at}`: expected {_OR_A_WORD[last]} or {word}")
        elif not word:
            faults.append(_fault(item))
    raise UsageError(f"{where}: " + "; ".join(faults[:5]), hint=_HINT)


def _written(data: object, place: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Return where the user wrote a value: a suite alone is read as the first of a list."""
    found: list[str | int] = []
    for step in place:
        if not (isinstance(step, int) and isinstance(data, Mapping)):
            found.append(step)
            data = (
                data.get(step)
                if isinstance(data, Mapping)
                else data[step]
                if isinstance(data, list | tuple) and isinstance(step, int)
                else None
            )
    return tuple(found)


def with_settings(data: Mapping[str, object], settings: Sequence[str]) -> dict[str, Any]:
    """Return a copy of the mapping with `key.path=value` overrides.

    Values are YAML, but where the recipe takes text, what has no quotes is text as it stands.
    Relative paths in them are the caller's: they start from the current folder, wherever the
    recipe's own start. Raises UsageError naming the setting.
    """
    result = copy.deepcopy(dict(data))
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise UsageError(
                f"--set {setting}: expected key.path=value",
                hint="as in --set serve.max_model_len=4096",
            )
        (*parents, last), kind = _place(path.strip())
        quoted = text.strip().startswith(("'", '"'))
        try:
            value = text if kind is str and not quoted else read_setting(text)
        except ValueError as error:
            raise UsageError(
                f"--set {path.strip()}: not valid YAML: {error}",
                hint="quote the whole setting in the shell, as in --set 'targets=[vllm]'",
            ) from None
        value = placed(value, Path.cwd(), (*parents, last))
        if parents[:1] == ["outputs"] and isinstance(result.get("outputs"), list):
            result["outputs"] = {"kinds": result["outputs"]}  # a list stands for this section
        place: Any = result
        for parent in parents:
            if isinstance(place, list):
                place = place[_number(place, parent, setting)]
            else:
                place = place.setdefault(parent, {})
            if not isinstance(place, dict | list):
                whole = path.strip().partition(f"{parent}.")[0] + parent
                raise UsageError(
                    f"--set {setting}: {parent} is not a mapping of keys",
                    hint=f"set it as a whole: --set {whole}=… takes any YAML value",
                )
        place[_number(place, last, setting) if isinstance(place, list) else last] = value
    return result


_PATHS = frozenset(
    tuple(path.split("."))
    for path in (
        "base.source", "serve.speculative.draft", "serve.speculative.draft.source",
        "adapters.*.source", "adapters.*.evaluate.data",
        "adapters.*.evaluate.training", "adapters.*.evaluate.corpus", "validate.probes",
        "replay.data",
        "evaluate.data", "evaluate.training", "evaluate.corpus", "calibration.data",
        "quantize.imatrix", "quantize.mix", "image.base",
    )
)  # fmt: skip
"""Keys of a recipe that may name a file or a folder; one of several suites has the same."""
_WORDS = frozenset({"", "auto", "walk", "off"})
"""Values of these keys that name none."""


def placed(value: Any, folder: Path, keys: Sequence[str] = ()) -> Any:
    """Return a recipe or the part of one at `keys`, whose relative paths start from `folder`."""
    if isinstance(value, Mapping):
        return {key: placed(inner, folder, (*keys, str(key))) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [placed(inner, folder, (*keys, "*")) for inner in value]
    where = tuple("*" if key.isdecimal() else key for key in keys)
    if where[-3:-1] == ("evaluate", "*"):
        where = (*where[:-2], where[-1])
    if where not in _PATHS or not isinstance(value, str) or value in _WORDS or is_remote(value):
        return value
    if where == ("image", "base"):  # else a reference to a registry
        prefix = "oci:" if value.startswith("oci:") else ""
        rest = value.removeprefix(prefix)
        is_folder = bool(prefix) or rest.startswith((".", "/", "~"))
        return prefix + _from(folder, rest) if is_folder and rest.strip() else value
    return _from(folder, value)


def _from(folder: Path, text: str) -> str:
    return str(folder.absolute() / Path(text).expanduser())


def _place(path: str) -> tuple[list[str], object]:
    """Return the keys of a setting's path, and what the recipe takes there; None if unknown.

    Below a mapping of text, such as `image.labels`, the rest of the path is one key: names of
    labels have dots.
    """
    keys: list[str] = []
    kind: Any = Recipe
    steps = path.split(".")
    while steps:
        if get_origin(kind) is dict and get_args(kind)[1] is str:
            steps = [".".join(steps)]
        step = steps.pop(0)
        keys.append(step)
        if get_origin(kind) is dict or (get_origin(kind) is tuple and step.isdecimal()):
            kind = get_args(kind)[get_origin(kind) is dict]  # what it holds
        else:
            # A section of which there may be several may also stand alone.
            section = next(filter(is_section, [kind, *get_args(kind)]), None)
            fields = fields_of(section).items() if section else ()
            kind = next((f.annotation for name, f in fields if (f.alias or name) == step), None)
    return keys, kind


def _number(items: Sequence[object], word: str, setting: str) -> int:
    if word.isdecimal() and int(word) < len(items):
        return int(word)
    raise UsageError(
        f"--set {setting}: the list has no element {word}",
        hint=f"it has {len(items)}, counted from 0",
    )


def _fault(error: ErrorDetails) -> str:
    place, kind = ".".join(str(part) for part in error["loc"]), error["type"]
    if kind in {"extra_forbidden", "unexpected_keyword_argument"}:
        near = difflib.get_close_matches(str(error["loc"][-1]), _keys_at(error["loc"][:-1]), 1, 0.5)
        return f"unknown key `{place}`" + (f", did you mean `{near[0]}`?" if near else "")
    if kind == "missing":
        return f"`{place}` is missing"
    if kind == "literal_error" and isinstance(given := error.get("input"), str):
        choices = [*map(str.lower, _QUOTED.findall(str(error["ctx"]["expected"])))]
        if near := difflib.get_close_matches(given.lower(), choices, 1, 0.5):
            return f"`{place}`: unknown {given[:60]!r}, did you mean `{near[0]}`?"
    if kind == "string_type" and (scalar := _SCALARS.get(type(error.get("input")))):
        return f"`{place}`: YAML reads {error['input']} as {scalar}; write it in quotes"
    if kind == "value_error":
        return (f"`{place}`: " if place else "") + str(error["ctx"]["error"])
    if kind == "string_pattern_mismatch" and (example := _example_at(error["loc"])):
        given = str(error["input"])[:60]
        return f"`{place}`: {given!r} is not in the expected form, such as {example}"
    if kind == "dict_type":
        return f"`{place}`: expected names with a value each, such as {{first: …, second: …}}"
    if kind == "tuple_type":
        return f"`{place}`: expected a list, such as [first, second]"
    if kind in {"model_type", "dataclass_type"}:
        keys = ", ".join(_keys_at(error["loc"])[:3])
        return f"`{place}`: expected keys below it, such as {keys}; without any, leave it out"
    return f"`{place}`: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys_at(location: Sequence[str | int]) -> list[str]:
    return [field.alias or name for name, field in fields_of(_section_at(location)).items()]


def _example_at(location: Sequence[str | int]) -> str:
    """Return the example that a key's description has; "" if it has none."""
    fields = fields_of(_section_at(location[:-1]))
    about = next((field.description for name, field in fields.items() if name == location[-1]), "")
    found = re.search(r"such as (`[^`]+`)", about or "")
    return found[1] if found else ""


def _section_at(location: Sequence[str | int]) -> Any:
    """Return the section of the recipe at a place."""
    part: Any = Recipe
    steps = iter(location)
    for step in steps:
        if isinstance(step, int):
            continue
        field = next(f for name, f in fields_of(part).items() if (f.alias or name) == step)
        annotation = field.annotation
        if get_origin(annotation) is dict:
            next(steps, None)  # the user's own key
        choices = [annotation, *get_args(annotation)]
        part = next(filter(is_section, choices))
    return part
