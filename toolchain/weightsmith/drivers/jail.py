"""Keeps a job apart from the rest of the machine, by whatever of the kernel's means there are.

Run by the trampoline, so of the standard library alone; `Jail` is also what it is asked with.
There are three means. Namespaces take away the network, other processes, and the right to write
to any mounted place but the job's own; many machines refuse them to ordinary users. Landlock takes
away files, and on newer kernels signals and abstract sockets. A system call filter takes away
sockets of every kind. The last two need no privilege. What all of it comes to on this machine,
`confinement.py` finds out by trying.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_NEW_MOUNTS, _NEW_IPC, _NEW_USER = 0x0002_0000, 0x0800_0000, 0x1000_0000
_NEW_PROCESSES, _NEW_NETWORK = 0x2000_0000, 0x4000_0000
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x4_0000
_NO_SETUID, _NO_DEVICES, _NO_PROGRAMS = 2, 4, 8
_MOUNT_SETATTR, _READ_ONLY, _HERE, _AND_BELOW = 442, 1, -100, 0x8000
_NO_NEW_PRIVILEGES, _DROP_BOUNDING, _AMBIENT, _CLEAR_ALL = 38, 24, 47, 4
_CAPABILITIES_V3, _USE_ANY_FILE, _READ_ANY_FILE = 0x2008_0522, 1, 2
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the kernel's place, not a temporary file of ours

ALL, NETWORK, NONE = "all", "network", "none"
"""Namespaces: of network, processes and mounts; of the network alone; none."""
LEVELS = (ALL, NETWORK, NONE)
"""The best first."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jail:
    """What a program may reach; everything else is taken away as far as `namespaces` goes."""

    namespaces: str
    """One of LEVELS."""
    filtered: bool
    """System calls are filtered."""
    sockets: bool = False
    """True leaves it the network and all sockets: for the user who asked for that."""
    run: tuple[str, ...] = ()
    """Paths that it may read and run programs of."""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    """Folders that it may do anything in."""
    use: tuple[str, ...] = ()
    """Devices."""


def enter(jail: Jail, parent: int) -> Callable[[], bool] | None:
    """Go into the namespaces; with one of processes, the caller goes on in a child.

    Returns what tells such a child that its parent has gone, else None. Raises OSError.
    """
    if jail.namespaces == NONE:
        return None
    kinds = _NEW_IPC | (0 if jail.sockets else _NEW_NETWORK)
    if jail.namespaces == ALL:
        kinds |= _NEW_PROCESSES | _NEW_MOUNTS
    _unshare(kinds)
    if jail.namespaces != ALL:
        return None
    gone = _fork(parent)
    _arrange_mounts(jail.write)
    return gone


def restrict(jail: Jail, landlock: ModuleType, filters: ModuleType) -> None:
    """Give up privileges, files and system calls, in this order; raises OSError."""
    _check(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    version = landlock.abi()
    _drop_capabilities(landlocked=version > 0)
    if version:
        rules = [(path, landlock.RUN) for path in jail.run]
        rules += [(path, landlock.READ) for path in jail.read]
        rules += [(path, landlock.WRITE | landlock.RUN) for path in jail.write]
        rules += [(path, landlock.USE) for path in jail.use]
        if Path(_SHARED_MEMORY).is_dir():
            rules.append((_SHARED_MEMORY, landlock.WRITE))
        landlock.restrict(rules, version, sockets=jail.sockets)
    if jail.filtered:
        code = filters.job_filter(filters.machine(), landlock=version, sockets=jail.sockets)
        filters.install(code)


def _unshare(kinds: int) -> None:
    """Leave the parent's namespaces, by root's right or inside a user namespace of our own."""
    if _libc.unshare(kinds) == 0:
        return
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_USER), "unshare")
    maps = (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    )
    for name, text in maps:
        Path("/proc/self", name).write_text(text)
    _check(_libc.unshare(kinds), "unshare")


def _fork(parent: int) -> Callable[[], bool]:
    """Go on as the first process of the new namespace; the old one ends as that one does."""
    reading, writing = os.pipe()
    inner = os.fork()
    if inner != 0:
        os.close(reading)
        _wait(inner, parent)
    os.close(writing)

    def gone() -> bool:
        # Its number cannot be seen from here, but its end of the pipe is closed when it ends.
        ended = bool(select.select([reading], [], [], 0)[0])
        os.close(reading)
        return ended

    return gone


def _wait(inner: int, parent: int) -> None:
    """Be killed with our own parent, and end the way the inner process does."""
    _check(_libc.prctl(1, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os._exit(1)
    _, status = os.waitpid(inner, 0)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _arrange_mounts(writable: Sequence[str]) -> None:
    """Make every mounted place read-only but the given ones, with its own /proc and shared memory.

    Modes and owners of files, which Landlock does not guard, are guarded by that.
    """
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    for path in writable:
        _mount(path, path, None, _BIND | _RECURSIVE)
    _mount("proc", "/proc", "proc", _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS)
    kept = [*writable]
    memory = Path(_SHARED_MEMORY)
    if memory.is_dir() and not memory.is_symlink():
        _mount("tmpfs", _SHARED_MEMORY, "tmpfs", _NO_SETUID | _NO_DEVICES)
        kept.append(_SHARED_MEMORY)
    _set_mount("/", _AND_BELOW, on=_READ_ONLY)
    for path in kept:
        _set_mount(path, 0, off=_READ_ONLY)
    os.chdir(Path.cwd())  # by its name: it is another mount now


def _set_mount(path: str, flags: int, *, on: int = 0, off: int = 0) -> None:
    attributes = struct.pack("=QQQQ", on, off, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    result = _libc.syscall(_MOUNT_SETATTR, _HERE, os.fsencode(path), flags, attributes, size)
    _check(result, f"mount_setattr {path}")


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    _check(_libc.mount(*words, ctypes.c_ulong(flags), None), f"mount {target}")


def _drop_capabilities(*, landlocked: bool) -> None:
    """Keep none but, for root, the right to read what is somebody else's: inputs may be.

    In a container of Docker's or Kubernetes' default, root has that right only together with the
    right to write; it is kept where Landlock bounds it.
    """
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "capget")
    low = struct.unpack("=6I", data.raw)[1]
    is_root = os.geteuid() == 0
    kept = low & (1 << _READ_ANY_FILE) if is_root else 0
    if is_root and landlocked and not kept:
        kept = low & (1 << _USE_ANY_FILE)
    for number in _capabilities():
        if not kept & (1 << number):
            # Refused to those who have none to give: then there is none to gain either.
            _libc.prctl(_DROP_BOUNDING, number, 0, 0, 0)
    _libc.prctl(_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    _check(_libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)), "capset")


def _capabilities() -> Iterator[int]:
    yield from range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
