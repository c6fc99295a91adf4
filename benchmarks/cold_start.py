"""Time from the start of llama.cpp's server to its first answer, the model not in memory.

    python benchmarks/cold_start.py CHECKPOINT [--format q4_k_m] [--rounds 3]
    python benchmarks/cold_start.py --gguf FILE

CHECKPOINT gives its tokenizer to random weights in the shape of a Llama of 1.07 billion, which are
quantized first; or FILE is measured. Only this file's pages are dropped before each start, not
those of the whole machine, so the server's program stays in memory. The server has one thread.
`--disk` limits what the server reads from the disk (control groups, version 1).
`reordered` is the same file with its tensors in random order. Files are below benchmarks/work.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantize_by_hand import OURS, billion
from weightsmith.building.wiring import cache_folder
from weightsmith.outside.toolset import toolset_folder
from weightsmith.quantizers.gguf_header import quantized, read_header

WORK = Path(__file__).resolve().parent / "work" / "cold-start"
Row = dict[str, float]


@dataclass(frozen=True)
class Way:
    """Flags of the server, and what is done with the file as the server starts."""

    flags: tuple[str, ...] = ()
    ahead: str = ""
    """`advise` asks the kernel for the file, as a launcher could; `cat` reads it beside."""
    warm: bool = False
    reordered: bool = False


WAYS = {
    "warm": Way(warm=True),
    "mmap, as it is": Way(),
    "mmap, WILLNEED first": Way(ahead="advise"),
    "mmap, `cat` beside it": Way(ahead="cat"),
    "no mmap": Way(("--load-mode", "none")),
    "no mmap, WILLNEED first": Way(("--load-mode", "none"), "advise"),
    "direct I/O": Way(("--load-mode", "dio")),
    "mmap, no repacking": Way(("--no-repack",)),
    "mmap, no warm-up": Way(("--no-warmup",)),
    "mmap, reordered": Way(reordered=True),
    "no mmap, reordered": Way(("--load-mode", "none"), reordered=True),
}


def main() -> None:
    """Measure each way in each round, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--format", default="q4_k_m")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server", type=Path, help="llama-server; default: the compiled one")
    parser.add_argument("--disk", type=float, default=0, help="MB/s that may be read; as root")
    parser.add_argument("--ways", default="", help="names with semicolons between; all")
    asked = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    place = toolset_folder(cache_folder(), "llamacpp") / "app" / "llama-server"
    server = (asked.server or place).absolute()
    ways = {name: WAYS[name] for name in asked.ways.split(";") if name} or WAYS
    rows: dict[str, list[Row]] = {name: [] for name in ways}
    try:
        file = asked.gguf or made(asked.checkpoint.absolute(), asked.format)
        other = WORK / "reordered.gguf"
        if any(way.reordered for way in ways.values()):
            reorder(file, other)
        with slow_disk(file, int(asked.disk * 1e6)) as join:
            for n in range(asked.rounds):
                for name, way in ways.items():
                    path = other if way.reordered else file
                    rows[name].append(started(server, path, way, join))
                    told = {key: round(value, 2) for key, value in rows[name][-1].items()}
                    print(f"round {n + 1} {name}: {told}", file=sys.stderr)
        print(table(rows, file.stat().st_size))
    finally:
        shutil.rmtree(WORK)


def made(checkpoint: Path, name: str) -> Path:
    """Quantize random weights with a checkpoint's tokenizer."""
    model, out = billion(checkpoint, WORK / "billion"), WORK / "quantized"
    out.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", OURS, str(model), str(out), name, "off"], check=True)
    shutil.rmtree(model)
    return next(out.glob("*.gguf"))


def reorder(source: Path, to: Path) -> None:
    """Write the file's tensors in a random order, the same each time."""
    header = read_header(source)
    entries = sorted(header.tensors.values(), key=lambda entry: entry.offset)
    ends = [*(entry.offset for entry in entries[1:]), source.stat().st_size - header.size]
    sizes = {entry.name: end - entry.offset for entry, end in zip(entries, ends, strict=True)}
    order = random.Random(0).sample(entries, len(entries))
    targets = {entry.name: (entry.kind, sizes[entry.name]) for entry in order}
    data, places = quantized(header, targets, {})
    with source.open("rb") as old, to.open("wb") as new:
        new.write(data)
        for entry in order:
            old.seek(header.size + entry.offset)
            new.seek(places[entry.name])
            new.write(old.read(sizes[entry.name]))


@contextmanager
def slow_disk(path: Path, rate: int) -> Iterator[Callable[[], None]]:
    """Yield what puts a new process where it reads at most `rate` bytes per second from a disk."""
    if not rate:
        yield lambda: None
        return
    group = Path("/sys/fs/cgroup/blkio/cold-start")
    group.mkdir(exist_ok=True)
    device = path.stat().st_dev
    told = f"{os.major(device)}:{os.minor(device)} {rate}"
    (group / "blkio.throttle.read_bps_device").write_text(told)
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def drop(path: Path) -> float:
    """Drop the file's pages from memory; return the share that stayed."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(path)


def resident(path: Path) -> float:
    """Return the share of a file's pages that are in memory."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    seen = (ctypes.c_ubyte * pages)()
    access = mmap.ACCESS_COPY  # ctypes wants memory that could be written to
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=access) as view:
        start = ctypes.c_ubyte.from_buffer(view)
        ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), seen)
        del start
    return sum(page & 1 for page in seen) / pages


def started(server: Path, path: Path, way: Way, join: Callable[[], object]) -> Row:
    """Start the server and ask it once; return seconds and memory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        str(server), "--model", str(path), "--port", str(port), "--ctx-size", "512",
        "--parallel", "1", "--threads", "1", "--offline", "--fit", "off", *way.flags,
    ]  # fmt: skip

    def first() -> None:
        join()
        if way.ahead == "advise":
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    stayed = drop(path)
    if way.warm:
        path.read_bytes()
    began = time.perf_counter()
    aside = []
    if way.ahead == "cat":
        reading = ["cat", str(path)]
        aside = [subprocess.Popen(reading, stdout=subprocess.DEVNULL, preexec_fn=join)]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=first
    )
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(words)} ended")
            time.sleep(0.02)
        ready = time.perf_counter() - began
        complete(port, "Hello", 1)
        answered = time.perf_counter() - began
    finally:
        process.terminate()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        for one in aside:
            one.wait()
    return {
        "ready": ready, "first": answered, "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss / 1024, "stayed": stayed,
    }  # fmt: skip


def answers(url: str) -> bool:
    """Say whether a page answers with 200."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def complete(port: int, prompt: str, tokens: int) -> None:
    """Ask for some tokens."""
    body = json.dumps({"prompt": prompt, "n_predict": tokens, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=600).read()


def table(rows: dict[str, list[Row]], size: int) -> str:
    """Return medians as Markdown."""
    rounds = len(next(iter(rows.values())))
    lines = [
        f"Medians of {rounds}: a file of {size / 1e6:.0f} MB, load {os.getloadavg()[1]:.0f}.",
        "",
        "| way | first answer s | each round | ready s | CPU s | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        each = ", ".join(f"{row['first']:.1f}" for row in found)
        lines.append(
            f"| {name} | {middle['first']:.1f} | {each} | {middle['ready']:.1f} | "
            f"{middle['cpu']:.1f} | {middle['peak']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
