"""`report`: write the report of existing builds, or compare two builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.trees import below
from weightsmith.core.values import Writable
from weightsmith.evaluating.build_record import FILE, BuildRecord
from weightsmith.evaluating.pages import (
    Written,
    read_as_facts,
    read_json,
    write_comparison,
    write_report,
)


def report_builds(folder: Path) -> list[Mapping[str, Writable]]:
    """Write a report for every build.json in a folder and its subfolders; return their paths.

    Raises UsageError if there is no build.json.
    """
    found = [folder] if folder.is_file() else _builds(folder)
    if not found:
        raise UsageError(
            f"{folder} has no {FILE}",
            hint="give the folder that `build` wrote to, by default dist",
        )
    reports = []
    for path in found:
        facts = read_json(path)
        with read_as_facts(path):
            reports.append(_paths(write_report(BuildRecord.from_json(facts), path.parent)))
    return reports


def compare_builds(first: str, second: str, out: Path | None) -> Mapping[str, Writable]:
    """Write the comparison of two builds to `out`, by default into the second build's folder.

    Raises UsageError if there are not two builds, or a folder has no build.json.
    """
    if not second:
        raise UsageError(
            "--compare needs two builds", hint="for example `invoke report --compare dist/A dist/B`"
        )
    one, two = (_only(Path(name)) for name in (first, second))
    return _paths(write_comparison(one, two, out or two))


def _only(place: Path) -> Path:
    if place.is_file():
        return place.parent
    if (place / FILE).is_file():
        return place
    builds = _builds(place)
    if len(builds) == 1:
        return builds[0].parent
    what = f"{len(builds)} builds" if builds else f"no {FILE}"
    raise UsageError(
        f"{place} has {what}", hint="give one target's folder, such as dist/NAME/VERSION/TARGET"
    )


def _builds(folder: Path) -> list[Path]:
    return [path for path in below(folder) if path.name == FILE]


def _paths(written: Written) -> Mapping[str, Writable]:
    return {kind: path for kind, path in asdict(written).items() if path}
