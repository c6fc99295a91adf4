"""Fleets on real clusters of two nodes: digests, lost nodes, a cache that stops, Ctrl-C, the page.

Two Ray nodes and two Slurm nodes; docker-registry and an S3 server are the caches. The tiny example
is built without questions, so that a cell takes a few seconds: what a fleet adds is the point here.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.building.wiring import cache_folder, open_tools
from weightsmith.cache.address import of_nodes
from weightsmith.core.ports import FleetEngine
from weightsmith.fleets import running
from weightsmith.fleets.ordering import foreseen, ordered, run_fleet
from weightsmith.fleets.rows import FleetRows
from weightsmith.outside.fleet_ray import RayFleet
from weightsmith.outside.fleet_slurm import SlurmFleet
from weightsmith.recipe.user_config import RunOptions, read_config

from tests.clusters import Cluster, has_ended
from tests.fakes.fleet_home import ADAPTERS, TARGETS
from tests.fakes.journal import RecordingProgress
from tests.fakes.real_registries import real_registry, start_again, stop_registry
from tests.fakes.s3_server import S3Server
from tests.fakes.started import hear_interrupts
from tests.paths import ROOT

NODE = "tests.fakes.held_node"
PATIENCE = 900.0
pytestmark = [pytest.mark.builders, pytest.mark.timeout(3600)]


class Alone:
    """Each adapter's images, built one by one without a fleet."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self._made: dict[str, Any] = {}

    def digests(
        self, adapters: Sequence[str], targets: Sequence[str] = TARGETS[:1]
    ) -> dict[tuple[str, str], str]:
        for name in adapters:
            if name not in self._made:
                self._made[name] = self._build(name)
        return {
            (name, target): self._made[name][target]["digest"]
            for name in adapters
            for target in targets
        }

    def _build(self, name: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "weightsmith", "build", "--recipe", self.home / "recipe.yaml",
             "--set", f"name=tiny-capitals-{name}", "--set", f"image.repository=tiny-{name}",
             "--set", f"adapters=[{{source: ./adapters/{name}}}]", "--dist", self.folder / "dist",
             "--runner", "local", "--json"],
            cwd=self.home, check=False, capture_output=True, text=True,
            env={**os.environ, "WEIGHTSMITH_STORE": str(self.folder / "store")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["targets"]


@pytest.fixture(scope="module")
def alone(fleet_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp("alone")
    yield Alone(fleet_home, folder)
    shutil.rmtree(folder)


class Caches:
    """A docker-registry, where images go too, and an S3 server."""

    def __init__(self, folder: Path, host: str, s3: S3Server) -> None:
        self.folder, self.host, self.s3 = folder, host, s3

    def address(self, cluster: Cluster) -> str:
        """Return the cache of a cluster's tests; Slurm passes on the variables of S3's clients."""
        name = self.folder.name
        if cluster.kind == "ray":
            return f"oci://{self.host}/{name}/cache"
        return f"s3://cache/{name}"

    def stop(self, cluster: Cluster) -> None:
        if cluster.kind == "ray":
            stop_registry(self.host)
        else:
            self.s3.stop()

    def start(self, cluster: Cluster) -> None:
        if cluster.kind == "ray":
            start_again(self.host, self.folder)
        else:
            self.s3.start()


@pytest.fixture
def caches(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Caches]:
    folder = tmp_path_factory.mktemp("caches")
    s3 = S3Server()
    s3.start()
    for name, value in s3.variables("cache").items():
        monkeypatch.setenv(name, value)
    try:
        with real_registry(folder) as host:
            yield Caches(folder, host, s3)
    finally:
        s3.stop()


class Running:
    """A fleet that runs in a thread."""

    def __init__(self, cluster: Cluster, caches: Caches, home: Path, folder: Path) -> None:
        self.cluster, self.home, self.folder = cluster, home, folder
        self.cache = caches.address(cluster)
        self.repository = f"{caches.host}/team/tiny"
        self.progress = RecordingProgress()
        self._rows: list[FleetRows] = []
        self._thread: threading.Thread | None = None

    def begin(self, *adapters: Any, targets: tuple[str, ...] = TARGETS[:1]) -> None:
        path = self.home / f"fleet-{self.folder.name}.yaml"
        fleet = {"adapters": [*adapters], "targets": [*targets]}
        path.write_text(yaml.safe_dump(fleet))
        self._thread = threading.Thread(target=self._run, args=(path,))
        self._thread.start()

    def rows(self) -> FleetRows:
        """Wait for the end, and return what became of every cell."""
        assert self._thread is not None
        self._thread.join(PATIENCE)
        assert self._rows, "the fleet has failed"
        return self._rows[0]

    def until(self, there: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not there():
            assert self._thread is not None
            assert self._thread.is_alive(), "the fleet has ended"
            assert time.monotonic() < end
            time.sleep(0.1)

    def _engine(self) -> FleetEngine:
        if self.cluster.kind == "ray":
            return RayFleet(module=NODE, address=os.environ["WEIGHTSMITH_TEST_RAY"])
        return SlurmFleet(argv=(sys.executable, "-m", NODE), folder=self.folder / "dist" / "jobs")

    def _run(self, path: Path) -> None:
        dist = self.folder / "dist"
        found = ordered(path, settings=(f"image.repository={self.repository}",))
        run = RunOptions(runner="local", cache=self.cache)
        nodes = of_nodes(self.cluster.kind, run, read_config().cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WEIGHTSMITH_STORE", str(self.folder / "store"))
            with open_tools(run, self.progress) as tools:
                rows = run_fleet(
                    found, foreseen(found, dist, tools), self._engine(), tools, dist=dist,
                    outputs={"push": True}, options=nodes, cpus=0,
                    changed=lambda _: None,
                )  # fmt: skip
        self._rows.append(rows)


@pytest.fixture
def fleet(cluster: Cluster, caches: Caches, fleet_home: Path, tmp_path: Path) -> Running:
    return Running(cluster, caches, fleet_home, tmp_path)


def digests(rows: FleetRows) -> dict[tuple[str, str], str | None]:
    return {(row.adapter, row.target): row.digest for row in rows.cells}


def test_cells_have_the_digests_of_builds_one_by_one(fleet: Running, alone: Alone) -> None:
    names, targets = ADAPTERS[:1], TARGETS[1:]  # `--file` on the page below has more adapters
    every = [f"./adapters/{name}" for name in names]
    fleet.begin(*every, {"source": "./broken", "targets": [*targets[:1]]}, targets=targets)
    rows = fleet.rows()

    made = digests(rows)
    broken = made.pop(("broken", targets[0]))
    assert made == alone.digests(names, targets)
    assert broken is None
    (refused,) = (row for row in rows.cells if row.adapter == "broken")
    assert (refused.verdict, refused.exit_code, refused.tries) == ("refused", 3, 1)
    assert "NaN" in (refused.error or "")
    assert rows.stages["merge"]["run"] == len(names)  # once for all targets
    assert rows.bytes_moved > 0
    assert all(Path(row.report).is_file() for row in rows.cells if row.digest)


@pytest.mark.full
def test_a_node_that_is_lost_costs_no_cell(fleet: Running, alone: Alone) -> None:
    """While it merges under Slurm, and while it pushes on Ray: both matter, but not on which."""
    cluster = fleet.cluster
    where = {"ray": "push", "slurm": "merge"}[cluster.kind]
    (cluster.folder / "hold").write_text(f"2 {where}")
    fleet.begin("./adapters/[ab]")
    fleet.until((cluster.folder / "held").exists)
    held = int((cluster.folder / "held").read_text())
    cluster.lose()
    assert has_ended(held)

    assert digests(fleet.rows()) == alone.digests("ab")


@pytest.mark.full
def test_a_cache_that_stops_and_starts_again_costs_no_cell(
    fleet: Running, caches: Caches, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_PAUSES", (3.0, 20.0))
    cluster = fleet.cluster
    (cluster.folder / "hold").write_text("any merge")
    fleet.begin("./adapters/[abc]")
    fleet.until((cluster.folder / "held").exists)
    caches.stop(cluster)
    (cluster.folder / "go").touch()
    fleet.until(lambda: any("tried again" in text for text in fleet.progress.warnings))
    caches.start(cluster)

    assert digests(fleet.rows()) == alone.digests("abc")


class Terminal:
    """`fleet --watch` as a user runs it, whose nodes share the folders of this machine."""

    def __init__(self, cluster: Cluster, home: Path, folder: Path, *adapters: str) -> None:
        self.dist, self.said = folder / "dist", b""
        path = home / f"terminal-{folder.name}.yaml"
        fleet = {"adapters": [f"./adapters/{name}" for name in adapters]}
        path.write_text(yaml.safe_dump({**fleet, "targets": [*TARGETS[:1]]}))
        words = ["--file", path, "--on", cluster.kind, "--cache", folder / "cache", "--dist",
                 self.dist, "--runner", "local", "--watch", "--json"]  # fmt: skip
        if cluster.kind == "ray":
            words += ["--address", os.environ["WEIGHTSMITH_TEST_RAY"]]
        self._out = folder / "out.json"
        self._ours, theirs = pty.openpty()
        with self._out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.held_node", "fleet", *words],
                stdin=subprocess.DEVNULL, stdout=out, stderr=theirs, cwd=ROOT,
                env={**os.environ, "WEIGHTSMITH_STORE": str(folder / "store"), "TERM": "xterm",
                     "COLUMNS": "160"},
                preexec_fn=hear_interrupts,
            )  # fmt: skip
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # how a terminal ends
            while chunk := os.read(self._ours, 4096):
                self.said += chunk

    def until(self, there: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not there():
            assert self.process.poll() is None, self.said.decode()[-2000:]
            assert time.monotonic() < end, self.said.decode()[-2000:]
            time.sleep(0.1)

    def end(self) -> tuple[int, Any]:
        """Wait for the end; return the exit code and what --json says."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        os.close(self._ours)
        return code, json.loads(self._out.read_text() or "null")

    def rows(self) -> list[Any]:
        """What the fleet's file says of its cells so far."""
        with suppress(OSError, ValueError):
            return list(json.loads((self.dist / "fleet.json").read_text())["cells"])
        return []


def has_work(cluster: Cluster) -> bool:
    """Return whether the cluster still has a task; Ray forgets those of a process that left it."""
    if cluster.kind == "ray":
        return False
    asked = ["squeue", "--noheader"]
    return bool(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())


@pytest.mark.full
def test_ctrl_c_ends_what_runs_and_the_next_run_does_what_is_missing(
    cluster: Cluster, fleet_home: Path, tmp_path: Path
) -> None:
    (cluster.folder / "hold").write_text("2 merge")
    first = Terminal(cluster, fleet_home, tmp_path, "a", "b")
    first.until((cluster.folder / "held").exists)
    first.until(lambda: [row for row in first.rows() if row["digest"]])
    held = int((cluster.folder / "held").read_text())
    first.until(lambda: b"cells a minute" in first.said and b" left" in first.said)
    first.process.send_signal(signal.SIGINT)
    code, _ = first.end()

    assert code == 130, first.said.decode()[-2000:]
    end = time.monotonic() + PATIENCE
    while not has_ended(held) or has_work(cluster):  # they have some seconds to clean up
        assert time.monotonic() < end
        time.sleep(0.1)

    second = Terminal(cluster, fleet_home, tmp_path, "a", "b")
    code, told = second.end()
    assert code == 0, second.said.decode()[-2000:]
    assert sorted(row["cached"] for row in told["cells"]) == [False, True]
    assert told["stages"]["merge"]["run"] == 1
    assert b"2 of 2 cells" in second.said


@pytest.mark.full
def test_a_cell_that_no_node_can_make_ends_with_5(
    cluster: Cluster, fleet_home: Path, tmp_path: Path
) -> None:
    for place in cluster.stores:
        place.write_text("no folder")
    terminal = Terminal(cluster, fleet_home, tmp_path, "a")
    try:
        code, told = terminal.end()
    finally:
        for place in cluster.stores:
            place.unlink()

    assert code == 5
    (cell,) = told["cells"]
    assert (cell["verdict"], cell["exit_code"], cell["tries"]) == ("not made", 5, 3)
    said = terminal.said.decode() + cell["error"]
    assert all(str(place) in said for place in cluster.stores)  # it was tried on both nodes


PAGE = ROOT / "docs" / "how-to" / "build-a-fleet.md"
# `ray stop` ends every Ray process that it sees, and another test's cluster may have the port: so
# the commands see their own processes alone, and have a loopback of their own.
ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "bash", "-c")
BEFORE = "set -euo pipefail\nip link set lo up\n"
AFTER = "\nif pgrep -l 'raylet|gcs_server'; then echo 'Ray still runs'; exit 9; fi\n"


def commands() -> str:
    """Return the page's block that starts a cluster."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if "ray start" in block)
    return str(found)


@pytest.mark.ray
@pytest.mark.root
@pytest.mark.full
@pytest.mark.skipif(
    not (shutil.which("unshare") and shutil.which("ip")), reason="no unshare or no ip"
)
def test_six_images_come_out_of_two_nodes(tmp_path: Path) -> None:
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    for folder in (checkout, home):
        folder.mkdir()
    for name in ("examples", "tasks.py", "toolchain"):
        (checkout / name).symlink_to(ROOT / name)
    script = commands()
    # A short path: names of sockets have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="wf-", dir="/tmp") as sockets:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'tests/without'}:{ROOT / 'toolchain'}:{ROOT}",
            "HOME": str(home),
            "WEIGHTSMITH_HOME": str(cache_folder()),  # the builders that are made
            "WEIGHTSMITH_STORE": str(tmp_path / "store"),
            "DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock",
            "RAY_TMPDIR": sockets,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        done = subprocess.run(
            [*ALONE, BEFORE + script + AFTER],
            cwd=checkout, env=environment, check=False, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]

    cells = json.loads((checkout / "dist" / "fleet.json").read_text())["cells"]
    assert len({cell["digest"] for cell in cells if cell["digest"]}) == 6
    assert {cell["verdict"] for cell in cells} <= {"passed", "not proven"}
    assert (home / "fleet-cache" / "entries").is_dir()
