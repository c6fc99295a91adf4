"""The Ray and Slurm clusters of the tests: tests/clusters.sh starts them once for a session."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

SCRIPT = Path(__file__).with_name("clusters.sh")


def has_ray() -> bool:
    """Say whether Ray is installed."""
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
