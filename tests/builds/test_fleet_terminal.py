"""`fleet --watch` on real clusters of two nodes: Ctrl-C, and a cell that no node can make."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters import Cluster, has_ended
from tests.fakes.awake import hear_interrupts
from tests.fakes.fleet_home import TARGETS
from tests.paths import ROOT

PATIENCE = 900.0
pytestmark = [pytest.mark.builders, pytest.mark.full, pytest.mark.timeout(3600)]


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
                [sys.executable, "-m", "tests.fakes.held_fleet", "fleet", *words],
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
