"""Forwards connections into an isolated network, as a child process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable

from weightsmith.outside.sandbox_launcher import die_with_parent

_SET_FLAGS, _UP = 0x8914, 1
"""SIOCSIFFLAGS and IFF_UP, see netdevice(7)."""
_LAST_WORDS = 5.0
"""Seconds for clients to read what a server sent before it ended."""


def raise_loopback() -> None:
    """Bring up `lo`, which is down in a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))


def start_relay(listening: int, port: int, reduce: Callable[[], None]) -> Callable[[], None]:
    """Start a relay as a child of this process, and return what ends it; it ends with this process.

    At its end it first passes on what the server still sent, for a few seconds at most.

    A socket stays in the network namespace it was created in: `listening` is outside, and the relay
    connects to `port` in its own. `reduce` drops its privileges.
    """
    parent, (ending, keep) = os.getpid(), os.pipe()
    relay = os.fork()
    if relay == 0:
        try:
            os.close(keep)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server may still send its reply
            for number in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            reduce()
            die_with_parent(parent)
            _pass_on(listening, port, ending)
        finally:
            os._exit(0)
    os.close(listening)
    os.close(ending)

    def end() -> None:
        os.close(keep)
        os.waitpid(relay, 0)

    return end


def _pass_on(listening: int, port: int, ending: int) -> None:
    """Carry connections until `ending` is closed; then wait for what goes to clients."""
    listener = socket.socket(fileno=listening)
    replies: list[threading.Event] = []
    while listening in select.select([listening, ending], [], [])[0]:
        outer, _ = listener.accept()
        replies = [replied for replied in replies if not replied.is_set()]
        replies.append(threading.Event())
        threading.Thread(target=_carry, args=(outer, port, replies[-1]), daemon=True).start()
    until = time.monotonic() + _LAST_WORDS
    for replied in replies:
        replied.wait(max(0, until - time.monotonic()))


def _carry(outer: socket.socket, port: int, replied: threading.Event) -> None:
    """Carry a connection to its end; `replied` is set once the server sends nothing more."""
    inner = socket.socket()  # create_connection would import the idna codec
    try:
        inner.connect(("127.0.0.1", port))
    except OSError:
        inner.close()
        outer.close()  # the server does not listen yet
        replied.set()
        return

    def reply() -> None:
        _copy(inner, outer)
        replied.set()

    back = threading.Thread(target=reply, daemon=True)
    back.start()
    _copy(outer, inner)
    back.join()
    for each in (outer, inner):
        each.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while chunk := source.recv(65536):
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # `close` does not wake the thread that reads the other way, so the client would wait.
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
