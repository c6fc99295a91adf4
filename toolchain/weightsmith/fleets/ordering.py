"""From a fleet file and the user's choices to the rows of its cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.building.targets import chosen_targets
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.files import marked
from weightsmith.core.ports import FleetEngine
from weightsmith.core.values import JsonValue
from weightsmith.fleets.cells import AdapterBuild, builds_of, lock_of
from weightsmith.fleets.file import Fleet, check_fleet, read_fleet
from weightsmith.fleets.graph import Graph, graph_of
from weightsmith.fleets.page import Page
from weightsmith.fleets.rows import Changed, FleetRows
from weightsmith.fleets.running import FleetRun, Order
from weightsmith.recipe.sources import is_remote
from weightsmith.steps.lock import Lock
from weightsmith.steps.tools import Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordered:
    """A checked fleet: its builds, and the pins that they begin with."""

    title: str
    builds: tuple[AdapterBuild, ...]
    lock: Lock

    @property
    def sources(self) -> list[Path]:
        """Every folder that is read."""
        recipes = [build.file.recipe for build in self.builds]
        names = [one.source for recipe in recipes for one in recipe.sources]
        return [Path(name) for name in names if not is_remote(name)]


def ordered(
    file: str | Path | Mapping[str, JsonValue],
    *,
    settings: Sequence[str] = (),
    adapters: Sequence[str] = (),
    targets: Sequence[str] = (),
    update_lock: bool = False,
) -> Ordered:
    """Return a fleet as its file or mapping describes it, or the part of it that is named.

    Raises UsageError for a fault in it, and for an adapter or target that it does not have.
    """
    path = Path("fleet.yaml") if isinstance(file, Mapping) else Path(file).expanduser()
    path = path / "fleet.yaml" if path.is_dir() else path
    fleet: Fleet = check_fleet(file, "the fleet") if isinstance(file, Mapping) else read_fleet(path)
    lock = lock_of(fleet, path)
    if isinstance(file, Mapping):
        lock = replace(lock, path=None)
    if update_lock:
        lock = Lock(path=lock.path)
    builds = _named(builds_of(fleet, path, lock, settings), adapters, targets)
    return Ordered(title=path.parent.absolute().name, builds=builds, lock=lock)


def _named(
    builds: tuple[AdapterBuild, ...], adapters: Sequence[str], targets: Sequence[str]
) -> tuple[AdapterBuild, ...]:
    """Return the builds of some adapters and targets; all without names."""
    if targets:
        targets = [one.name for one in chosen_targets(builds[0].file, tuple(targets))]
    known = {build.adapter for build in builds}
    there_too = {target.name for build in builds for target in build.targets}
    for flag, given, there in (("--adapter", adapters, known), ("--target", targets, there_too)):
        if missing := [name for name in given if name not in there]:
            raise UsageError(
                f"{flag} {missing[0]}: the fleet has none of that name",
                hint=f"it has {', '.join(sorted(there))}"[:500],
            )
    found = [
        replace(build, targets=tuple(t for t in build.targets if not targets or t.name in targets))
        for build in builds
        if not adapters or build.adapter in adapters
    ]
    if not any(build.targets for build in found):
        raise UsageError(
            f"no cell has one of the adapters {', '.join(adapters)} and one of the targets "
            f"{', '.join(targets)}",
            hint="`fleet --plan` prints every cell",
        )
    return tuple(build for build in found if build.targets)


def foreseen(fleet: Ordered, dist: Path, tools: Tools) -> Graph:
    """Return the graph of a fleet; raises the plan's error if it refuses every cell for one."""
    graph = graph_of(fleet.builds, dist, tools)
    failures = [task.failure for task in graph.cells if task.failure]
    wrong = [one for one in failures if one.exit_code == 2]
    if wrong and len(wrong) == len(graph.cells):
        raise UsageError(wrong[0].message, hint=wrong[0].hint)
    return graph


def run_fleet(
    fleet: Ordered,
    graph: Graph,
    engine: FleetEngine,
    tools: Tools,
    *,
    dist: Path,
    outputs: Mapping[str, JsonValue],
    options: Mapping[str, JsonValue],
    cpus: int,
    changed: Changed,
) -> FleetRows:
    """Run a fleet, and keep its page and its JSON in `dist` as it goes; return its rows."""
    page = Page(dist=dist, title=f"Fleet {fleet.title}")
    chosen = {key: value for key, value in options.items() if value}
    for name in ("sign_key", "trust_config", "trusted_root"):
        if (path := str(options.get(name) or "")) and "://" not in path:
            chosen[name] = str(Path(path).expanduser().absolute())  # nodes run in other folders
    with _token(dist) as token:
        order = Order(
            outputs=outputs, tools=chosen, dist=dist, token=token, lock=fleet.lock, cpus=cpus
        )
        run = FleetRun(graph, order, engine, tools, (page.changed, changed))
        try:
            return run.go()
        except EnvironmentFailure as error:
            error.details = error.details or run.rows().to_json()
            raise
        finally:
            page.write(run.rows(), stopped=True)


@contextmanager
def _token(dist: Path) -> Iterator[str]:
    """Yield the name of a file in the folder of results, by which a node knows that it sees it."""
    with ExitStack() as stack:
        try:
            name = stack.enter_context(marked(dist))
        except OSError as error:
            raise EnvironmentFailure(
                f"cannot write {dist}: {error.strerror}", hint="give another folder with --dist"
            ) from None
        yield name
