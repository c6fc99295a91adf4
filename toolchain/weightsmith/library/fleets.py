"""`fleet`: many builds, as a function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from weightsmith.building import wiring
from weightsmith.building.progress import shown
from weightsmith.cache.address import of_nodes
from weightsmith.fleets.ordering import foreseen, ordered, run_fleet
from weightsmith.fleets.rows import CellRow, FleetRows, SharedRow
from weightsmith.fleets.terminal import watcher
from weightsmith.library.arguments import AnyPath, Texts, path_of, texts_of
from weightsmith.recipe.run_options import RunOptions
from weightsmith.recipe.user_config import read_config

FleetCell: TypeAlias = CellRow
"""One adapter with one target, and what became of its build."""
SharedTask: TypeAlias = SharedRow
"""One task that several cells of a fleet needed."""
FleetResult: TypeAlias = FleetRows
"""A fleet: its cells, its shared tasks, and what they cost."""


def fleet(
    file: AnyPath | Mapping[str, Any],
    *,
    on: str = "local",
    address: str = "",
    adapters: Texts = (),
    targets: Texts = (),
    set: Texts = (),  # noqa: A002 - the flag's name
    cpus: int = 0,
    push: bool = False,
    load: bool = False,
    layout: AnyPath | None = None,
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    update_lock: bool = False,
    dist: AnyPath = "dist",
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    memory: str = "",
    cache: str = "",
    cache_from: str = "",
    progress: bool = True,
) -> FleetResult:
    """Build every adapter of a fleet for every target; return what became of each.

    `file` is a fleet file, or a mapping with its keys, whose paths start from the current folder.
    `adapters` and `targets` choose some of its cells by name; `on` is `local`, `ray` or `slurm`.
    A refused cell raises nothing: its `verdict` is `refused`, or `not made` if its machine failed,
    and `error` says why.

    Raises UsageError for a fault in the fleet, EnvironmentFailure if the engine does not answer or
    a node has another version. What was finished is kept, and the next call goes on from there.

    >>> result = weightsmith.fleet(
    ...     {"recipe": "examples/tiny/recipe.yaml", "adapters": ["examples/tiny/adapters/a"]},
    ...     progress=False,
    ... )
    >>> [(cell.adapter, cell.target, cell.error) for cell in result.cells]
    [('a', 'llamacpp-q4_k_m', None)]
    """
    run = RunOptions(
        runner=runner,
        allow_network_in_jobs=allow_network_in_jobs,
        memory=memory,
        insecure=insecure,
        sign_key=sign_key,
        cache=cache,
        cache_from=cache_from,
    )
    found = ordered(
        file if isinstance(file, Mapping) else path_of(file),
        settings=texts_of(set),
        adapters=texts_of(adapters),
        targets=texts_of(targets),
        update_lock=update_lock,
    )
    place = path_of(dist).absolute()
    layouts = str(path_of(layout).absolute()) if layout else ""
    wiring.keep_clean(found.sources, dist=place, layout=layouts, cache=cache)
    engine = wiring.make_fleet_engine(on, address, place)
    nodes = of_nodes(on, run, read_config().cache)
    with (
        shown(progress) as shown_progress,
        wiring.open_tools(run, shown_progress) as tools,
        watcher(live=False, silent=not progress) as changed,
    ):
        return run_fleet(
            found,
            foreseen(found, place, tools),
            engine,
            tools,
            dist=place,
            outputs={"push": push, "load": load, "layout": layouts, "force": force},
            options=nodes,
            cpus=cpus,
            changed=changed,
        )
