"""A job that says how its builder confines it, and a copy of the package that has it.

The product has no such job. Runners under test start a worker from the copy, of which this file is
the module `weightsmith.worker.echo`.
"""

import atexit
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from weightsmith.core import jobs
from weightsmith.core.errors import from_code
from weightsmith.core.jobs import Input
from weightsmith.outside.sandbox_probe import attempts
from weightsmith.worker import jobs as worker
from weightsmith.worker.wire import note


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoJob(jobs.Job):
    """Copy a text, and report how the builder confines the job."""

    kind = "echo"
    text: Input
    sleep: float = 0.0
    fail: int | None = None
    """Raise the error of this exit code."""
    crash: str | None = None
    """Raise an unexpected error."""
    fill: int = 0
    """Bytes of memory to use."""
    try_to_write: tuple[str, ...] = ()
    targets: Mapping[str, Any] = field(default_factory=dict)
    """Addresses and paths to probe, for `drivers.sandbox_probe.attempts`."""


def _echo(job: EchoJob, report: Any) -> Mapping[str, Any]:
    if job.fail is not None:
        raise from_code(job.fail, "asked to fail", "ask for something else")
    if job.crash is not None:
        raise ValueError(job.crash)
    held = b"x" * job.fill
    print(f"printed by the stage, which holds {len(held)} bytes")  # noqa: T201
    note("echo begins")
    time.sleep(job.sleep)
    text = job.text.path.read_text("utf-8")
    (job.output / "echo.txt").write_text(text, encoding="utf-8")
    report(1, 1, "items")
    return {
        "text": text,
        "uid": os.getuid(),
        "network": _network_reachable(),
        "writable": [path for path in job.try_to_write if _writable(Path(path))],
        "reached": attempts(dict(job.targets)) if job.targets else {},
        "input_writable": _writable(job.text.path.parent / "intruder"),
        "secrets": sorted(
            n for n in os.environ if n.endswith(("TOKEN", "PASSWORD", "SECRET", "KEY"))
        ),
    }


def _network_reachable() -> bool:
    # Connecting a datagram socket sends nothing; it fails where there is no route.
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
    except OSError:
        return False
    return True


def _writable(path: Path) -> bool:
    try:
        path.touch()
        path.unlink()
    except OSError:
        return False
    return True


kinds: Any = jobs._KINDS
kinds[EchoJob.kind] = EchoJob
stages: Any = worker.STAGES
stages[EchoJob.kind] = _echo


@cache
def package() -> Path:
    """Return a copy of the package whose workers know the job."""
    from weightsmith.core.resources import package as own

    folder = Path(tempfile.mkdtemp(prefix="echo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = folder / "weightsmith"
    shutil.copytree(own(), made, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(__file__, made / "worker" / "echo.py")
    with (made / "worker" / "jobs.py").open("a") as file:
        file.write("\n\nimport weightsmith.worker.echo\n")
    return made


def let_runners_start_it() -> None:
    from weightsmith.outside import docker_containers, local

    docker_containers.package = local.package = package  # type: ignore[attr-defined]
