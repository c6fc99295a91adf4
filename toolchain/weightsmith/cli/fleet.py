"""`fleet`: many builds of one recipe, here or on an engine that is there."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.api.commands.requests import FleetCommand
from weightsmith.cli.command import command
from weightsmith.core.values import Writable


@command(FleetCommand)
def fleet(asked: FleetCommand) -> tuple[Mapping[str, Writable], str]:
    """Build every adapter of a fleet file for every target, sharing what several builds need."""
    from weightsmith.api.fleets import ordered_of, plan_fleet, run_fleet
    from weightsmith.building.progress import progress_for
    from weightsmith.fleets.foresight import text_of
    from weightsmith.fleets.matrix import matrix_of
    from weightsmith.fleets.page import PAGE, table
    from weightsmith.fleets.terminal import watcher

    found = ordered_of(asked)
    if asked.print_:
        return matrix_of(found.builds, asked.print_, str(asked.file))
    if asked.plan:
        planned = plan_fleet(asked, found)
        return planned, text_of(planned)
    rows = run_fleet(asked, found, progress_for(), watcher(live=asked.watch))
    if error := rows.error():
        raise error
    return rows.to_json(), f"{table(rows)}\npage: {asked.dist.absolute() / PAGE}"


COMMANDS = (fleet,)
