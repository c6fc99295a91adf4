"""A fleet file -> builds: a whole recipe for each adapter, and a cell for each of its targets.

What comes out for each adapter is a recipe that `build` would take, with the adapter's name in its
own and in the repository, so a cell has the digest of the same build alone. One repository with the
adapter in the tag would be mixed up by clean-up rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightsmith.building.ignored import check_quantize, check_read
from weightsmith.building.targets import AUTO, chosen_targets, target_of
from weightsmith.core.errors import UsageError
from weightsmith.core.values import Json, JsonValue
from weightsmith.fleets.file import SECTIONS, Fleet, FleetAdapter
from weightsmith.oci.references import Reference
from weightsmith.provenance.labels import reference
from weightsmith.recipe.file import RecipeFile, check_recipe, placed, with_settings
from weightsmith.recipe.sources import is_remote, without_pin
from weightsmith.recipe.user_text import read_mapping
from weightsmith.serving.targets import Target
from weightsmith.stages.upload import SCHEME, repository_of
from weightsmith.steps.lock import Lock, pinned, read_lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One adapter with one target: one build, one image, one row of the fleet's table."""

    adapter: str
    target: str

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.adapter} x {self.target}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBuild:
    """One adapter's builds: a whole recipe, whose paths do not depend on the current folder."""

    adapter: str
    data: Mapping[str, JsonValue]
    """The recipe as its file would have it."""
    file: RecipeFile
    """The same, checked, with the pins of the fleet's lock."""
    targets: tuple[Target, ...]


def lock_of(fleet: Fleet, path: Path) -> Lock:
    """Return the pins of a fleet: those of the recipe's lock, and on top those of the fleet's.

    Its path is that of the fleet's lock. Raises UsageError for one that cannot be read.
    """

    def lock_beside(file: Path) -> Lock:  # which needs nothing of a recipe but its file's name
        empty = check_recipe({"name": "x", "base": {"source": "x"}}, str(file))
        return read_lock(RecipeFile(recipe=empty, folder=file.parent, path=file))

    shared, own = lock_beside(_recipe_of(fleet, path)), lock_beside(path)
    return Lock(
        path=own.path,
        sources={**shared.sources, **own.sources},
        bases={**shared.bases, **own.bases},
    )


def _recipe_of(fleet: Fleet, path: Path) -> Path:
    """Return the shared recipe's file; a folder stands for its recipe.yaml, as elsewhere."""
    place = path.parent / fleet.recipe
    return place / "recipe.yaml" if place.is_dir() else place


def builds_of(
    fleet: Fleet, path: Path, lock: Lock, settings: Sequence[str] = ()
) -> tuple[AdapterBuild, ...]:
    """Return every adapter's builds; `settings` are the command line's, for the shared recipe.

    Paths start from the fleet file's folder, and those inside the recipe from the recipe's. Raises
    UsageError, with the place in the file, for a glob without folders, a fault in what an entry
    changes, a setting that no target reads, two builds of one name, and two images of one name.
    """
    recipe_path = _recipe_of(fleet, path)
    shared = with_settings(
        read_mapping(
            recipe_path,
            kind="recipe",
            missing=f"correct `recipe` in {path}",
            begins="`name: …` and `base: {source: …}`",
        ),
        settings,
    )
    shared = {**placed(shared, recipe_path.parent.absolute()), "adapters": []}
    found: dict[str, str] = {}
    builds = []
    for place, entry in _entries(fleet, path):
        source = without_pin(entry.source)
        last = source.rstrip("/").rpartition("/")[2].lower()
        last = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:60].strip("-") or "adapter"
        name = entry.name or last
        if name in found:
            raise UsageError(
                f"{path}: {place} and {found[name]} are both named `{name}`",
                hint="give one of them another `name`, or leave it out of the glob",
            )
        found[name] = place
        builds.append(_build(name, entry, place, shared, fleet, path, lock))
    _require_images_apart(builds, path)
    alone = _targets_of(shared)  # the recipe may also be built without the fleet
    with _placed(str(recipe_path)):
        every = [target_of(one) for one in alone if one != AUTO]
    every += [target for build in builds for target in build.targets]
    for build in builds:
        with _placed(f"{path}: {build.adapter}"):
            check_read(build.file.recipe, every, auto=AUTO in alone)
    return tuple(builds)


def _entries(fleet: Fleet, path: Path) -> Iterator[tuple[str, FleetAdapter]]:
    """Yield each adapter with its place in the file; a glob yields its folders by name."""
    for number, given in enumerate(fleet.adapters):
        place = f"adapters.{number}"
        if isinstance(given, FleetAdapter):
            yield place, given
            continue
        if is_remote(given):
            yield place, FleetAdapter(source=given)
            continue
        pattern = Path(given).expanduser()
        root = Path(pattern.anchor) if pattern.is_absolute() else path.parent.absolute()
        inner = str(pattern.relative_to(pattern.anchor))
        try:
            folders = sorted(one for one in root.glob(inner) if one.is_dir())
        except (ValueError, NotImplementedError, IndexError) as error:
            raise UsageError(
                f"{path}: {place}: `{given}` is no glob: {error}", hint="for example ./adapters/*"
            ) from None
        if not folders:
            raise UsageError(
                f"{path}: {place}: no folder matches `{given}` in {root.absolute()}",
                hint="globs start from the fleet file's folder; correct it or remove it",
            )
        for folder in folders:
            yield f"{place} ({folder.name})", FleetAdapter(source=_text(str(folder)))


def _build(
    name: str,
    entry: FleetAdapter,
    place: str,
    shared: Mapping[str, JsonValue],
    fleet: Fleet,
    path: Path,
    lock: Lock,
) -> AdapterBuild:
    where, folder = f"{path}: {place}", path.parent.absolute()
    data = {**shared, "name": f"{shared.get('name', '')}-{name}"}
    image = shared.get("image") or {}
    if repository := isinstance(image, Mapping) and image.get("repository"):
        data["image"] = {**image, "repository": f"{repository}-{name}"}
    outputs = shared.get("outputs") or {}
    if hub := isinstance(outputs, Mapping) and outputs.get("hub"):
        data["outputs"] = {**outputs, "hub": f"{hub}-{name}"}
    given = entry.model_dump(by_alias=True, exclude_unset=True)
    own = placed({key: given[key] for key in SECTIONS if key in given}, folder)
    if "evaluate" in own:
        own["evaluate"] = _suites_over(data.get("evaluate"), own["evaluate"])
    data = {**data, **{key: _over(data.get(key), value) for key, value in own.items()}}
    one = {key: given[key] for key in given if key not in (*SECTIONS, "name", "targets")}
    source = str(entry.source)
    if not is_remote(source):  # of a folder, its absolute path: the last part is its own name
        source = _text(str(folder / Path(source).expanduser()))
    data["adapters"] = [{**one, "source": source}]
    data.pop("targets", None)
    file = pinned(RecipeFile(recipe=check_recipe(data, where), folder=folder), lock)
    Reference.parse(reference(file.recipe, "x"))
    wanted = entry.targets or fleet.targets or _targets_of(shared)
    with _placed(where):
        chosen = chosen_targets(file, wanted, to_build=True)
        if quantize := own.get("quantize"):
            check_quantize(file.recipe, chosen, quantize)
    if len(chosen) != len(wanted):
        raise UsageError(
            f"{where}: {', '.join(wanted)} name one target twice", hint="remove one of them"
        )
    return AdapterBuild(adapter=name, data=data, file=file, targets=chosen)


def _targets_of(shared: Mapping[str, JsonValue]) -> tuple[str, ...]:
    """Return the targets of the shared recipe."""
    targets = shared.get("targets")
    return tuple(map(str, targets)) if isinstance(targets, list | tuple) else ()


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Let errors of the block begin with their place in a file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None


def _over(below: JsonValue, above: JsonValue) -> JsonValue:
    """Return a section with what differs on top, key by key."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}


def _suites_over(below: Json, above: Json) -> JsonValue:
    """Return suites with what differs on top, by name; one alone goes over one alone."""
    shared = list(below) if isinstance(below, list) else [below] if below else []
    given = list(above) if isinstance(above, list) else []
    if len(shared) == len(given) == 1 and "name" not in given[0]:
        return _over(shared[0], given[0])
    found = {one.get("name") or f"suite {n}": one for n, one in enumerate(shared)}
    for number, one in enumerate(given):
        name = one.get("name") or f"own suite {number}"
        found[name] = _over(found.get(name), one)
    return list(found.values())


def _text(path: str) -> str:
    """Return a path; raises UsageError if it is not UTF-8, which requests and pages are."""
    if any("\ud800" <= character <= "\udfff" for character in path):
        raise UsageError(f"the path {path!r} is not UTF-8", hint="rename the folder")
    return path


def _require_images_apart(builds: Sequence[AdapterBuild], path: Path) -> None:
    """Raise UsageError if two builds would give one name to two images, or to two hub models."""
    seen: dict[str, str] = {}
    for build in builds:
        recipe = build.file.recipe
        for target in build.targets:
            name, hub = reference(recipe, target.name), ""
            if recipe.outputs.hub:
                hub = SCHEME + repository_of(recipe.outputs.hub.replace("{target}", target.name))
            if name in seen:
                raise UsageError(
                    f"{path}: {seen[name]} and {build.adapter} would both be the image {name}",
                    hint="give one of them another `image.repository`",
                )
            if hub in seen:
                raise UsageError(
                    f"{path}: {seen[hub]} and {build.adapter} x {target.name} would both be {hub}",
                    hint="write `{target}` into `outputs.hub` of the recipe, or rename an adapter",
                )
            seen[name] = build.adapter
            if hub:
                seen[hub] = f"{build.adapter} x {target.name}"
