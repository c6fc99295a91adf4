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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

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
    """Run weightsmith in a folder; the CPU seconds are those of all its processes."""
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", *map(str, words), "--runner", "local", "--json"],
        cwd=folder, check=False, capture_output=True, text=True,
        env={**os.environ, "DOCKER_HOST": f"unix://{folder}/none",
             "PYTHONPATH": f"{ROOT / 'toolchain'}:{os.environ.get('PYTHONPATH', '')}",
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
                fresh = {"WEIGHTSMITH_STORE": f"{name}/store", "WEIGHTSMITH_CACHE": f"{name}/cache"}
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
    """Run a fleet on one Ray node and on two, each on a core of its own."""
    adapters(work, count)
    took = {}
    for number in (1, 2):
        clean = {"WEIGHTSMITH_STORE": str(work / f"store-{number}")}
        with cluster(number) as address, registry(work / f"registry-{number}") as host:
            words = ("fleet", "--push", "--cache", f"oci://{host}/team/cache", "--on", "ray",
                     "--address", address, "--set", f"image.repository={host}/team/tiny",
                     "--dist", str(work / f"dist-{number}"))  # fmt: skip
            took[number] = run(work, *words, **clean)
        said(f"{count} adapters on {number} Ray node(s)", took[number])
    print(f"two nodes are {took[1].seconds / took[2].seconds:.2f} times as fast as one")


@contextlib.contextmanager
def cluster(count: int) -> Iterator[str]:
    """Start so many Ray nodes, each on one core; yield the address."""
    script, folder = ROOT / "tests" / "clusters.sh", tempfile.mkdtemp(prefix="wf-", dir="/tmp")
    environment = {**os.environ, "PYTHON": sys.executable, "WEIGHTSMITH_TEST_CLUSTERS": "ray",
                   "WEIGHTSMITH_TEST_RAY_NODES": str(count)}  # fmt: skip
    try:
        subprocess.run(["bash", script, "start", folder], env=environment, check=True)
        yield "127.0.0.1:26379"
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
                empty = {"WEIGHTSMITH_STORE": f"{name}/store", "WEIGHTSMITH_CACHE": f"{name}/cache"}
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
