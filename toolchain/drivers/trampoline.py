"""Becomes another program after putting this process in order: limits, namespaces, user.

Run as a file by `process.py`, never imported: `python -I -S trampoline.py SETTINGS PROGRAM [ARG…]`
with SETTINGS a JSON object. It stands between so that no Python code has to run in a forked copy
of the (threaded) control plane, and so that the death signal is set last: the kernel forgets it
whenever a process changes its user or gets new capabilities.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW_MOUNTS, NEW_USER, NEW_NETWORK = 0x0002_0000, 0x1000_0000, 0x4000_0000
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x4_0000
READ_ONLY, NO_SETUID, NO_DEVICES, NO_PROGRAMS, REMOUNT = 1, 2, 4, 8, 32
NO_ACCESS_TIMES, RELATIVE_ACCESS_TIMES = 1024, 0x20_0000
SET_DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38
FAILED = 125
"""Exit code for a failure before the program started, as other tools of this kind use it."""

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError for a failed call of the C library."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the parent's namespaces of these kinds."""
    check(_libc.unshare(flags), "unshare")


def bind(source: str, target: Path) -> None:
    """Show `source` at `target` too."""
    flags = BIND | RECURSIVE
    check(_libc.mount(source.encode(), os.fsencode(target), None, flags, None), f"mount {source}")


def map_ids(user: int, group: int) -> None:
    """Call the caller's own user and group by these numbers inside the new user namespace."""
    outside_user, outside_group = os.getuid(), os.getgid()
    unshare(NEW_USER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {outside_user} 1"),
        ("gid_map", f"{group} {outside_group} 1"),
    ):
        Path("/proc/self", name).write_text(text)


def leave_network() -> None:
    """Go where there is no network, by root's right or inside a user namespace of our own."""
    try:
        unshare(NEW_NETWORK)
    except OSError:
        map_ids(os.getuid(), os.getgid())
        unshare(NEW_NETWORK)


def raise_loopback() -> None:
    """Bring up `lo`, which is down in a new network namespace."""
    import fcntl
    import socket
    import struct

    set_flags, up = 0x8914, 1  # SIOCSIFFLAGS, IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", up))


def relay(listening: int, port: int) -> None:
    """Pass connections from outside to a port of the network that we are in, until it ends.

    A socket stays in the network that it was made in: `listening` is the outside's.
    """
    import socket
    import threading

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server may still have something to say
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while chunk := source.recv(65536):
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for each in (source, target):
                each.close()

    def carry(outer: socket.socket) -> None:
        inner = socket.socket()  # create_connection would import a codec for the host's name
        try:
            inner.connect(("127.0.0.1", port))
        except OSError:
            inner.close()
            outer.close()  # it does not listen yet
            return
        back = threading.Thread(target=copy, args=(inner, outer), daemon=True)
        back.start()
        copy(outer, inner)
        back.join()
        for each in (outer, inner):
            each.close()

    listener = socket.socket(fileno=listening)
    while True:
        outer, _ = listener.accept()
        threading.Thread(target=carry, args=(outer,), daemon=True).start()


def start_relay(listening: int, port: int, user: int, group: int) -> None:
    """Leave a relay behind as a child of what we become; it ends with that.

    It runs as the same user: the kernel asks whether the one who dies may kill the other.
    """
    # Imported while their files can still be read: a user of the image may not enter our folders.
    import socket  # noqa: F401
    import threading  # noqa: F401

    parent = os.getpid()
    if os.fork() == 0:
        try:
            if os.getuid() == 0:
                become(user, group)
            die_with_parent(parent)
            relay(listening, port)
        finally:
            os._exit(0)
    os.close(listening)


def enter_root(root: Path, user: int, group: int, workdir: str) -> None:
    """Make `root` the file system, with the host's /dev and /proc in it, as the given user.

    Nothing of it can be written to but /tmp, which is new and in memory; where the kernel does
    not allow that, a line on standard error says so.
    """
    as_root = os.getuid() == 0
    if not as_root:
        map_ids(user, group)
    unshare(NEW_MOUNTS)
    check(_libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None), "mount /")
    bind(str(root), root)
    for name in ("dev", "proc", "sys"):
        target = root / name
        if not target.is_symlink():
            target.mkdir(exist_ok=True)
            bind(f"/{name}", target)
    seal(root)
    os.chroot(root)
    os.chdir(workdir)
    if as_root:
        become(user, group)


def become(user: int, group: int) -> None:
    """Give up root for a user and a group without others."""
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)


def seal(root: Path) -> None:
    """Make a mounted root read-only, with a /tmp of its own."""
    temporary = root / "tmp"
    try:
        if not temporary.is_symlink():
            temporary.mkdir(exist_ok=True)
            flags = NO_SETUID | NO_DEVICES
            where, options = os.fsencode(temporary), b"mode=1777"
            check(_libc.mount(b"tmpfs", where, b"tmpfs", flags, options), "mount /tmp")
        # What the place has already must be said again, or the kernel refuses.
        present = os.statvfs(root).f_flag
        flags = READ_ONLY | (present & (NO_SETUID | NO_DEVICES | NO_PROGRAMS | NO_ACCESS_TIMES))
        flags |= RELATIVE_ACCESS_TIMES if present & getattr(os, "ST_RELATIME", 4096) else 0
        remount = REMOUNT | BIND | flags
        check(_libc.mount(None, os.fsencode(root), None, remount, None), "remount /")
    except OSError as problem:
        os.write(2, f"the root file system stays writable: {problem}\n".encode())


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that started us ends, and at once if it has ended already."""
    check(_libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def prepare(settings: dict[str, Any]) -> None:
    """Apply all settings, the death signal last."""
    if not settings.get("network", True):
        leave_network()
    if settings.get("relay"):
        raise_loopback()
        start_relay(*settings["relay"], *settings["user"])
    if settings.get("root"):
        user, group = settings["user"]
        enter_root(Path(settings["root"]), user, group, settings["workdir"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.get("memory_bytes"):
        # Counts what the process writes to, not the weight files that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (settings["memory_bytes"],) * 2)
    if settings.get("root") or not settings.get("network", True):
        check(_libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    die_with_parent(settings["parent"])


def attempt(what: str, action: Callable[[], object]) -> None:
    """Do it, or say in one line what could not be done and end."""
    try:
        action()
    except OSError as problem:
        os.write(2, f"cannot {what}: {problem}\n".encode())
        os._exit(FAILED)


if __name__ == "__main__":
    program = sys.argv[2:]
    attempt(f"prepare for {program[0]}", lambda: prepare(json.loads(sys.argv[1])))
    attempt(f"start {program[0]}", lambda: os.execvp(program[0], program))  # noqa: S606
