"""Finds out how far this machine lets jobs be kept apart, and makes their jails."""

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

from weightsmith.checkpoints.folder import scan
from weightsmith.drivers import process
from weightsmith.drivers.handover import leads_out
from weightsmith.drivers.jail import LEVELS, NONE, Jail

_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/nix/store", "/gnu/store", "/run/opengl-driver"),
)
"""Where systems keep their libraries and programs."""
_FACTS = (
    *("/proc", "/sys/devices", "/sys/class", "/sys/bus", "/sys/dev", "/sys/module"),
    *("/sys/fs/cgroup", "/sys/kernel/mm", "/dev/fd"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf"),
    *("/etc/localtime", "/etc/timezone", "/etc/os-release", "/etc/debian_version"),
    *("/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf", "/etc/crypto-policies"),
    *("/etc/alternatives", "/etc/mime.types", "/etc/OpenCL", "/etc/nvidia"),
)
"""What libraries ask about the machine."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_PROBE = Path(__file__).with_name("inmate.py")
_PROBE_SECONDS = 120
_WORDS = {
    "network": "the network",
    "sockets": "the sockets of other programs",
    "files": "the user's other files",
    "processes": "other processes' memory and variables",
    "modes": "the modes of the user's files",
    "signals": "signals to other processes",
    "names": "the list of processes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """How jobs are kept apart here, and what was seen from inside to be out of their reach."""

    namespaces: str = NONE
    filtered: bool = False
    reached: frozenset[str] = frozenset(_WORDS)
    """What a job could do all the same: keys of the probe's answer."""

    @property
    def network(self) -> bool:
        """Say whether jobs have no network here."""
        return "network" not in self.reached

    def left(self) -> str:
        """Name for people what jobs can reach; '' where that is nothing."""
        return ", ".join(word for key, word in _WORDS.items() if key in self.reached)

    def taken(self) -> str:
        """Name for people what they cannot."""
        return ", ".join(word for key, word in _WORDS.items() if key not in self.reached)


@functools.cache
def confinement() -> Confinement:
    """Return the best that this machine allows; found out once, by trying to break out."""
    for namespaces in LEVELS:
        for filtered in (True, False):
            wanted = Confinement(namespaces=namespaces, filtered=filtered)
            reached = _reached(wanted)
            if reached is not None:
                return replace(wanted, reached=reached)
    return Confinement()


def job_jail(
    found: Confinement,
    *,
    run: Iterable[Path],
    read: Iterable[Path],
    write: Iterable[Path],
    inputs: Iterable[Path] = (),
    gpu: bool = False,
    sockets: bool = False,
) -> Jail:
    """Return the jail of a job: the system's libraries, and these paths.

    Of `inputs` also what their links lead to. `sockets` is for users who allow jobs the network.
    """
    behind = (path for place in inputs for path in _with_links(place))
    return Jail(
        namespaces=found.namespaces,
        filtered=found.filtered,
        sockets=sockets,
        run=(*_SYSTEM, *map(str, run)),
        read=tuple(map(str, (*_FACTS, *read, *behind))),
        write=tuple(map(str, write)),
        use=(*_DEVICES, *(_gpus() if gpu else ())),
    )


def interpreter(python: Path) -> tuple[Path, ...]:
    """Return the folders of the Python that an environment's `python` is a link to."""
    prefix = python.resolve().parent.parent
    return tuple(prefix / name for name in ("bin", "lib", "lib64", "include", "ssl", "etc/ssl"))


def _with_links(place: Path) -> Iterator[Path]:
    """Yield a path and what its links lead to: models in the hub's cache are links to blobs."""
    yield place
    real = place.resolve()
    if real.is_dir() and leads_out(real):
        # Links are followed by the rules for model folders alone.
        yield from ((real / name).resolve() for name in scan(real))


_GPUS = ("nvidia*", "nvhost*", "nvmap", "nvgpu", "dxg", "dri")
"""Devices of GPUs: of servers, of Jetson boards, of Windows' Linux, and what renders."""


def _gpus() -> list[str]:
    named = (path for pattern in _GPUS for path in Path("/dev").glob(pattern))
    return [str(path) for path in named]


def _reached(wanted: Confinement) -> frozenset[str] | None:
    """Return what a program confined like that reached; None where it cannot be."""
    python = Path(getattr(sys, "_base_executable", sys.executable))
    with targets() as outside, tempfile.TemporaryDirectory() as folder:
        jail = job_jail(wanted, run=interpreter(python), read=[_PROBE], write=[Path(folder)])
        done = process.run(
            [python, "-I", "-S", _PROBE, json.dumps(outside)],
            cwd=Path(folder),
            env=process.scrubbed(),
            timeout=_PROBE_SECONDS,
            limits=process.ResourceLimits(jail=jail),
        )
    if done.returncode != 0:
        return None
    answers = json.loads(done.tail[-1])
    return frozenset(key for key in _WORDS if answers[key])


@contextmanager
def targets() -> Iterator[dict[str, object]]:
    """Make what the probe tries to reach: listeners, and a file in a folder of the user's."""
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
