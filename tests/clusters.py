"""The Ray and Slurm clusters of the tests: tests/clusters.sh starts them once for a session."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

SCRIPT = Path(__file__).with_name("clusters.sh")
FOLDER = "WEIGHTSMITH_TEST_CLUSTERS_FOLDER"


def has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


def has_slurm() -> bool:
    """Say whether Slurm is installed, or can be."""
    return os.geteuid() == 0 and bool(shutil.which("slurmctld") or shutil.which("apt-get"))


@contextmanager
def clusters(which: str) -> Iterator[Mapping[str, str]]:
    """Yield the variables by which a test finds the nodes; both are stopped afterwards."""
    if which == "ray" and "WEIGHTSMITH_TEST_RAY" in os.environ:  # one that runs already
        yield os.environ
        return
    # A short path: names of sockets have at most 107 characters.
    folder = mkdtemp(prefix="wf-", dir="/tmp")
    environment = {**os.environ, "PYTHON": sys.executable, "WEIGHTSMITH_TEST_CLUSTERS": which}
    try:
        subprocess.run(["bash", SCRIPT, "start", folder], env=environment, check=True)
        said = subprocess.run(
            ["bash", SCRIPT, "env", folder], env=environment, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        lines = (line.removeprefix("export ") for line in said.stdout.splitlines())
        yield dict(line.partition("=")[::2] for line in lines)
    finally:
        subprocess.run(["bash", SCRIPT, "stop", folder], env=environment, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Cluster:
    """One of the clusters, whose second node can be lost and come back."""

    kind: str
    """`ray` or `slurm`."""
    folder: Path

    @property
    def stores(self) -> list[Path]:
        """The folders of both nodes' results."""
        names = ("1", "2") if self.kind == "ray" else ("n1", "n2")
        return [self.folder / f"store-{name}" for name in names]

    def clean(self) -> None:
        """Delete what an earlier test left."""
        for name in ("hold", "taken", "held", "go"):
            (self.folder / name).unlink(missing_ok=True)
        for store in self.stores:
            shutil.rmtree(store, ignore_errors=True)

    def lose(self) -> None:
        """Kill the second node with all that runs on it, as a power cut would."""
        killed = set[int]()
        # One that dies has no variables any more, and still runs for a moment.
        while (found := self._processes()) or not all(map(has_ended, killed)):
            killed.update(found)
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def revive(self) -> None:
        """Start the second node again, if it is not there."""
        if not self._processes():
            environment = {**os.environ, "PYTHON": sys.executable}
            subprocess.run(
                ["bash", SCRIPT, f"revive-{self.kind}", self.folder], env=environment, check=True
            )

    def _processes(self) -> list[int]:
        if self.kind == "ray":
            return _with_variable(f"WEIGHTSMITH_STORE={self.folder}/store-2")
        found = _with_variable("SLURMD_NODENAME=n2")
        steps = [pid for pid in map(_parent, found) if "slurmstepd" in _name(pid)]
        with suppress(OSError, ValueError):
            daemon = int((self.folder / "slurm" / "slurmd-n2.pid").read_text())
            found += [daemon] if "slurmd" in _name(daemon) else []
        return [*found, *steps]


def has_ended(pid: int) -> bool:
    """Return whether a process runs no more; nobody may have asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _with_variable(text: str) -> list[int]:
    """Return the processes that were started with a variable; those that have ended have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if text.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""
