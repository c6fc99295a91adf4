"""Isolates a job from the rest of the machine, with whatever the kernel offers.

Run by the sandbox launcher, so it uses only the standard library; `JobSandbox` holds the settings.
There are three mechanisms. Namespaces block the network, other processes, and writing to any mount
except the job's own; many machines refuse them to ordinary users. Landlock blocks files, and on
newer kernels signals and abstract sockets. A seccomp filter blocks sockets of every kind. The last
two need no privileges. `confinement.py` finds out by trying what holds on this machine.
"""

from __future__ import annotations

import ctypes
import os
import struct
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
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the kernel's mount, not a temporary file of ours
_KEYS = "/proc/keys"
"""Lists keys of everybody who has the same number."""

ALL, NETWORK, NONE = "all", "network", "none"
"""Namespaces: network, processes and mounts; only the network; none."""
LEVELS = (ALL, NETWORK, NONE)
"""The strongest first."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSandbox:
    """What a program may reach; everything else is blocked as far as the kernel allows."""

    namespaces: str
    """One of LEVELS."""
    filtered: bool
    """Whether system calls are filtered."""
    sockets: bool = False
    """True allows the network and all sockets, for users who ask for that."""
    run: tuple[str, ...] = ()
    """Paths that it may read and execute."""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    """Folders that it may write to."""
    use: tuple[str, ...] = ()
    """Devices."""
    shared_bytes: int = 0
    """Size of its shared memory; 0 for the kernel's default, half of the machine's memory."""


def enter(sandbox: JobSandbox) -> None:
    """Enter the namespaces, as root or inside a new user namespace; raises OSError.

    That of processes begins with the next child.
    """
    if sandbox.namespaces == NONE:
        return
    processes = _NEW_PROCESSES if sandbox.namespaces == ALL else 0
    kinds = _NEW_IPC | processes | (0 if sandbox.sockets else _NEW_NETWORK)
    if _libc.unshare(kinds) == 0:
        return
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_USER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(_libc.unshare(kinds), "unshare")


def furnish(sandbox: JobSandbox) -> None:
    """Arrange the mounts, as the first process of the namespace; raises OSError.

    Every mount becomes read-only except the writable ones, with a new /proc and shared memory. That
    also protects modes and owners of files, which Landlock does not.
    """
    if sandbox.namespaces != ALL:
        return
    _check(_libc.unshare(_NEW_MOUNTS), "unshare")
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    for path in sandbox.write:
        _mount(path, path, None, _BIND | _RECURSIVE)
    _mount("proc", "/proc", "proc", _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS)
    if Path(_KEYS).exists():
        _mount("/dev/null", _KEYS, None, _BIND)
    kept = [*sandbox.write]
    memory = Path(_SHARED_MEMORY)
    if memory.is_dir() and not memory.is_symlink():
        size = f"size={sandbox.shared_bytes}" if sandbox.shared_bytes else None
        _mount("tmpfs", _SHARED_MEMORY, "tmpfs", _NO_SETUID | _NO_DEVICES, size)
        kept.append(_SHARED_MEMORY)
    _set_mount("/", _AND_BELOW, on=_READ_ONLY)
    for path in kept:
        _set_mount(path, 0, off=_READ_ONLY)
    os.chdir(Path.cwd())  # by name: it is a different mount now


def restrict(sandbox: JobSandbox, landlock: ModuleType, seccomp: ModuleType) -> None:
    """Drop privileges, files and system calls, in this order; raises OSError."""
    _check(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    version = landlock.abi()
    _drop_capabilities(landlocked=version > 0)
    if version:
        rules = [(path, landlock.RUN) for path in sandbox.run]
        rules += [(path, landlock.READ) for path in sandbox.read]
        rules += [(path, landlock.WRITE | landlock.RUN) for path in sandbox.write]
        rules += [(path, landlock.USE) for path in sandbox.use]
        if Path(_SHARED_MEMORY).is_dir():
            rules.append((_SHARED_MEMORY, landlock.WRITE))
        landlock.restrict(rules, version, sockets=sandbox.sockets)
    if sandbox.filtered:
        code = seccomp.job_filter(seccomp.machine(), landlock=version, sockets=sandbox.sockets)
        seccomp.install(code)


def _set_mount(path: str, flags: int, *, on: int = 0, off: int = 0) -> None:
    attributes = struct.pack("=QQQQ", on, off, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    result = _libc.syscall(_MOUNT_SETATTR, _HERE, os.fsencode(path), flags, attributes, size)
    _check(result, f"mount_setattr {path}")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    texts = (source, target, kind, options)
    *words, last = (None if text is None else os.fsencode(text) for text in texts)
    _check(_libc.mount(*words, ctypes.c_ulong(flags), last), f"mount {target}")


def _drop_capabilities(*, landlocked: bool) -> None:
    """Drop all capabilities except, for root, reading other users' files: inputs may be such.

    In Docker's and Kubernetes' default containers, root can read them only with a capability that
    also allows writing; it is kept if Landlock limits it.
    """
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "capget")
    low = struct.unpack("=6I", data.raw)[1]
    is_root = os.geteuid() == 0
    kept = low & (1 << _READ_ANY_FILE) if is_root else 0
    if is_root and landlocked and not kept:
        kept = low & (1 << _USE_ANY_FILE)
    for number in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if not kept & (1 << number):
            # Fails without capabilities to drop: then there are none to gain either.
            _libc.prctl(_DROP_BOUNDING, number, 0, 0, 0)
    _libc.prctl(_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    _check(_libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)), "capset")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
