"""The cache that machines share: `cache`."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.cli.command import command
from weightsmith.core.escape import escaped, joined
from weightsmith.core.values import Json


@command(
    positional=("action",),
    meanings={
        "cache": "the cache: oci://REGISTRY/REPOSITORY, s3://BUCKET/PREFIX or a folder; default: "
        "that of the environment or the configuration",
        "keep": "for prune: maximum size of the cache afterwards, such as 200GiB; what was used "
        "least recently goes first, in a registry or in S3 what was written first",
        "sign_key": "for push: private key to sign results with",
    },
)
def cache(
    action: str,
    *,
    cache: str = "",
    keep: str = "",
    sign_key: str = "",
    insecure: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Fill the shared cache (push), fetch it (pull), shrink it (prune) or describe it (stat)."""
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_one_cache
    from weightsmith.commands import cache as run
    from weightsmith.commands.arguments import required
    from weightsmith.serving.memory import human, parse_size

    run.check_action(action)
    if action == "prune":
        required(keep=keep)
    size, progress = parse_size(keep or "0"), progress_for()
    with open_one_cache(cache, progress, sign_key=sign_key, insecure=insecure) as one:
        match action:
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
