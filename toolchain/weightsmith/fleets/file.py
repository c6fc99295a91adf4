"""fleet.yaml: one recipe, many adapters, the targets of each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.recipe.schema import Recipe, one_alone, one_or_list
from weightsmith.recipe.section import Section
from weightsmith.recipe.user_text import read_mapping, require_plain

_NAME = r"^[a-z0-9]+(?:[._-][a-z0-9]+)*$"
_HINT = "docs/reference/fleet.md lists every key of a fleet file"
Part = dict[str, Any]
"""Part of a recipe's section: what differs from the shared recipe. `check_recipe` checks it later,
in the whole recipe."""
Parts = Annotated[list[Part], BeforeValidator(one_alone)]


class FleetAdapter(Section):
    """One adapter of a fleet, and what else differs from the recipe for it."""

    name: str = Field(
        "",
        pattern=rf"{_NAME}|^$",
        max_length=60,
        description="Name of the adapter in the fleet; default: the last part of its source.",
    )
    source: str = Field(min_length=1, description="As an adapter's in a recipe.")
    revision: str = Field("", description="What pins the source, as in a recipe.")
    sha256: str = Field("", description="The same for an `https://` source.")
    version: str = Field("", description="The adapter's version, kept as a label.")
    run_id: str = Field("", description="The training run, kept as a label.")
    weight: float = Field(1.0, description="Factor on the adapter's delta.", allow_inf_nan=False)
    targets: tuple[str, ...] = Field(
        (), description="This adapter's targets; default: the fleet's."
    )
    evaluate: Parts = Field(
        default_factory=list,
        description="What differs in `evaluate`; of several suites, in those of the same `name`. "
        "Others are added.",
        json_schema_extra=one_or_list,
    )
    calibration: Part = Field(default_factory=dict, description="What differs in `calibration`.")
    merge: Part = Field(default_factory=dict, description="What differs in `merge`.")
    # Under another name here: pydantic's models have a `validate` of their own.
    validation: Part = Field(
        default_factory=dict, alias="validate", description="What differs in `validate`."
    )
    quantize: Part = Field(default_factory=dict, description="What differs in `quantize`.")
    quality: Part = Field(default_factory=dict, description="What differs in `quality`.")
    serve: Part = Field(default_factory=dict, description="What differs in `serve`.")
    image: Part = Field(default_factory=dict, description="What differs in `image`.")
    card: Part = Field(default_factory=dict, description="What differs in `card`.")


SECTIONS = tuple(
    field.alias or name
    for name, field in FleetAdapter.model_fields.items()
    if field.annotation in (Part, list[Part])
)
"""Keys of an adapter's entry that are parts of the recipe's sections."""


class Fleet(Section):
    """Many builds: each adapter with each target."""

    recipe: str = Field(
        "recipe.yaml",
        min_length=1,
        description="Recipe file with everything that the builds share. Its own `adapters` are not "
        "used.",
    )
    adapters: tuple[str | FleetAdapter, ...] = Field(
        min_length=1,
        description="One build each: a glob of folders, or an entry with what differs.",
    )
    targets: tuple[str, ...] = Field(
        (), description="Targets of each adapter; default: the recipe's."
    )


def read_fleet(path: Path) -> Fleet:
    """Read and check a fleet file; raises UsageError naming the file, the key and its place."""
    if path.is_dir():
        path = path / "fleet.yaml"
    data = read_mapping(
        path,
        kind="fleet file",
        missing="give one with --file FILE; docs/how-to/build-a-fleet.md has an example",
        begins="`recipe: recipe.yaml` and `adapters: [./adapters/*]`",
    )
    return check_fleet(data, str(path))


def check_fleet(data: Mapping[str, JsonValue], where: str) -> Fleet:
    """Return the fleet that a mapping describes, or raise UsageError listing every fault."""
    require_plain(data, where, _HINT)
    try:
        return TypeAdapter(Fleet).validate_python(dict(data))
    except ValidationError as error:
        rows = error.errors(include_url=False)
    # An adapter is a text or a mapping: only what was meant is worth a word.
    faults = dict.fromkeys(_fault(row, data) for row in rows if not _of_the_other(row, data))
    raise UsageError(f"{where}: {'; '.join(list(faults)[:5])}", hint=_HINT)


def _of_the_other(row: ErrorDetails, data: Mapping[str, JsonValue]) -> bool:
    """Say whether a fault is about the kind of adapter that an element of the list is not."""
    place, adapters = row["loc"], data.get("adapters")
    if place == ("adapters",) and row["type"] == "too_short":
        return bool(adapters)  # its elements have the faults
    if len(place) < 3 or place[0] != "adapters" or not isinstance(adapters, list | tuple):
        return False
    given = adapters[int(place[1])]
    return place[2] != ("FleetAdapter" if isinstance(given, Mapping) else "str")


def _fault(row: ErrorDetails, data: Mapping[str, JsonValue]) -> str:
    place = [str(part) for part in row["loc"] if part not in ("str", "FleetAdapter")]
    shown = ".".join(place)
    if row["type"] == "extra_forbidden":
        section = FleetAdapter if place[0] == "adapters" else Fleet
        known = [field.alias or name for name, field in section.model_fields.items()]
        near = difflib.get_close_matches(place[-1], known, 1, 0.5)
        also = " (it belongs into the recipe)" if place[-1] in Recipe.model_fields else ""
        return f"unknown key `{shown}`" + (f", did you mean `{near[0]}`?" if near else also)
    if row["type"] == "missing":
        return f"`{shown}` is missing"
    if row["type"] == "too_short" and not data.get("adapters"):
        return "`adapters` is empty: name at least one glob or entry"
    if row["type"] == "string_pattern_mismatch":
        return f"`{shown}`: {row['input']!r} must be small letters and digits, joined by . _ or -"
    return f"`{shown}`: {row['msg'][0].lower()}{row['msg'][1:]}"
