"""Finds the strongest sandbox that this machine supports, and configures it for jobs."""

from __future__ import annotations

import functools
import itertools
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
from weightsmith.outside.ownership import leads_out

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
_GPUS = ("nvidia*", "nvhost*", "nvmap", "nvgpu", "dxg", "dri")
"""GPU devices: of servers, Jetson boards, WSL, and render nodes."""
_PROBE = Path(__file__).with_name("sandbox_probe.py")
_PROBE_SECONDS = 120
_LONGEST_ADDRESS = 107
"""Bytes of a socket's path, see unix(7)."""
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
    python = Path(getattr(sys, "_base_executable", sys.executable))
    for namespaces, filtered in itertools.product(LEVELS, (True, False)):
        wanted = Confinement(namespaces=namespaces, filtered=filtered)
        with targets() as outside, tempfile.TemporaryDirectory() as folder:
            done = process.run(
                [python, "-I", "-S", _PROBE, json.dumps(outside)],
                cwd=Path(folder),
                env=process.scrubbed(),
                timeout=_PROBE_SECONDS,
                limits=process.ResourceLimits(
                    sandbox=job_sandbox(
                        wanted, run=interpreter(python), read=[_PROBE], write=[Path(folder)]
                    )
                ),
            )
        if done.returncode == 0:  # else it cannot be set up
            answers = json.loads(done.tail[-1])
            return replace(wanted, reached=frozenset(key for key in _WORDS if answers[key]))
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

    Of `inputs` also the targets of links: models in the hub's cache are links to blobs. `sockets`
    is for users who allow network in jobs.
    """
    behind = []
    for place in inputs:
        real = place.resolve()
        behind.append(place)
        if real.is_dir() and leads_out(real):
            # Links are followed only by the rules for model folders.
            behind += [(real / name).resolve() for name in scan(real)]
    gpus = [path for pattern in _GPUS for path in Path("/dev").glob(pattern)] if gpu else []
    return JobSandbox(
        namespaces=found.namespaces,
        filtered=found.filtered,
        sockets=sockets,
        run=(*_SYSTEM, *map(str, run)),
        read=tuple(map(str, (*_FACTS, *read, *behind))),
        write=tuple(map(str, write)),
        use=(*_DEVICES, *map(str, gpus)),
        shared_bytes=shared_bytes,
    )


def interpreter(python: Path) -> tuple[Path, ...]:
    """Return the folders of the Python that an environment's `python` links to."""
    prefix = python.resolve().parent.parent
    return tuple(prefix / name for name in ("bin", "lib", "lib64", "include", "ssl", "etc/ssl"))


@contextmanager
def targets() -> Iterator[dict[str, object]]:
    """Create the probe's targets: listeners, and a file in a folder of the user's."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file, path, abstract = folder / "file", folder / "socket", secrets.token_hex(8)
        file.write_text("the user's")
        internet = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = str(path)
        if len(os.fsencode(address)) > _LONGEST_ADDRESS:
            opened = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, opened)
            address = f"/proc/self/fd/{opened}/{path.name}"
        for name in (address, f"\0{abstract}"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(name)
            listener.listen()
        yield {
            "port": internet.getsockname()[1],
            "socket": str(path),
            "abstract": abstract,
            "file": str(file),
            "process": os.getpid(),
        }
