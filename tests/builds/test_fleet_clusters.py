"""Fleets on real clusters of two nodes: images, digests, refusals, lost nodes, a cache that stops.

Two Ray nodes and two Slurm nodes; docker-registry and an S3 server are the caches. The tiny example
is built without questions, so that a cell takes a few seconds: what a fleet adds is the point here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.drivers.fleet_ray import RayFleet
from weightsmith.drivers.fleet_slurm import SlurmFleet
from weightsmith.fleets import running
from weightsmith.fleets.ordering import foreseen, ordered, run_fleet
from weightsmith.fleets.rows import FleetRows
from weightsmith.ports import FleetEngine
from weightsmith.run_options import RunOptions
from weightsmith.sharing.address import of_nodes
from weightsmith.user_config import read_config
from weightsmith.wiring import open_tools

from tests.clusters import Cluster, has_ended
from tests.fakes.debian_registry import real_registry, start_again, stop_registry
from tests.fakes.fleet_home import ADAPTERS, TARGETS
from tests.fakes.journal import RecordingProgress
from tests.fakes.s3_server import S3Server

NODE = "tests.fakes.held_node"
PATIENCE = 900.0
pytestmark = [pytest.mark.builders, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def alone(
    fleet_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[tuple[str, str], str]:
    """The digests of each adapter's images, built one by one without a fleet."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for name in ADAPTERS:
        done = subprocess.run(
            [sys.executable, "-m", "weightsmith", "build", "--recipe", fleet_home / "recipe.yaml",
             "--set", f"name=tiny-capitals-{name}", "--set", f"image.repository=tiny-{name}",
             "--set", f"adapters=[{{source: ./adapters/{name}}}]", "--dist", folder / "dist",
             "--runner", "local", "--json"],
            cwd=fleet_home, check=False, capture_output=True, text=True,
            env={**os.environ, "WEIGHTSMITH_STORE": str(folder / "store")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)["targets"]
        found |= {(name, target): told[target]["digest"] for target in TARGETS}
        shutil.rmtree(folder / "dist")
    shutil.rmtree(folder / "store")
    return found


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


def test_twelve_cells_have_the_digests_of_builds_one_by_one(
    fleet: Running, alone: Mapping[tuple[str, str], str]
) -> None:
    fleet.begin("./adapters/*", {"source": "./broken", "targets": [*TARGETS[:1]]}, targets=TARGETS)
    rows = fleet.rows()

    made = digests(rows)
    broken = made.pop(("broken", TARGETS[0]))
    assert made == alone
    assert broken is None
    (refused,) = (row for row in rows.cells if row.adapter == "broken")
    assert (refused.verdict, refused.exit_code, refused.tries) == ("refused", 3, 1)
    assert "NaN" in (refused.error or "")
    assert rows.stages["merge"]["run"] == len(ADAPTERS)  # once for three targets
    assert rows.bytes_moved > 0
    assert all(Path(row.report).is_file() for row in rows.cells if row.digest)


@pytest.mark.parametrize("where", ["merge", "push"])
def test_a_node_that_is_lost_costs_no_cell(
    fleet: Running, alone: Mapping[tuple[str, str], str], where: str
) -> None:
    cluster = fleet.cluster
    (cluster.folder / "hold").write_text(f"2 {where}")
    fleet.begin("./adapters/[ab]")
    fleet.until((cluster.folder / "held").exists)
    held = int((cluster.folder / "held").read_text())
    cluster.lose()
    assert has_ended(held)

    assert digests(fleet.rows()) == {
        (name, TARGETS[0]): alone[name, TARGETS[0]] for name in ("a", "b")
    }


def test_a_cache_that_stops_and_starts_again_costs_no_cell(
    fleet: Running,
    caches: Caches,
    alone: Mapping[tuple[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
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

    assert digests(fleet.rows()) == {
        (name, TARGETS[0]): alone[name, TARGETS[0]] for name in ("a", "b", "c")
    }
