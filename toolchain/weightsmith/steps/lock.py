"""recipe.lock: pins a recipe's sources and bases, so that later builds use the same ones.

Its digests are those of content that a build has read. The file is next to the recipe and has its
name, so that both are versioned and reviewed together. A build without a recipe file has no lock.

A file beside the recipe, since two people would pin differently in caches of their own without
noticing. Other content under the same pin is refused: a commit or a wheel never changes, so the
hub, mirror or index has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.files import folder_lock, write_whole
from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import parse_file
from weightsmith.core.values import Digest, Snapshot, Sources, plain
from weightsmith.oci.image import Image
from weightsmith.oci.layout import is_layout
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import Source
from weightsmith.recipe.sources import has_own_pin, pin_fields

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """Pins of sources and base images, by their names in the recipe."""

    path: Path | None
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Source -> `pin` (with revision or hash) and `digest` of its files."""
    bases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Image reference -> platform -> digest."""
    lasting: bool = True
    """Whether its file outlives the command."""

    def with_base(self, reference: str, image: Image) -> Lock:
        """Return the lock with a base added."""
        if reference.startswith("engine:") or is_layout(reference) or "@" in reference:
            return self
        row = {**self.bases.get(reference, {}), image.platform: image.digest}
        return replace(self, bases={**self.bases, reference: row})


def read_lock(file: RecipeFile) -> Lock:
    """Return a recipe's lock, empty if it has none; raise UsageError for an invalid one."""
    path = file.path.with_suffix(".lock") if file.path else None
    found = _read(path) if path is not None and path.is_file() else Lock(path=path)
    return found if file.lasting else replace(found, lasting=False)


def _read(path: Path) -> Lock:
    try:
        data = parse_file(path)
        bases = {
            str(name): {str(key): str(Digest(digest)) for key, digest in row.items()}
            for name, row in data["bases"].items()
        }
        sources = {
            str(name): {"pin": str(row["pin"]), "digest": str(Digest(row["digest"]))}
            for name, row in data["sources"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, str(error)) from None
    return Lock(path=path, sources=sources, bases=bases)


def _unreadable(path: Path | None, why: str) -> UsageError:
    return UsageError(f"{path} cannot be read: {why}", hint="restore it, or delete it to pin again")


def pinned(file: RecipeFile, lock: Lock) -> RecipeFile:
    """Return the recipe, with the lock's pins for sources that it does not pin itself.

    Raises UsageError for a pin that a recipe could not have.
    """
    recipe = file.recipe
    try:
        adapters = tuple(adapter.changed(**_pin(adapter, lock)) for adapter in recipe.adapters)
        base = recipe.base.changed(**_pin(recipe.base, lock))
        parts: dict[str, object] = {"base": base, "adapters": adapters}
        serve = recipe.serve
        if serve.speculative and (draft := recipe.draft):
            speculative = serve.speculative.changed(draft=draft.changed(**_pin(draft, lock)))
            parts["serve"] = serve.changed(speculative=speculative)
    except ValidationError as error:
        (fault, *_) = error.errors(include_url=False)
        raise _unreadable(lock.path, f"the pin {fault['input']!r}: {fault['msg']}") from None
    return replace(file, recipe=recipe.changed(**parts))


def with_sources(
    lock: Lock,
    file: RecipeFile,
    sources: Sources,
    *,
    progress: Progress,
    locked: bool = False,
    update: bool = False,
) -> Lock:
    """Return the lock with the current sources.

    Reports folders that changed, and pins that the recipe changed. Raises InputRefused for
    different content under the same pin, and for a different pin if the recipe has none, unless
    `update` accepts them; with `locked`, for every difference.
    """
    parts = file.recipe.sources
    snapshots = [sources.base, *(adapter.snapshot for adapter in sources.adapters)]
    snapshots += [sources.draft] if sources.draft else []
    found = {p.source: _row(s, lock) for p, s in zip(parts, snapshots, strict=True)}
    changed = [name for name, row in found.items() if lock.sources.get(name, row) != row]
    missing = [name for name in found if name not in lock.sources]
    open_ = {part.source for part in parts if not _has_own_pin(part)}
    forced = [n for n in changed if n in open_ or lock.sources[n]["pin"] == found[n]["pin"]]
    recipe = f"--recipe {file.path} " if file.path else ""
    if locked and (changed or missing):
        names = ", ".join((*changed, *missing))
        command = f"build {recipe}{'--update-lock' if forced else ''}".strip()
        raise InputRefused(
            f"sources differ from {lock.path or 'recipe.lock'}: {names}",
            hint=f"to accept them, run `{command}` without --locked or --from and "
            "commit the new lock",
        )
    for name in changed:
        was, now = lock.sources[name], found[name]
        if update:
            progress.warn(f"{name}: {_shown(was)} replaced by --update-lock, now {_shown(now)}")
        elif name in forced:
            raise InputRefused(
                f"{name} is {_shown(now)}, but {lock.path} has {_shown(was)}",
                hint="ask the operator of the hub, index or mirror why it changed; to accept it, "
                f"run `build {recipe}--update-lock` (also needed after an update of weightsmith "
                "that reads different files of a source)",
            )
        else:
            progress.note(f"{name} changed since {lock.path} was written: now {now['pin']}")
    return replace(lock, sources=found)


def write_lock(before: Lock, after: Lock, progress: Progress) -> None:
    """Write the changes to the lock; if the folder is not writable, only warn.

    Keeps pins that another build of the recipe added in the meantime.
    """
    path = after.path
    if path is None or before == after:
        return
    try:
        with ExitStack() as stack:
            with suppress(OSError):  # a file system without locks
                stack.enter_context(
                    folder_lock(
                        path.parent,
                        tell=lambda who: progress.note(
                            f"{who} uses {path.parent}: waiting for it to write {path.name}"
                        ),
                    )
                )
            now = _read(path) if path.is_file() else before
            bases = {
                name: _changed(before.bases.get(name, {}), row, now.bases.get(name, {}))
                for name, row in after.bases.items()
            }
            data = {
                "bases": _changed(before.bases, bases, now.bases),
                "sources": _changed(before.sources, after.sources, now.sources),
            }
            text = json.dumps(plain(data), indent=2, sort_keys=True) + "\n"
            write_whole(path, text.encode(), lasting=after.lasting)
    except OSError as error:
        progress.warn(f"cannot write {path}: {error.strerror}")


def _changed(before: Mapping[str, T], after: Mapping[str, T], now: Mapping[str, T]) -> dict[str, T]:
    """Apply the changes between two mappings to a third."""
    kept = {key: row for key, row in now.items() if key in after or key not in before}
    return kept | {key: row for key, row in after.items() if before.get(key) != row}


def _pin(source: Source, lock: Lock) -> dict[str, str]:
    if _has_own_pin(source):
        return {}
    pin = lock.sources.get(source.source, {}).get("pin", "")
    return dict(pin_fields(source.source, pin))


def _has_own_pin(source: Source) -> bool:
    return has_own_pin(source.source, source.revision, source.sha256)


def _row(snapshot: Snapshot, lock: Lock) -> Mapping[str, str]:
    """Return a source's entry; the lock's entry, if it means the same content."""
    # A converted source is identified by its original: a new converter does not change it.
    digests = [str(digest) for digest in (*snapshot.made_from, snapshot.digest)]
    for row in lock.sources.values():
        if row["pin"] == snapshot.pin and row["digest"] in digests:
            return row
    return {"pin": snapshot.pin, "digest": digests[0]}


def _shown(row: Mapping[str, str]) -> str:
    return row["pin"] if row["pin"] == row["digest"] else f"{row['pin']} ({row['digest'][7:19]})"
