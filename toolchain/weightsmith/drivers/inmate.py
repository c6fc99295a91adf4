"""Tries, from inside a job's jail, what no job may do; prints what it could, as JSON.

Run as a file by `confinement.py`: `python -I -S inmate.py TARGETS` with TARGETS a JSON object of
real things outside: a listener's `port`, `socket` by path and `abstract` name, a `file`, and the
number of a `process`. Of the standard library alone; the `echo` job of a worker uses it too.
"""

from __future__ import annotations

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
"""Addresses of documentation (RFC 5737, RFC 3849): connecting a datagram socket sends nothing, and
fails where there is no way out."""


def could(*attempts: Callable[[], object]) -> bool:
    """Say whether any of them went through."""
    for attempt in attempts:
        try:
            attempt()
        except OSError:
            continue
        return True
    return False


def connect(family: int, kind: int, address: Any) -> None:
    """Make a socket and connect it; raises OSError."""
    with socket.socket(family, kind) as made:
        made.settimeout(5)
        made.connect(address)


def attempts(targets: dict[str, Any]) -> dict[str, bool]:
    """Return what went through, by what it would have reached."""
    port, file, other = (
        targets["port"],
        Path(targets["file"]),
        Path("/proc", str(targets["process"])),
    )
    unix = (targets["socket"], "\0" + targets["abstract"])
    tried = {
        "network": could(
            lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port)),
            *(lambda f=f, a=a: connect(f, socket.SOCK_DGRAM, a) for f, a in _ELSEWHERE),
        ),
        "sockets": could(
            *(lambda name=name: connect(socket.AF_UNIX, socket.SOCK_STREAM, name) for name in unix)
        ),
        "modes": could(lambda: file.chmod(0o640)),
        "files": could(
            file.read_bytes,
            lambda: list(file.parent.iterdir()),
            lambda: file.write_bytes(b"x"),
            lambda: os.truncate(file, 0),
            lambda: file.with_name("new").touch(),
            file.unlink,
        ),
        "processes": could(
            (other / "environ").read_bytes,
            (other / "maps").read_bytes,
            (other / "cwd").readlink,
        ),
        "signals": could(lambda: os.kill(targets["process"], signal.SIGCONT)),
        "names": could((other / "cmdline").read_bytes),
    }
    # In a container the one outside may be number 1 there, as we are in a namespace of our own.
    itself = ("processes", "signals", "names") if targets["process"] == os.getpid() else ()
    return tried | dict.fromkeys(itself, False)


if __name__ == "__main__":
    print(json.dumps(attempts(json.loads(sys.argv[1]))))  # noqa: T201
