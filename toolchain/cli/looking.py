"""Commands that look and tidy: `inspect`, `targets`, `doctor`, `clean`."""

from __future__ import annotations

from collections.abc import Mapping

from toolchain.cli.command import command
from toolchain.values import Json


@command(positional=("source",))
def inspect(
    _context: object, source: str, *, insecure: bool = False, json: bool = False
) -> tuple[Mapping[str, Json], str]:
    """Say what an image is made of: provenance, plan, scores, layers, from the image alone."""
    del json
    from toolchain.singles.images import inspect_image, inspect_text
    from toolchain.wiring import make_engine, make_registry

    with make_registry(insecure=insecure) as registry:
        result = inspect_image(source, registry, make_engine())
    return result, inspect_text(result)


@command(positional=("source",))
def verify(
    _context: object, source: str, *, key: str = "", insecure: bool = False, json: bool = False
) -> tuple[Mapping[str, Json], str]:
    """Check an image's signature, its layers' digests, and the chain from sources to layers."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.singles.verify import key_path, table, verify_image
    from toolchain.wiring import make_registry

    with make_registry(insecure=insecure) as registry:
        result = verify_image(source, key_path(key), registry, progress_for())
    return result, f"{result['reference']}@{result['digest']} holds\n{table(result)}"


@command()
def targets(_context: object, *, json: bool = False) -> tuple[Mapping[str, Json], str]:
    """List the targets there are: engines by formats."""
    del json
    from toolchain.planning import all_targets

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
    return {"targets": found}, "\n".join(lines)


@command()
def doctor(_context: object, *, json: bool = False) -> tuple[Mapping[str, Json], str]:
    """Say what this machine has and lacks, and what to do about it."""
    del json
    from toolchain.wiring import examine

    result = examine()
    lines = [
        f"{'ok  ' if check['ok'] else 'no  '}{name:<12} {check['found']}"
        + (f"\n                 {check['todo']}" if check["todo"] else "")
        for name, check in result["checks"].items()
    ]
    return result, "\n".join(lines)


@command()
def clean(
    _context: object, *, keep: str = "0", json: bool = False
) -> tuple[Mapping[str, Json], str]:
    """Shrink the store to --keep (such as 20GiB), least recently used first."""
    del json
    from toolchain.serving.memory import human, parse_size
    from toolchain.wiring import make_store

    result = make_store().clean(parse_size(keep))
    return result, (
        f"deleted {result['deleted']} result(s), kept {human(int(result['bytes_after']))}"
        + (f"; {result['in_use']} in use by a running build" if result["in_use"] else "")
    )


COMMANDS = (inspect, verify, targets, doctor, clean)
