"""Reports, and what this machine has: `report`, `targets`, `doctor`, `clean`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.cli.command import command
from weightsmith.core.escape import escaped, joined
from weightsmith.core.values import Json, plain


def report_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return the positional arguments of `report` that a command line has words for.

    Invoke knows only positional arguments that must be given, and `report [DIR] --compare A B`
    has none to two: DIR, and B.
    """
    words = list(words)
    if "report" not in words:
        return ()
    bare, values = 0, {"--compare", "--out"}
    rest = words[words.index("report") + 1 :]
    for before, word in zip(["", *rest], rest, strict=False):
        bare += not word.startswith("-") and before not in values
    return ("folder", "other")[: min(bare, 2)]


@command(
    positional=report_words(sys.argv),
    meanings={
        "folder": "folder with build.json in it or in a subfolder; default: dist",
        "other": "folder of the second of two builds to compare",
        "compare": "two build folders to compare: the first here, the second after it",
        "out": "folder for the comparison",
    },
)
def report(
    *,
    folder: str | None = None,
    other: str | None = None,
    compare: str = "",
    out: str = "",
) -> tuple[Mapping[str, Json], str]:
    """Write the report of the builds in a folder (dist), or of two builds with --compare A B."""
    from weightsmith.api.commands.report import compare_builds, report_builds

    if compare:
        # With one word it is B; with two, DIR and B.
        place = Path(out) if out else Path(folder) if other and folder else None
        result = compare_builds(compare, other or folder or "", place)
        return result, str(result["html"])
    result = report_builds(Path(folder or "dist"))
    return result, joined(str(written["html"]) for written in result["reports"])


@command()
def targets() -> tuple[Mapping[str, Json], str]:
    """List all targets: the engines, and the formats that each can load."""
    from weightsmith.building.targets import all_targets

    found = {
        name: {
            "engine": target.engine.name,
            "format": target.format.name,
            "bits_per_weight": target.format.bits_per_weight,
            "legacy": target.engine.legacy,
        }
        for name, target in all_targets().items()
    }
    width = max((len(name) for name in found), default=0)
    lines = [
        f"{name:<{width}}  {facts['engine']} with {facts['format']} weights, "
        f"about {facts['bits_per_weight']:g} bits each"
        for name, facts in found.items()
    ]
    return {"targets": found}, joined(lines)


@command()
def doctor() -> tuple[Mapping[str, Json], str]:
    """Show what this machine provides, what is missing, and what to do about it."""
    from weightsmith.building.wiring import examine

    found = examine()
    lines = []
    for name, check in found.checks.items():
        lines.append(f"{'ok  ' if check.ok else 'no  '}{name:<12} {check.found}")
        lines += [f"{'':<17}{line}" for line in check.todo.splitlines()]
    return plain(found), joined(lines)


@command(meanings={"keep": "maximum size of the store afterwards, such as 20GiB"})
def clean(*, keep: str = "", json: bool = False) -> tuple[Mapping[str, Json], str]:
    """Shrink the store to --keep (default: 0), least recently used results first."""
    from weightsmith.building.wiring import make_store
    from weightsmith.serving.memory import human, parse_size

    store = make_store()
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if not keep and not json and asks:
        where = escaped(str(store.root))
        sys.stderr.write(f"Delete all results in {where} that are not in use? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            return {}, "nothing deleted; `--keep 20GiB` would keep the latest"
    result = store.clean(parse_size(keep or "0"))
    freed = int(result["bytes_before"]) - int(result["bytes_after"])
    return result, (
        f"deleted {result['deleted']} result(s), {human(freed)};"
        f" kept {human(int(result['bytes_after']))}"
        + (f"; {result['in_use']} in use by a running build" if result["in_use"] else "")
    )


COMMANDS = (report, targets, doctor, clean)
