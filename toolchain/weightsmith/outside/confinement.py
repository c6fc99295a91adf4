"""Finds the strongest sandbox that this machine supports, and configures it for jobs."""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.models.folder import scan
from weightsmith.outside import process
from weightsmith.outside.job_sandbox import LEVELS, NONE, JobSandbox
from weightsmith.outside.permissions import leads_out

_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/nix/store", "/gnu/store", "/run/opengl-driver"),
)
"""Folders of system libraries and programs."""
_FACTS = (
    *("/proc", "/sys/devices", "/sys/class", "/sys/bus", "/sys/dev", "/sys/module"),
    *("/sys/fs/cgroup", "/sys/kernel/mm", "/dev/fd"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf"),
    *("/etc/localtime", "/etc/timezone", "/etc/os-release", "/etc/debian_version"),
    *("/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf", "/etc/crypto-policies"),
    *("/etc/alternatives", "/etc/mime.types", "/etc/OpenCL", "/etc/nvidia"),
)
"""Files that libraries read to learn about the machine."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_PROBE = Path(__file__).with_name("sandbox_probe.py")
_PROBE_SECONDS = 120
_WORDS = {
    "network": "the network",
    "sockets": "the sockets of other programs",
    "files": "the user's other files",
    "processes": "other processes' memory and variables",
    "modes": "the modes of the user's files",
    "keys": "the user's keys in the kernel",
    "signals": "signals to other processes",
    "names": "the list of processes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """The sandbox of jobs on this machine, and what a probe inside it could still reach."""

    namespaces: str = NONE
    filtered: bool = False
    reached: frozenset[str] = frozenset(_WORDS)
    """What a job could still do: keys of the probe's answer."""

    @property
    def network(self) -> bool:
        """Say whether jobs have no network here."""
        return "network" not in self.reached

    def left(self) -> str:
        """List for people what jobs can reach; '' for nothing."""
        return ", ".join(word for key, word in _WORDS.items() if key in self.reached)

    def blocked(self) -> str:
        """List for people what jobs cannot reach."""
        return ", ".join(word for key, word in _WORDS.items() if key not in self.reached)


@functools.cache
def confinement() -> Confinement:
    """Return the strongest sandbox here; found once, by trying to break out of each."""
    for namespaces in LEVELS:
        for filtered in (True, False):
            wanted = Confinement(namespaces=namespaces, filtered=filtered)
            reached = _reached(wanted)
            if reached is not None:
                return replace(wanted, reached=reached)
    return Confinement()


def job_sandbox(
    found: Confinement,
    *,
    run: Iterable[Path],
    read: Iterable[Path],
    write: Iterable[Path],
    inputs: Iterable[Path] = (),
    gpu: bool = False,
    sockets: bool = False,
    shared_bytes: int = 0,
) -> JobSandbox:
    """Return a job's sandbox: it can use the system's libraries and these paths.

    Of `inputs` also the targets of links. `sockets` is for users who allow network in jobs.
    """
    behind = (path for place in inputs for path in _with_links(place))
    return JobSandbox(
        namespaces=found.namespaces,
        filtered=found.filtered,
        sockets=sockets,
        run=(*_SYSTEM, *map(str, run)),
        read=tuple(map(str, (*_FACTS, *read, *behind))),
        write=tuple(map(str, write)),
        use=(*_DEVICES, *(_gpus() if gpu else ())),
        shared_bytes=shared_bytes,
    )


def interpreter(python: Path) -> tuple[Path, ...]:
    """Return the folders of the Python that an environment's `python` links to."""
    prefix = python.resolve().parent.parent
    return tuple(prefix / name for name in ("bin", "lib", "lib64", "include", "ssl", "etc/ssl"))


def _with_links(place: Path) -> Iterator[Path]:
    """Yield a path and the targets of its links: models in the hub's cache are links to blobs."""
    yield place
    real = place.resolve()
    if real.is_dir() and leads_out(real):
        # Links are followed only by the rules for model folders.
        yield from ((real / name).resolve() for name in scan(real))


_GPUS = ("nvidia*", "nvhost*", "nvmap", "nvgpu", "dxg", "dri")
"""GPU devices: of servers, Jetson boards, WSL, and render nodes."""


def _gpus() -> list[str]:
    named = (path for pattern in _GPUS for path in Path("/dev").glob(pattern))
    return [str(path) for path in named]


def _reached(wanted: Confinement) -> frozenset[str] | None:
    """Return what a program in this sandbox reached; None if the sandbox cannot be set up."""
    python = Path(getattr(sys, "_base_executable", sys.executable))
    with targets() as outside, tempfile.TemporaryDirectory() as folder:
        sandbox = job_sandbox(wanted, run=interpreter(python), read=[_PROBE], write=[Path(folder)])
        done = process.run(
            [python, "-I", "-S", _PROBE, json.dumps(outside)],
            cwd=Path(folder),
            env=process.scrubbed(),
            timeout=_PROBE_SECONDS,
            limits=process.ResourceLimits(sandbox=sandbox),
        )
    if done.returncode != 0:
        return None
    answers = json.loads(done.tail[-1])
    return frozenset(key for key in _WORDS if answers[key])


@contextmanager
def targets() -> Iterator[dict[str, object]]:
    """Create the probe's targets: listeners, and a file in a folder of the user's."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file, path, abstract = folder / "file", folder / "socket", secrets.token_hex(8)
        file.write_text("the user's")
        listeners = (
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, str(path)),
            (socket.AF_UNIX, f"\0{abstract}"),
        )
        made = []
        for family, address in listeners:
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen()
            made.append(listener)
        yield {
            "port": made[0].getsockname()[1],
            "socket": str(path),
            "abstract": abstract,
            "file": str(file),
            "process": os.getpid(),
        }
