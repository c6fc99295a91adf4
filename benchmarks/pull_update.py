"""Pulling a new version of an image that a node has: by what changed and the order of layers.

Run as root from a checkout: `python benchmarks/pull_update.py [--mib 512]`. Flags and needs are
those of `pull.py`. The engine has an eighth of the weights' size. Sent is what the registry wrote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path

from bake_acts import WORK
from bake_servers import registry
from pull_runtimes import SETTINGS, runtime

ORDERS = ("engine-first", "weights-first")


def main() -> None:
    """Measure, print a Markdown table, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--settings", default="docker;1.7;2.4")
    parser.add_argument("--containerd", action="append", default=[], metavar="NAME=FOLDER")
    options = parser.parse_args()
    programs = {"1.7": Path("/usr/bin")}
    programs |= {name: Path(at) for name, _, at in (t.partition("=") for t in options.containerd)}
    WORK.mkdir(parents=True, exist_ok=True)
    print("| runtime | order | changed | MB sent | wall s |\n|---|---|---|---|---|")
    try:
        for path, size in [*parts(1, options.mib), *parts(2, options.mib)]:
            path.write_bytes(os.urandom(size << 20))
        with registry() as (host, pids):
            for order in ORDERS:
                for engine, weights in ((1, 1), (2, 1), (1, 2)):
                    push(order, engine, weights, host)
            for name in options.settings.split(";"):
                for order in ORDERS:
                    for changed, new in (("engine", "2-1"), ("weights", "1-2")):
                        old = f"{host}/bench/{order}:1-1"
                        with runtime(SETTINGS[name], programs, None) as client:
                            quiet([*client.pull, old])
                            before, began = sent(pids), time.perf_counter()
                            quiet([*client.pull, f"{host}/bench/{order}:{new}"])
                            wall = time.perf_counter() - began
                            told = f"{(sent(pids) - before) / 1e6:.0f} | {wall:.1f}"
                            if name == "docker":
                                quiet(["docker", "rmi", old, f"{host}/bench/{order}:{new}"])
                        print(f"| {name} | {order} | {changed} | {told} |", flush=True)
    finally:
        shutil.rmtree(WORK)


def parts(number: int, mib: int) -> list[tuple[Path, int]]:
    """Return the files of a version, and their MiB."""
    return [(WORK / f"engine-{number}", mib // 8), (WORK / f"weights-{number}", mib)]


def push(order: str, engine: int, weights: int, host: str) -> None:
    """Push an image of an engine and weights in this order."""
    from weightsmith.oci.image import ImageConfig, assemble
    from weightsmith.oci.layers import Member, TarLayer
    from weightsmith.oci.references import Reference
    from weightsmith.oci.registry import Registry

    files = {"/app/engine": WORK / f"engine-{engine}", "/models/w": WORK / f"weights-{weights}"}
    layers = [TarLayer(members=(Member.of_file(to, path),)) for to, path in files.items()]
    if order == "weights-first":
        layers.reverse()
    place = Reference.parse(f"{host}/bench/{order}:{engine}-{weights}")
    with Registry() as to:
        to.push(assemble(layers, config=ImageConfig()), place)


def sent(pids: dict[str, int]) -> int:
    """Return the bytes that the registry has written, to clients for the most part."""
    (pid,) = pids.values()
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def quiet(words: list[str]) -> None:
    """Run a command."""
    subprocess.run(words, check=True, capture_output=True)


if __name__ == "__main__":
    main()
