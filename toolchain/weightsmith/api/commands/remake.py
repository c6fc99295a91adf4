"""After a recall: writes the fleet file that makes affected images again, or rebases them.

A fleet's build has one adapter, and its recipe is shared; so images are grouped by base and
version, and a group that needs a fleet file of its own gets one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.recipes import recipe_of_image
from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.results import Affected, Remade
from weightsmith.core.errors import UsageError, WeightsmithError
from weightsmith.core.files import write_whole
from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import parse_file, parse_yaml
from weightsmith.core.values import Digest, Json, JsonValue, canonical, key_of
from weightsmith.fleets.file import SECTIONS
from weightsmith.oci.layout import is_layout
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.provenance.recall import AffectedImage
from weightsmith.provenance.signing import Check
from weightsmith.steps.tools import Tools

_SHARED = ("version", "base", "replay")
"""Keys of a recipe that an adapter's entry in a fleet file cannot have."""
_OF_ADAPTERS = ("version", "run_id", "weight")
_WITH_FILES = ("data", "corpus")
"""Keys of a suite that name files beside its recipe."""


def chosen(found: Affected) -> list[AffectedImage]:
    """Return the images to make again: each once, and not other forms of them.

    Of an index, which is made as a whole, not its images.
    """
    indexes = [row for row in found.images if row.form == "index"]
    below = {digest for row in indexes for digest in row.members}
    images = [row for row in found.images if row.form == "image" and row.digest not in below]
    return [*indexes, *images]


def rebase_all(found: Affected, onto: str, tools: Tools, *, force: bool) -> Affected:
    """Move each image to another engine base; it gets the old tag and `-on-` the base's.

    One that is refused is named in the answer with the reason, and stops no other.
    """
    suffix, made = suffix_of(onto), list[Remade]()
    _tell_if_none(found, tools.progress)
    for row in chosen(found):
        if is_layout(row.reference) or not row.tags:
            why = "it has no tag" if not row.tags else "it is in a layout: push it first"
            made.append(Remade(source=row.reference, error=why))
            continue
        to = f"{row.reference}{suffix}"
        name = f"{row.reference.rpartition(':')[0]}@{row.digest}"
        request = RebaseCommand(source=name, onto=onto, to=to, smoke=False, force=force)
        try:
            done, _ = rebase_image(request, tools)
            made.append(Remade(source=row.reference, reference=to, digest=done.digest))
        except WeightsmithError as error:
            made.append(Remade(source=row.reference, error=error.message))
    return replace(found, remade=tuple(made))


def _tell_if_none(found: Affected, progress: Progress) -> None:
    """Warn if no image is to be made again: no file is written then, and no image moved."""
    if not found.images:
        more = f"; {len(found.unsigned)} only say so, unsigned" if found.unsigned else ""
        progress.warn(f"no image was found that could be made again{more}")


def suffix_of(onto: str) -> str:
    """Return what is added to a tag: `-on-` and the tag, digest or name of the new base."""
    bare, at, digest = onto.partition("@sha256:")
    last = re.split(r"[/:]", bare.rstrip("/"))[-1]
    return "-on-" + (digest[:12] if at else re.sub(r"[^A-Za-z0-9_.-]+", "-", last))


def write_fleets(
    found: Affected,
    out: Path,
    onto: str,
    check: Check | None,
    registry: Registry,
    progress: Progress,
) -> Affected:
    """Write the fleet file that makes the images again, on another base with `onto`.

    What it needs is beside it: recipes, adapters and questions, from what each image states. A
    further group of images has a file of its own, `NAME-2.yaml`. An image that cannot be in a fleet
    is named in the answer with the reason. Raises UsageError if `out` exists.
    """
    if out.exists():
        raise UsageError(f"--out {out}: it exists", hint="name a new file")
    _tell_if_none(found, progress)
    if not found.images:
        return found
    out.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[Digest, list[tuple[AffectedImage, Mapping[str, Json], Path]]] = {}
    made = list[Remade]()
    for row in chosen(found):
        try:
            recipe, folder = _recipe(row, out.parent, check, registry, progress)
        except WeightsmithError as error:
            made.append(Remade(source=row.reference, error=error.message))
            continue
        if (count := len(recipe["adapters"])) != 1:
            why = f"it has {count} adapters, and a fleet's build one: use `build --from`"
            made.append(Remade(source=row.reference, error=why))
            continue
        shared = key_of([recipe.get(key) for key in _SHARED])
        groups.setdefault(shared, []).append((row, recipe, folder))
    for number, group in enumerate(groups.values(), start=1):
        path = out if number == 1 else out.with_stem(f"{out.stem}-{number}")
        _write_fleet(group, path, onto)
        made += [Remade(source=row.reference, reference=str(path)) for row, _, _ in group]
    return replace(found, remade=tuple(made))


def _recipe(
    row: AffectedImage, folder: Path, check: Check | None, registry: Registry, progress: Progress
) -> tuple[Mapping[str, Json], Path]:
    """Return an image's recipe as the image states it, and its folder with adapters and data."""
    place = row.reference
    if not is_layout(place):
        place = f"{Reference.parse(place).name}@{row.digest}"
    texts = folder / "calibration.jsonl"
    named = (f"calibration.data={texts}",)
    try:
        path = recipe_of_image(place, "", check, folder, registry, progress, named)
    except UsageError as error:
        if "was a folder" not in error.message:
            raise
        # Its content is pinned; where it is now, only the user knows.
        base = str(folder / "base")
        path = recipe_of_image(place, base, check, folder, registry, progress, named)
        progress.warn(f"{row.reference}: {error.message}: put it into {base}")
    recipe = parse_yaml(path.read_text("utf-8"))
    if "calibration" in recipe:
        progress.warn(f"{row.reference}: its calibration texts are not attached: write {texts}")
    return recipe, path.parent


def _write_fleet(
    group: Sequence[tuple[AffectedImage, Mapping[str, Json], Path]], path: Path, onto: str
) -> None:
    first = group[0][1]
    shared = path.with_name(f"{path.stem}-recipe.yaml")
    rows, names = list[Mapping[str, JsonValue]](), dict[str, int]()
    for row, recipe, folder in group:
        (adapter,) = recipe["adapters"]
        beside = f"./{folder.relative_to(path.parent)}"
        name = re.sub(r"[^a-z0-9]+", "-", str(recipe["name"]).lower()).strip("-")[:50]
        names[name] = names.get(name, 0) + 1
        own = {key: recipe[key] for key in SECTIONS if key in recipe and key != "evaluate"}
        own["serve"] = {"served_model_name": recipe["name"], **own.get("serve", {})}
        if suites := recipe.get("evaluate"):
            own["evaluate"] = _placed(suites, beside)
        repository = Reference.parse(row.reference).name if not is_layout(row.reference) else ""
        image = {**({"repository": repository} if repository else {}),
                 **({"base": onto} if onto else {})}  # fmt: skip
        rows.append(
            {
                "name": name if names[name] == 1 else f"{name}-{names[name]}",
                "source": f"{beside}/adapters/0",
                **{key: adapter[key] for key in _OF_ADAPTERS if key in adapter},
                "targets": recipe.get("targets", []),
                **own,
                **({"image": image} if image else {}),
            }
        )
    same = {"name": "again", **{key: first[key] for key in _SHARED if key in first}}
    text = yaml.safe_dump(same, sort_keys=False)
    write_whole(shared, text.encode())
    sources = parse_file(group[0][2] / "recipe.lock")["sources"]
    base = {name: pin for name, pin in sources.items() if name == first["base"]["source"]}
    lock = canonical({"bases": {}, "sources": base})
    write_whole(shared.with_suffix(".lock"), lock + b"\n")
    fleet = {"recipe": shared.name, "adapters": rows}
    write_whole(path, yaml.safe_dump(fleet, sort_keys=False, allow_unicode=True).encode())


def _placed(suites: Json, folder: str) -> list[Mapping[str, Json]]:
    """Return suites whose files are named from the fleet file's folder."""
    rows = suites if isinstance(suites, list) else [suites]
    return [
        {key: f"{folder}/{value}" if key in _WITH_FILES else value for key, value in row.items()}
        for row in rows
    ]
