"""The cache that machines share: `cache`."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.api.commands.requests import CacheCommand
from weightsmith.cli.command import command
from weightsmith.core.escape import escaped, joined
from weightsmith.core.values import Json


@command(CacheCommand)
def cache(asked: CacheCommand) -> tuple[Mapping[str, Json], str]:
    """Fill the shared cache (push), fetch it (pull), shrink it (prune) or describe it (stat)."""
    from weightsmith.api.commands import cache as run
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_one_cache
    from weightsmith.core.errors import UsageError
    from weightsmith.serving.memory import human, parse_size

    run.check_action(asked.action)
    if asked.action == "prune" and not asked.keep:
        raise UsageError("missing: --keep", hint="`--help cache` lists every flag")
    size, progress, insecure = parse_size(asked.keep or "0"), progress_for(), asked.run.insecure
    with open_one_cache(asked.cache, progress, sign_key=asked.sign_key, insecure=insecure) as one:
        match asked.action:
            case "push":
                result = run.push_results(
                    one.local.results(), one.uploads, one.shared.cache, progress
                )
                text = f"pushed {result['pushed']} result(s), {human(result['bytes'])}"
                text += f"; {result['held']} were there"
            case "pull":
                result = run.pull_results(one.store, one.local, one.shared)
                text = f"pulled {result['pulled']} result(s), {human(result['bytes'])}"
                text += f"; {result['held']} were here"
                text += f"; {result['refused']} not used" if result["refused"] else ""
            case "prune":
                result = run.prune_cache(one.shared.cache, size)
                text = f"deleted {result['deleted']} result(s); kept {human(result['bytes_after'])}"
            case _:
                result = run.describe_cache(one.shared.cache)
                text = _described(result)
    return result, text


def _described(result: Mapping[str, Json]) -> str:
    from weightsmith.serving.memory import human

    lines = [f"{escaped(result['cache'])}: {result['results']} results, {human(result['bytes'])}"]
    lines += [
        f"  {escaped(stage):<18} {row['results']:>5}  {human(row['bytes']):>10}"
        for stage, row in result["stages"].items()
    ]
    if result["unreadable"]:
        lines.append(f"  {result['unreadable']} cannot be read")
    return joined(lines)


COMMANDS = (cache,)
