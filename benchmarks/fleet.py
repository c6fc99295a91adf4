"""Fleets of the tiny example, and a runner that starts cold with a warm cache.

    python benchmarks/fleet.py [--adapters N] [--work DIR]   # own share, nothing changed
    python benchmarks/fleet.py --nodes [--adapters N]        # two Ray nodes against one
    python benchmarks/fleet.py --runner                      # the support bot on a CI runner

It needs docker-registry, which is the cache and takes the images, and builders that are made. It
prints CPU seconds, which other programs on the machine change little, and seconds of the clock,
which they do. With --work, what an earlier run built there is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

import yaml

ROOT = Path(__file__).parents[1]
TINY, BOT = ROOT / "examples" / "tiny", ROOT / "examples" / "support-bot"
REGISTRY = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
PORT = 5978


class Ran(NamedTuple):
    """One command: what it said, and what it took."""

    told: Any
    cpu: float
    seconds: float


def run(folder: Path, *words: object, **environment: str) -> Ran:
    """Run weightsmith in a folder; CPU seconds are of all its processes and of those beside it."""
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", *map(str, words), "--runner", "local",
         "--json"],
        cwd=folder, check=False, capture_output=True, text=True,
        env={**os.environ, "DOCKER_HOST": f"unix://{folder}/none",
             "PYTHONPATH": ":".join([str(ROOT / "toolchain"), str(ROOT / "tests" / "without"),
                                     os.environ.get("PYTHONPATH", "")]),
             **environment},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return Ran(json.loads(done.stdout), cpu, time.monotonic() - began)


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Serve docker-registry from a folder; yield its host."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yml"
    config.write_text(REGISTRY.format(folder=folder / "data", port=PORT))
    server = subprocess.Popen(["docker-registry", "serve", config], stderr=subprocess.DEVNULL)
    time.sleep(1)
    try:
        yield f"127.0.0.1:{PORT}"
    finally:
        server.terminate()
        server.wait()


def adapters(folder: Path, count: int) -> None:
    """Write a fleet of copies of one adapter, each of which is merged by itself."""
    if (folder / "fleet.yaml").exists():
        return
    shutil.copytree(TINY / "base", folder / "base")
    for file in ("recipe.yaml", "eval-a.jsonl", "calibration.jsonl"):
        shutil.copy(TINY / file, folder)
    for number in range(count):
        place = folder / "adapters" / f"n{number:03}"
        shutil.copytree(TINY / "adapters" / "a", place)
        settings = json.loads((place / "adapter_config.json").read_text())
        settings["lora_alpha"] = settings["lora_alpha"] * (1 + number / 10_000)
        (place / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"adapters": ["./adapters/*"]}))


def said(name: str, ran: Ran) -> None:
    """Print what a command took."""
    print(f"{name}: {ran.cpu:.1f} CPU seconds, {ran.seconds:.1f} s", flush=True)


def shares(work: Path, count: int, times: int) -> None:
    """Build a fleet; then with nothing changed, from a warm store and on an empty machine."""
    adapters(work, count)
    store = {"WEIGHTSMITH_STORE": str(work / "store")}
    with registry(work / "registry") as host:
        words = ("fleet", "--push", "--cache", f"oci://{host}/team/cache",
                 "--set", f"image.repository={host}/team/tiny")  # fmt: skip
        first = run(work, *words, **store)
        said(f"{count} adapters x llamacpp-q4_k_m", first)
        own = first.told["own_cpu_seconds"]
        print(f"  the fleet's own process: {own:.1f}, {100 * own / first.cpu:.1f} % of all")
        print(f"  stages that ran: { {k: v['run'] for k, v in first.told['stages'].items()} }")
        warm = [run(work, *words, **store) for _ in range(times)]
        report("nothing changed, warm store", warm)
        empty = []
        for _ in range(times):
            with tempfile.TemporaryDirectory() as name:
                fresh = {"WEIGHTSMITH_STORE": f"{name}/store", "WEIGHTSMITH_HOME": f"{name}/cache"}
                empty.append(run(work, *words, "--dist", f"{name}/dist", **fresh))
        report("nothing changed, empty machine, warm cache", empty)


def report(name: str, runs: list[Ran]) -> None:
    """Print the medians of fleets in which nothing was left to do."""
    cpu, seconds = median(ran.cpu for ran in runs), median(ran.seconds for ran in runs)
    said(name, Ran(None, cpu, seconds))
    stages = runs[-1].told["stages"]
    jobs = sum(n["run"] for k, n in stages.items() if k not in ("render", "bake", "publish"))
    print(f"  jobs run: {jobs}; moved: {runs[-1].told['bytes_moved'] / 1e6:.2f} MB")


def nodes(work: Path, count: int) -> None:
    """Run a fleet on one Ray node and on two, each with half of a core of its own."""
    adapters(work, count)
    took = {}
    for number in (1, 2):
        clean = {"WEIGHTSMITH_STORE": str(work / f"store-{number}")}
        with (
            cluster(number) as (address, of_cluster),
            registry(work / f"registry-{number}") as host,
            Watch(of_cluster) as watch,
        ):
            words = ("fleet", "--push", "--cache", f"oci://{host}/team/cache", "--on", "ray",
                     "--address", address, "--set", f"image.repository={host}/team/tiny",
                     "--dist", str(work / f"dist-{number}"))  # fmt: skip
            took[number] = run(work, *words, **clean)
        said(f"{count} adapters on {number} Ray node(s)", took[number])
        told = took[number].told
        watch.tell(took[number].cpu, told["cpu_seconds"] - told["own_cpu_seconds"], count)
    print(f"two nodes are {took[1].seconds / took[2].seconds:.2f} times as fast as one")


class Watch:
    """Adds up the CPU seconds of Ray's processes and the registry, which nothing else counts.

    It looks every second, so it misses the last part of a process that ends.
    """

    KINDS = (("gcs_server", "Ray's head"), ("raylet/raylet", "raylets"),
             ("ray::DashboardAgent", "Ray's agents"), ("ray::RuntimeEnvAgent", "Ray's agents"),
             ("ray::", "workers"), ("default_worker.py", "workers"),
             ("docker-registry", "registry"), ("/ray/", "Ray's agents"))  # fmt: skip

    def __init__(self, folder: str) -> None:
        self._variable = f"WEIGHTSMITH_TEST_CLUSTERS_FOLDER={folder}".encode()
        self._kinds: dict[str, str] = {}
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        for _ in range(2):  # parents first, then all that they started
            self._look(begin=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def tell(self, fleet: float, tasks: float, cells: int) -> None:
        """Print each kind's share of a cell, beside the fleet's own process and its tasks."""
        used = Counter({"fleet's process": fleet, "tasks": tasks})
        for pid, kind in self._kinds.items():
            used[kind] += self._last[pid] - self._first[pid]
        workers = sum(kind == "workers" for kind in self._kinds.values())
        parts = ", ".join(f"{kind} {seconds / cells:.2f}" for kind, seconds in used.most_common())
        print(f"  CPU seconds for each cell: {parts}; {workers} worker processes")

    def _watch(self) -> None:
        while not self._stop.wait(1):
            self._look()

    def _look(self, *, begin: bool = False) -> None:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                if folder.name not in self._kinds and (kind := self._kind(folder)):
                    self._kinds[folder.name] = kind
                    self._first[folder.name] = self._used(folder) if begin else 0.0
                if folder.name in self._kinds:
                    self._last[folder.name] = self._used(folder)

    def _kind(self, folder: Path) -> str:
        words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        kind = next((kind for part, kind in self.KINDS if part in words), "")
        if kind == "registry" or not kind:
            return kind
        # A process that has named itself, ray::…, has overwritten its variables.
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        known = self._variable in (folder / "environ").read_bytes().split(b"\0")
        return kind if known or parent in self._kinds else ""

    def _used(self, folder: Path) -> float:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def cluster(count: int) -> Iterator[tuple[str, str]]:
    """Start so many Ray nodes with half a core each; yield the address and the cluster's folder."""
    script, folder = ROOT / "tests" / "clusters.sh", tempfile.mkdtemp(prefix="wf-", dir="/tmp")
    environment = {**os.environ, "PYTHON": sys.executable, "WEIGHTSMITH_TEST_CLUSTERS": "ray",
                   "WEIGHTSMITH_TEST_RAY_NODES": str(count)}  # fmt: skip
    try:
        subprocess.run(["bash", script, "start", folder], env=environment, check=True)
        yield "127.0.0.1:26379", folder
    finally:
        subprocess.run(["bash", script, "stop", folder], env=environment, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def runner(work: Path) -> None:
    """Build the support bot as a CI runner does: without any cache, and with a warm one."""
    shutil.copytree(BOT, work / "bot", dirs_exist_ok=True)
    with registry(work / "registry") as host:
        words = ("build", "--recipe", "bot/recipe.yaml", "--push",
                 "--set", f"image.repository={host}/team/bot")  # fmt: skip
        cache = ("--cache", f"oci://{host}/team/cache")
        cold = run(work, *words, **fresh_store(work))
        said("cold, builders made, no cache", cold)
        said("the same, and fills the cache", run(work, *words, *cache, **fresh_store(work)))
        warm = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as name:
                empty = {"WEIGHTSMITH_STORE": f"{name}/store", "WEIGHTSMITH_HOME": f"{name}/cache"}
                warm.append(run(work, *words, *cache, "--dist", f"{name}/dist", **empty))
        cpu = median(ran.cpu for ran in warm)
        said("empty machine, warm cache", Ran(None, cpu, median(ran.seconds for ran in warm)))
        print(f"{cold.cpu / cpu:.0f} times less CPU")


def fresh_store(work: Path) -> Mapping[str, str]:
    """Return the variable of an empty store."""
    return {"WEIGHTSMITH_STORE": tempfile.mkdtemp(prefix="store-", dir=work)}


def main() -> None:
    """Measure what the flags say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--nodes", action="store_true")
    parser.add_argument("--runner", action="store_true")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = asked.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        if asked.nodes:
            nodes(work, asked.adapters or 12)
        elif asked.runner:
            runner(work)
        else:
            shares(work, asked.adapters or 100, asked.times)


if __name__ == "__main__":
    main()
