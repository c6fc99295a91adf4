"""Pulling weights: by number of layers, runtime and its settings.

Run as root from a checkout: `python benchmarks/pull.py --gib 2 --rounds 3`. Needs docker-registry,
containerd and five times the weights' size of free disk. `--containerd NAME=FOLDER` adds another
containerd (settings of 2.1 and 2.4 need those), `--erofs FOLDER` is where `mkfs.erofs` is. Each
pull has a containerd of its own with an empty folder; `docker` is the engine that runs already.
With `--rate`, each connection to the registry gets that many MB per second, as with registries
on object storage. Everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bake_acts import WORK
from bake_servers import children, cpu, registry
from pull_runtimes import SETTINGS, Setting, paced, removed, runtime

Row = dict[str, float]


def main() -> None:
    """Measure, print a Markdown table, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--layers", default="1,4,16", help="numbers of layers")
    parser.add_argument("--settings", default="", help="names with semicolons between; all")
    parser.add_argument("--containerd", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--erofs", type=Path, help="folder with mkfs.erofs")
    parser.add_argument("--rate", type=float, default=0, help="MB/s of one connection")
    options = parser.parse_args()
    programs = {"1.7": Path("/usr/bin")}
    programs |= {name: Path(at) for name, _, at in (t.partition("=") for t in options.containerd)}
    wanted = [n for n in options.settings.split(";") if n] or list(SETTINGS)
    settings = {n: SETTINGS[n] for n in wanted if SETTINGS[n].program in {*programs, "docker"}}
    WORK.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(WORK).free < 5 * options.gib * 2**30:
        raise SystemExit(f"needs {5 * options.gib:g} GiB of free disk under {WORK}")
    rows: dict[tuple[str, int], list[Row]] = {}
    try:
        weights = make_weights(int(options.gib * 2**30))
        for n in range(options.rounds):
            for count in map(int, options.layers.split(",")):
                with registry() as (host, pids), paced(host, int(options.rate * 1e6)) as shown:
                    push(weights, count, f"{host}/bench/pull:1")
                    for name, setting in settings.items():
                        row = pulled(setting, f"{shown}/bench/pull:1", pids, programs, options)
                        rows.setdefault((name, count), []).append(row)
                        told = {key: round(value, 1) for key, value in row.items()}
                        print(f"round {n + 1}, {count} layers, {name}: {told}", file=sys.stderr)
    finally:
        shutil.rmtree(WORK)
    print(table(rows, options))


def make_weights(size: int) -> Path:
    """Write a file of random bytes, which do not compress."""
    path = WORK / "weights"
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    return path


def push(weights: Path, count: int, reference: str) -> None:
    """Push an image with the file in `count` layers of equal size."""
    from weightsmith.core.values import Slice
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.layers import Member, TarLayer
    from weightsmith.oci.references import Reference
    from weightsmith.oci.registry import Registry

    each = weights.stat().st_size // count
    parts = [(Slice(path=weights, offset=n * each, size=each),) for n in range(count)]
    layers = [
        TarLayer(members=(Member(f"/models/{n}", each, 0o644, part),))
        for n, part in enumerate(parts)
    ]
    with Registry() as to:
        to.push(assemble(layers, config=ImageConfig()), Reference.parse(reference), parallel=2)


def pulled(
    setting: Setting,
    reference: str,
    registry_pids: dict[str, int],
    programs: dict[str, Path],
    options: argparse.Namespace,
) -> Row:
    """Time one pull, then writing to the disk what it left in memory."""
    with runtime(setting, programs, options.erofs) as client:
        os.sync()
        before = cpu(registry_pids), cpu(client.pids), children()
        began = time.perf_counter()
        words = [*client.pull, reference]
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr}")
        wall = time.perf_counter() - began
        os.sync()
        synced = time.perf_counter() - began
        after = cpu(registry_pids), cpu(client.pids), children()
        spent = [b - a for a, b in zip(before, after, strict=True)]
        disk = used(client.folder) if client.folder else 0
        removed(setting, reference)
    return {
        "wall": wall, "synced": synced, "cpu": spent[1] + spent[2], "registry": spent[0],
        "disk": disk / 1e9,
    }  # fmt: skip


def used(folder: Path) -> int:
    """Return the bytes that a folder takes on disk."""
    words = ["du", "-s", "-x", "--block-size=1", str(folder)]
    return int(subprocess.run(words, capture_output=True, text=True).stdout.split()[0])


def table(rows: dict[tuple[str, int], list[Row]], options: argparse.Namespace) -> str:
    """Return medians as Markdown, one line per setting and number of layers."""
    rate = f"{options.rate:g} MB/s per connection" if options.rate else "no limit per connection"
    where = f"{rate}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.0f}"
    lines = [
        f"Medians of {options.rounds}: {options.gib:g} GiB, {where}.",
        "",
        "| runtime | layers | wall s | each round | until on disk | CPU s | registry's | GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    places = list(SETTINGS)
    for (name, count), found in sorted(rows.items(), key=lambda row: places.index(row[0][0])):
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        each = ", ".join(f"{row['wall']:.1f}" for row in found)
        lines.append(
            f"| {name} | {count} | {middle['wall']:.1f} | {each} | {middle['synced']:.1f} | "
            f"{middle['cpu']:.1f} | {middle['registry']:.1f} | {middle['disk']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
