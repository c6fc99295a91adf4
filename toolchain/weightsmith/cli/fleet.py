"""`fleet`: many builds of one recipe, here or on an engine that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.cli.command import command
from weightsmith.cli.sections import Flags
from weightsmith.run_options import RunOptions
from weightsmith.values import Json


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
    from weightsmith.commands.arguments import layout_folder
    from weightsmith.fleets.foresight import plan_of, text_of
    from weightsmith.fleets.matrix import matrix_of
    from weightsmith.fleets.ordering import foreseen, ordered, run_fleet
    from weightsmith.fleets.page import PAGE, table
    from weightsmith.fleets.terminal import watcher
    from weightsmith.ports import Silent
    from weightsmith.progress import progress_for
    from weightsmith.recorder import Recorder
    from weightsmith.sharing.address import of_nodes
    from weightsmith.user_config import read_config
    from weightsmith.wiring import keep_clean, make_fleet_engine, open_tools

    found = ordered(file, settings=set, adapters=adapter, targets=target, update_lock=update_lock)
    if print_:
        return matrix_of(found.builds, print_, file)
    place = Path(dist).absolute()
    layout = layout_folder(layout)
    keep_clean(found.sources, dist=dist, layout=layout, cache=run.cache)
    engine = None if plan else make_fleet_engine(on, address, place)
    nodes = {} if plan else of_nodes(on, run, read_config().cache)
    progress = Silent() if plan else Recorder(progress_for())
    with open_tools(run, progress, uploads=not plan) as tools:
        graph = foreseen(found, place, tools)
        if engine is None:
            planned = plan_of(graph)
            return planned, text_of(planned)
        with watcher(live=watch) as changed:
            rows = run_fleet(
                found,
                graph,
                engine,
                tools,
                dist=place,
                outputs={
                    "push": push,
                    "load": load,
                    "layout": str(Path(layout).absolute()) if layout else "",
                    "force": force,
                },
                options=nodes,
                cpus=cpus,
                changed=changed,
            )
    if error := rows.error():
        raise error
    return rows.to_json(), f"{table(rows)}\npage: {place / PAGE}"


COMMANDS = (fleet,)
