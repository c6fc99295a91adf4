"""Tries, from inside a job's sandbox, what no job may do; prints what succeeded, as JSON.

Run as a file by `confinement.py`: `python -I -S sandbox_probe.py TARGETS` with TARGETS a JSON
object of real targets outside: a listener's `port`, `socket` by path and `abstract` name, a `file`,
and the number of a `process`. Uses only the standard library; workers' `echo` job uses it too.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ELSEWHERE = (
    (socket.AF_INET, ("192.0.2.1", 9)),
    (socket.AF_INET6, ("2001:db8::1", 9)),
)
"""Documentation addresses (RFC 5737, RFC 3849): connecting a datagram socket sends nothing, and
fails without a route."""

_KEYCTL = {"x86_64": 250, "aarch64": 219}
_USER_KEYRING, _WHEN_OPENED = -4, 0x20
_libc = ctypes.CDLL(None, use_errno=True)


def any_succeeds(*attempts: Callable[[], object]) -> bool:
    """Say whether any of them succeeded."""
    for attempt in attempts:
        try:
            attempt()
        except OSError:
            continue
        return True
    return False


def connect(family: int, kind: int, address: str | tuple[str, int]) -> None:
    """Create a socket and connect it; raises OSError."""
    with socket.socket(family, kind) as made:
        made.settimeout(5)
        made.connect(address)


def connect_to_file(path: Path) -> None:
    """Connect to a socket in a folder, from there: its whole path may be longer than an address."""
    os.chdir(path.parent)
    connect(socket.AF_UNIX, socket.SOCK_STREAM, path.name)


def watch(folder: Path) -> None:
    """Ask to be told the names of files in a folder that are used; raises OSError."""
    succeed(_libc.inotify_add_watch(_libc.inotify_init(), os.fsencode(folder), _WHEN_OPENED))


def use_keys() -> None:
    """Ask the kernel for the user's keyring; raises OSError."""
    number = _KEYCTL.get(os.uname().machine)
    if number is not None:  # else nothing keeps it from them either
        succeed(_libc.syscall(number, 0, ctypes.c_int(_USER_KEYRING), 0))


def succeed(result: int) -> None:
    """Raise OSError if a C library call failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def attempts(targets: dict[str, Any]) -> dict[str, bool]:
    """Return which attempts succeeded, by target."""
    port, file, process = targets["port"], Path(targets["file"]), targets["process"]
    other = Path("/proc", str(process))
    tried = {
        "network": any_succeeds(
            lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port)),
            *(lambda f=f, a=a: connect(f, socket.SOCK_DGRAM, a) for f, a in _ELSEWHERE),
            # Leads to the machine that this one runs on, whatever the network namespace.
            lambda: socket.socket(socket.AF_VSOCK).close(),
        ),
        "sockets": any_succeeds(
            lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + targets["abstract"]),
            lambda: connect_to_file(Path(targets["socket"])),
        ),
        "modes": any_succeeds(lambda: file.chmod(0o640)),
        "files": any_succeeds(
            file.read_bytes,
            lambda: list(file.parent.iterdir()),
            lambda: file.write_bytes(b"x"),
            lambda: os.truncate(file, 0),
            lambda: file.with_name("new").touch(),
            file.unlink,
            lambda: watch(file.parent),
        ),
        "keys": any_succeeds(use_keys),
        "processes": any_succeeds(
            *((other / name).read_bytes for name in ("environ", "maps")), (other / "cwd").readlink
        ),
        "signals": any_succeeds(lambda: os.kill(process, signal.SIGCONT)),
        "names": any_succeeds((other / "cmdline").read_bytes),
    }
    # The target outside may be number 1 in a container, as we are in our own namespace.
    itself = ("processes", "signals", "names") if process == os.getpid() else ()
    return tried | dict.fromkeys(itself, False)


if __name__ == "__main__":
    print(json.dumps(attempts(json.loads(sys.argv[1]))))  # noqa: T201
