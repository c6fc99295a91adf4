"""Thin images of 20 fine-tunes of one base: bytes in a registry and for a node, and their start.

    python benchmarks/thin.py [--work benchmarks/work] [--formats fp8,…] [--rounds 3]

The base has Llama's shapes and 0.97 GB in bfloat16, the adapters rank 8 on all linear layers. Bytes
are those of layers without the engine's, which both kinds share; layers of tensors that no adapter
changes are in a registry, and on a node, once. Seconds of a pull are computed:
three connections at 100 MB/s each, the next layer on the first that is free.

A start is the image's own program in a process of its own, on the files of the image, merging into
/dev/shm: wall and CPU seconds and peak memory until the last file was compared. `reading` is the
time that a disk of 200 MB/s takes for the weights of the fat image; the base is in the page cache,
so a cold start takes up to the base's own reading time more.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import merge as shapes
from weightsmith.building.progress import progress_for
from weightsmith.building.wiring import open_tools
from weightsmith.core.merge_options import Merge
from weightsmith.core.platforms import host_platform
from weightsmith.core.values import (
    SAFETENSORS,
    AdapterSnapshot,
    Artifact,
    Digest,
    FileEntry,
    Snapshot,
    Sources,
    Tree,
    plain,
)
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.merging.stream import sha256_file
from weightsmith.models.reshard import reshard
from weightsmith.oci.layers import TarLayer
from weightsmith.oci.weights import fastest_layer, weight_layers
from weightsmith.provenance.attest import ThinParts
from weightsmith.quantizers import formats
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.recipe.user_config import RunOptions
from weightsmith.serving.vllm import ENGINE
from weightsmith.steps.thin import program_files, thin_parts
from weightsmith.steps.tools import Tools

COUNT = 20
RANK = 8
CONNECTIONS, RATE, DISK = 3, 100e6, 200e6
START = """
import sys
from pathlib import Path
program, manifest, place = sys.argv[1:4]
sys.path.insert(0, program)
sys.argv[0] = program
from weightsmith.core import thin
from weightsmith.worker import start
thin.PLACES, thin.SERVED = (place,), place + "/served"
raise SystemExit(start.main([], Path(manifest)))
"""


def tree_of(folder: Path) -> Tree:
    """Return a folder's files with their digests."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    files = (
        FileEntry(path=p.name, size=p.stat().st_size, digest=Digest(f"sha256:{sha256_file(p)}"))
        for p in paths
    )
    return Tree(root=folder, files=tuple(files))


def snapshot(folder: Path) -> Snapshot:
    """Return a folder as a source."""
    return Snapshot(tree=tree_of(folder), source=str(folder), pin=str(folder), pinned=True)


def layers_of(tree: Tree, tools: Tools) -> tuple[TarLayer, ...]:
    """Return the layers of a model's files."""
    memo = tools.store.memo
    split = reshard(tree, fastest_layer, memo, strict=False)
    return weight_layers(split.tree, "/models", memo=memo, contents=split.contents)


def pulled(layers: Iterable[TarLayer]) -> tuple[int, float]:
    """Return the bytes of layers, and the seconds until all are there."""
    sizes = [layer.size for layer in layers]
    free = [0.0] * CONNECTIONS
    for size in sizes:
        heapq.heappush(free, heapq.heappop(free) + size / RATE)
    return sum(sizes), max(free)


def parts_of(sources: Sources, made: Artifact, tools: Tools) -> ThinParts:
    """Return the parts of a thin image."""
    base = sources.base.tree
    layers, platforms = layers_of(base, tools), [host_platform()]
    return thin_parts(sources, Merge(), made, made, layers, base.digest, ENGINE, platforms, tools)


def started(parts: ThinParts, sources: Sources, work: Path, rounds: int) -> dict[str, float]:
    """Start the image's program on its files; return medians."""
    program = work / "program"
    shutil.rmtree(program, ignore_errors=True)
    for name, data in program_files().items():
        (program / name).parent.mkdir(parents=True, exist_ok=True)
        (program / name).write_bytes(data)
    (kernels,) = shapes.kernels().values()
    shutil.copytree(kernels, program / "kernels")
    model = replace(
        parts.model,
        base=str(sources.base.tree.root),
        adapters=tuple(
            replace(one, folder=str(source.snapshot.tree.root))
            for one, source in zip(parts.model.adapters, sources.adapters, strict=True)
        ),
        copied=(),
    )
    manifest = work / "thin.json"
    manifest.write_text(json.dumps(plain(model)))
    runs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
            argv = [sys.executable, "-I", "-B", "-c", START, str(program), str(manifest), place]
            runs.append(shapes.run(argv))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    """Make base, adapters and what a gate would have seen; print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=shapes.ROOT / "benchmarks" / "work")
    parser.add_argument("--formats", default="", help="such as fp8,nvfp4a16, besides 16 bits")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    work = given.work.resolve()
    shape = shapes.GIGABYTE
    shapes.RANK = RANK
    if not (base := work / "base-gigabyte").is_dir():
        shapes.make_base(base, shape)
    if not (adapter := work / "adapter-thin").is_dir():
        shapes.make_adapter(adapter, shape, "LORA")
    fat = work / "thin-fat"
    if not fat.is_dir():
        merge(MergeRequest(base=base, adapters=((adapter, 1.0),), out=fat, device="cpu"))
    sources = Sources(base=snapshot(base), adapters=(AdapterSnapshot(snapshot=snapshot(adapter)),))
    progress = progress_for()
    with open_tools(RunOptions(runner="local"), progress, uploads=False) as tools:
        made = {"16 bits": Artifact(format=SAFETENSORS, tree=tree_of(fat))}
        for name in filter(None, given.formats.split(",")):
            if not (out := work / f"thin-{name}").is_dir():
                out.mkdir()
                quantize(SCHEMES[name], fat, out, ())
            made[name] = Artifact(format=formats()[name], tree=tree_of(out))
        loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
        print(f"{COUNT} fine-tunes, {os.cpu_count()} CPUs, load {loads}\n")
        print("| | registry | a node's second image | pull | share of fat |")
        print("|---|---|---|---|---|")
        starts = []
        for name, artifact in made.items():
            parts = parts_of(sources, artifact, tools)
            base_layers, further = parts.weights[:-1], parts.weights[-1:]
            known = {layer.digest for layer in base_layers}
            fat_layers = layers_of(artifact.tree, tools)
            whole, pull = pulled(one for one in fat_layers if one.digest not in known)
            alike, _ = pulled(one for one in fat_layers if one.digest in known)
            own, quick = pulled(further)
            shared, _ = pulled([*base_layers, *parts.program.values()])
            print(f"| fat, {name} | {(alike + COUNT * whole) / 1e9:.2f} GB | {whole / 1e6:.1f} MB "
                  f"| {pull:.1f} s | |")  # fmt: skip
            print(f"| thin, {name} | {(shared + COUNT * own) / 1e9:.2f} GB | {own / 1e6:.1f} MB "
                  f"| {quick:.1f} s | {own / whole:.1%} |")  # fmt: skip
            found = started(parts, sources, work, given.rounds)
            reading = artifact.tree.weight_bytes / DISK
            planned = parts.model.memory_bytes / 2**20
            starts.append(
                f"| {name} | {found['wall']:.1f} | {found['cpu']:.1f} | {found['rss']:.0f} "
                f"| {planned:.0f} | {reading:.1f} | {found['wall'] / reading:.2f} |"
            )
        print("\n| start | wall s | CPU s | peak MiB | planned MiB | reading s | wall / reading |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(starts))


if __name__ == "__main__":
    main()
