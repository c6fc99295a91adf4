"""`fleet`: many builds, as a function."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TypeAlias

from weightsmith.api.commands.arguments import AnyPath, Texts, path_of, request_of, texts_of
from weightsmith.api.commands.requests import FleetCommand
from weightsmith.building import wiring
from weightsmith.building.progress import shown
from weightsmith.cache.address import of_nodes
from weightsmith.core.ports import Progress, SignatureFormat, Silent
from weightsmith.core.values import Json, JsonValue
from weightsmith.fleets.graph import plan_of
from weightsmith.fleets.ordering import Ordered, foreseen, ordered
from weightsmith.fleets.ordering import run_fleet as run_all
from weightsmith.fleets.page import watcher
from weightsmith.fleets.rows import CellRow, Changed, FleetRows, SharedRow
from weightsmith.recipe.user_config import RunOptions, read_config

FleetCell: TypeAlias = CellRow
"""One adapter with one target, and what became of its build."""
SharedTask: TypeAlias = SharedRow
"""One task that several cells of a fleet needed."""
FleetResult: TypeAlias = FleetRows
"""A fleet: its cells, its shared tasks, and what they cost."""


def fleet(
    file: AnyPath | Mapping[str, JsonValue],
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
    signature_format: SignatureFormat = "cosign",
    keyless: bool = False,
    trust_config: AnyPath = "",
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
    request = request_of(
        FleetCommand,
        file=file if isinstance(file, Mapping) else path_of(file),
        on=on,
        address=address,
        adapters=texts_of(adapters),
        targets=texts_of(targets),
        cpus=cpus,
        push=push,
        load=load,
        layout=path_of(layout) if layout else None,
        settings=texts_of(set),
        force=force,
        update_lock=update_lock,
        dist=path_of(dist),
        run=RunOptions(
            runner,
            allow_network_in_jobs,
            memory,
            insecure,
            sign_key,
            signature_format,
            cache,
            cache_from,
            keyless,
            str(trust_config),
        ),
    )
    with shown(progress) as told:
        watching = watcher(live=False, silent=not progress)
        return run_fleet(request, ordered_of(request), told, watching)


def ordered_of(asked: FleetCommand) -> Ordered:
    """Return the checked fleet, or the part of it that is named; raises UsageError."""
    return ordered(
        asked.file,
        settings=asked.settings,
        adapters=asked.adapters,
        targets=asked.targets,
        update_lock=asked.update_lock,
    )


def plan_fleet(asked: FleetCommand, found: Ordered) -> Mapping[str, Json]:
    """Return what `fleet` would do, as `--plan --json` prints it."""
    with wiring.open_for(asked, Silent(), *found.sources, uploads=False) as tools:
        return plan_of(foreseen(found, asked.dist.absolute(), tools))


def run_fleet(
    asked: FleetCommand,
    found: Ordered,
    progress: Progress,
    watching: AbstractContextManager[Changed],
) -> FleetResult:
    """Run a fleet; return what became of its cells."""
    dist, layout = asked.dist.absolute(), asked.layout and str(asked.layout.absolute())
    outputs: dict[str, JsonValue] = {
        "push": asked.push, "load": asked.load, "layout": layout or "", "force": asked.force,
    }  # fmt: skip
    with wiring.open_for(asked, progress, *found.sources) as tools:
        engine = wiring.make_fleet_engine(asked.on, asked.address, dist)
        nodes = of_nodes(asked.on, asked.run, read_config().cache)
        graph = foreseen(found, dist, tools)
        with watching as changed:
            return run_all(
                found, graph, engine, tools,
                dist=dist, outputs=outputs, options=nodes, cpus=asked.cpus, changed=changed,
            )  # fmt: skip
