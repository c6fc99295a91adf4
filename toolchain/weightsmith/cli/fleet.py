"""`fleet`: many builds of one recipe, here or on an engine that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.cli.command import command
from weightsmith.cli.sections import Flags
from weightsmith.core.values import Json
from weightsmith.recipe.run_options import RunOptions

if TYPE_CHECKING:  # imported when it is called: the list of commands must appear at once
    from weightsmith.fleets.ordering import Ordered


@command(
    many=("adapter", "target", "set"),
    sections={"run": Flags(section=RunOptions)},
    meanings={
        "adapter": "name of an adapter of the fleet; only its cells are built; repeat for several",
        "target": "only cells of this target are built; repeat for several",
        "set": "set a key of the shared recipe: key.path=value; repeat for several",
        "layout": "write OCI layouts into ADAPTER/TARGET of this folder",
    },
)
def fleet(
    *,
    file: str = "fleet.yaml",
    on: str = "local",
    address: str = "",
    plan: bool = False,
    watch: bool = False,
    print_: str = "",
    adapter: Sequence[str] = (),
    target: Sequence[str] = (),
    cpus: int = 0,
    run: RunOptions,
    push: bool = False,
    load: bool = False,
    layout: str = "",
    set: Sequence[str] = (),  # noqa: A002 - the flag's name
    force: bool = False,
    update_lock: bool = False,
    dist: str = "dist",
) -> tuple[Mapping[str, Json], str]:
    """Build every adapter of a fleet file for every target, sharing what several builds need."""
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import keep_clean, make_fleet_engine, open_tools
    from weightsmith.cache.address import of_nodes
    from weightsmith.commands.arguments import required
    from weightsmith.commands.requests import layout_folder
    from weightsmith.fleets.matrix import matrix_of
    from weightsmith.fleets.ordering import foreseen, ordered, run_fleet
    from weightsmith.fleets.page import PAGE, table
    from weightsmith.fleets.terminal import watcher
    from weightsmith.recipe.user_config import read_config

    required(dist=dist)
    found = ordered(file, settings=set, adapters=adapter, targets=target, update_lock=update_lock)
    if print_:
        return matrix_of(found.builds, print_, file)
    place, layout = Path(dist).absolute(), layout_folder(layout)
    keep_clean(found.sources, dist=dist, layout=layout, cache=run.cache)
    if plan:
        return _planned(found, place, run)
    engine, nodes = make_fleet_engine(on, address, place), of_nodes(on, run, read_config().cache)
    layout = str(Path(layout).absolute()) if layout else ""
    outputs = {"push": push, "load": load, "layout": layout, "force": force}
    with open_tools(run, progress_for()) as tools:
        graph = foreseen(found, place, tools)
        with watcher(live=watch) as changed:
            rows = run_fleet(
                found, graph, engine, tools,
                dist=place, outputs=outputs, options=nodes, cpus=cpus, changed=changed,
            )  # fmt: skip
    if error := rows.error():
        raise error
    return rows.to_json(), f"{table(rows)}\npage: {place / PAGE}"


def _planned(found: Ordered, dist: Path, run: RunOptions) -> tuple[Mapping[str, Json], str]:
    """Return what `fleet` would do, as JSON and as text."""
    from weightsmith.building.wiring import open_tools
    from weightsmith.core.ports import Silent
    from weightsmith.fleets.foresight import plan_of, text_of
    from weightsmith.fleets.ordering import foreseen

    with open_tools(run, Silent(), uploads=False) as tools:
        planned = plan_of(foreseen(found, dist, tools))
    return planned, text_of(planned)


COMMANDS = (fleet,)
