"""Recipe -> Sources: every source on disk, with its digest and an immutable pin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.jobs import ImportGgufJob, Input
from weightsmith.core.ports import SourceReader
from weightsmith.core.resources import builder_pins
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import (
    AdapterSnapshot,
    Snapshot,
    Sources,
    StageInputs,
    Writable,
    without_passwords,
)
from weightsmith.models.folder import check_adapter_folder, check_model_folder, ignored_files
from weightsmith.models.model_card import card_denies_chat
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import Adapter, Source
from weightsmith.recipe.sources import SCHEMES, scheme_of
from weightsmith.steps.destinations import InStore
from weightsmith.steps.lock import Lock, read_lock, with_sources, write_lock
from weightsmith.steps.sizes import foreseen
from weightsmith.steps.stage_result import StageResult, Timer
from weightsmith.steps.step import CACHED, Foreseen, Foresight, Results, State, Step
from weightsmith.steps.tools import Tools

_IMPORT_BUILDER = "merge"
_IMPORT_RECIPE = 1


def resolve(file: RecipeFile, tools: Tools) -> Sources:
    """Fetch all sources of a recipe to the local disk and verify them.

    Raises InputRefused for unsafe or incomplete inputs, EnvironmentFailure for network errors.
    """
    for part in file.recipe.sources:
        reader, name, *_ = _reader(part, file.folder, tools)
        reader.check(name)  # all of them before the first, which may take an hour
    base = resolve_base(file.recipe.base, file.folder, tools)
    adapters = [(one, resolve_adapter(one, file.folder, tools)) for one in file.recipe.adapters]
    wanted = file.recipe.draft
    draft = resolve_base(wanted, file.folder, tools) if wanted else None
    return Sources(base=base, adapters=tuple(_named(*pair) for pair in adapters), draft=draft)


def resolve_adapter(adapter: Adapter, folder: Path, tools: Tools) -> Snapshot:
    """Fetch an adapter to the local disk, and verify it.

    Relative paths are those of the `folder`. Raises what `resolve_base` raises.
    """
    snapshot = _fetch(adapter, folder, tools)
    check_adapter_folder(snapshot.tree.root)
    _tell_left(snapshot, tools)
    return snapshot


def resolve_base(base: Source, folder: Path, tools: Tools) -> Snapshot:
    """Fetch a base to the local disk, convert it if it is a GGUF file, and verify it.

    Relative paths are those of the `folder`. Raises InputRefused for an unsafe or incomplete one,
    EnvironmentFailure for network errors.
    """
    snapshot = _fetch(base, folder, tools)
    if _is_gguf(snapshot):
        snapshot = _import_gguf(snapshot, tools)
    check_model_folder(snapshot.tree.root)
    _tell_left(snapshot, tools)
    return snapshot


def known(file: RecipeFile, tools: Tools) -> tuple[Sources | None, str]:
    """Return the sources if they are all here and converted, else None and the reason."""
    wanted, models = [file.recipe.base, file.recipe.draft], list[Snapshot | None]()
    for one in filter(None, wanted):
        found = _known(one, file.folder, tools)
        if found and _is_gguf(found):
            tree = InStore(tools.store).find(partial(import_inputs, found))
            if tree is None:
                why = "is on this machine, but not yet converted to a checkpoint"
                return None, f"{found.source} {why}"
            found = replace(found, tree=tree, made_from=(found.digest,))
        models.append(found)
    adapters = [(_known(a, file.folder, tools), a) for a in file.recipe.adapters]
    missing = [a.source for snapshot, a in adapters if snapshot is None]
    missing += [m.source for m, one in zip(filter(None, wanted), models, strict=True) if not one]
    base, *drafts = models
    if base is None or missing:
        return None, f"not on this machine: {', '.join(missing)}"
    named = tuple(_named(a, s) for s, a in adapters if s)
    return Sources(base=base, adapters=named, draft=next(iter(drafts), None)), ""


def glanced(file: RecipeFile, tools: Tools) -> Sources | None:
    """Return the sources with the headers of those weights that are not here.

    None if one has to be fetched whole, or converted. Raises what `resolve` raises.
    """
    found = []
    for part in file.recipe.sources:
        reader, name, revision, sha256 = _reader(part, file.folder, tools)
        one = reader.known(name, revision, sha256)
        one = one or reader.glance(name, revision, sha256, tools.progress)
        if one is None or _is_gguf(one):
            return None
        found.append(one)
    draft = found.pop() if file.recipe.draft else None
    base, *adapters = found
    check_model_folder(base.tree.root)
    if draft:
        check_model_folder(draft.tree.root)
    for one in adapters:
        check_adapter_folder(one.tree.root)
    pairs = zip(file.recipe.adapters, adapters, strict=True)
    return Sources(base=base, adapters=tuple(_named(part, one) for part, one in pairs), draft=draft)


def _tell_left(snapshot: Snapshot, tools: Tools) -> None:
    if left := ignored_files(snapshot.tree.root):
        tools.progress.note(
            f"{snapshot.source}: ignored files that are not part of a checkpoint: {left}"
        )


def _tell_cards(sources: Sources, tools: Tools) -> None:
    """Warn of a base or an adapter whose model card names another kind of model than its files."""
    base, adapters = sources.base, [one.snapshot for one in sources.adapters]
    head = adapters[0].tree.root if adapters else None
    for one in (base, *adapters):
        if what := card_denies_chat(one.tree.root, base.tree.root, head):
            tools.progress.warn(f"{without_passwords(one.source)}: {what}")


def import_inputs(source: Snapshot) -> StageInputs:
    """Return what the conversion of a GGUF source to a checkpoint depends on."""
    return StageInputs(
        stage="import",
        recipe_number=_IMPORT_RECIPE,
        inputs={"source": source.digest, "builder": builder_pins(_IMPORT_BUILDER)},
    )


def _fetch(source: Source, folder: Path, tools: Tools) -> Snapshot:
    reader, name, revision, sha256 = _reader(source, folder, tools)
    snapshot = reader.fetch(name, revision, sha256, tools.progress)
    if not snapshot.pinned:
        tools.progress.warn(f"{source.source} is not pinned; using {snapshot.pin}")
    return snapshot


def _known(source: Source, folder: Path, tools: Tools) -> Snapshot | None:
    reader, name, revision, sha256 = _reader(source, folder, tools)
    return reader.known(name, revision, sha256)


def _reader(source: Source, folder: Path, tools: Tools) -> tuple[SourceReader, str, str, str]:
    scheme = scheme_of(source.source)
    if not scheme:
        path = Path(source.source).expanduser()
        place = str(path if path.is_absolute() else folder / path)
        return tools.readers[""], place, source.revision, source.sha256
    if scheme not in tools.readers:
        raise UsageError(
            f"{without_passwords(source.source)}: unknown kind of source",
            hint=f"use a folder, or one of: {', '.join(SCHEMES)}",
        )
    return tools.readers[scheme], source.source, source.revision, source.sha256


def _named(adapter: Adapter, snapshot: Snapshot) -> AdapterSnapshot:
    return AdapterSnapshot(
        snapshot=snapshot, weight=adapter.weight, version=adapter.version, run_id=adapter.run_id
    )


def _is_gguf(snapshot: Snapshot) -> bool:
    files = snapshot.tree.files
    return not snapshot.tree.has("config.json") and any(f.path.endswith(".gguf") for f in files)


def _import_gguf(source: Snapshot, tools: Tools) -> Snapshot:
    names = [f.path for f in source.tree.files if f.path.endswith(".gguf")]
    if len(names) > 1:
        raise InputRefused(
            f"{source.source} has {len(names)} GGUF files, expected one",
            hint="give a source with a single model",
        )
    inputs = import_inputs(source)

    def make(folder: Path) -> dict[str, str]:
        tools.store.require_room(8 * source.tree.size, "converting the GGUF source")
        tools.runner.prepare(_IMPORT_BUILDER, tools.progress)
        job = ImportGgufJob(
            builder=_IMPORT_BUILDER,
            gguf=Input.file(source.tree, names[0]),
            output=folder,
            seconds=job_seconds(source.tree.size),
        )
        tools.runner.run(job, tools.progress)
        return {}

    made = InStore(tools.store).files(lambda: inputs, make)
    return replace(source, tree=made.tree, made_from=(source.digest,))


class NotHere(Exception):
    """The sources are not on this machine, or not converted yet."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ResolveStep(Step[Sources, Sources]):
    """Fetches the sources, as the lock pins them, and pins new ones."""

    name = "resolve"
    in_every_plan = True

    file: RecipeFile
    """With the lock's pins."""
    locked: bool = False
    """Refuse sources that differ from the recipe's lock."""
    update_lock: bool = False
    """Pin sources again."""

    @property
    def options(self) -> Writable:
        """Base and adapters, without what they are asked."""
        recipe = self.file.recipe
        adapters = [one.model_dump(mode="json", exclude={"evaluate"}) for one in recipe.adapters]
        draft = [recipe.draft.model_dump(mode="json")] if recipe.draft else []
        return [recipe.base.model_dump(mode="json"), adapters, *draft]

    def foresee(self, seen: Foresight) -> Foreseen[Sources]:
        """Return the sources that are here; raises NotHere, and what the lock refuses."""
        sources, why = known(self.file, seen.tools)
        if sources is not None:
            self._pin(read_lock(self.file), sources, seen.tools)
            sources, note = foreseen(sources)
        else:
            # The digests that the lock has are not known of these; their pins were compared.
            try:
                sources, note = glanced(self.file, seen.tools), f"{why}; its headers were read"
            except EnvironmentFailure as error:
                raise NotHere(f"{why}; {error.message}") from None
            if sources is None:
                raise NotHere(why)
        _tell_cards(sources, seen.tools)
        state = State(cached=False, why=note) if note else CACHED
        return Foreseen(value=sources, rows=(self.row(state, read=sources.base.tree.size),))

    def run(self, _have: Results, tools: Tools) -> StageResult[Sources]:
        """Return the sources; raises what `resolve` raises, and what the lock refuses."""
        timer = Timer(self.name, self.file.recipe.base.source, tools)
        cached = known(self.file, tools)[0] is not None
        sources = resolve(self.file, tools)
        _tell_cards(sources, tools)
        lock = read_lock(self.file)
        write_lock(lock, self._pin(lock, sources, tools), tools.progress)
        return timer.done(sources, cached=cached)

    def _pin(self, lock: Lock, sources: Sources, tools: Tools) -> Lock:
        return with_sources(
            lock,
            self.file,
            sources,
            progress=tools.progress,
            locked=self.locked,
            update=self.update_lock,
        )
