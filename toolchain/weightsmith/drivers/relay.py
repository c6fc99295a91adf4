"""Forwards connections into an isolated network, as a child process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable

from weightsmith.drivers.sandbox_launcher import die_with_parent

_SET_FLAGS, _UP = 0x8914, 1
"""SIOCSIFFLAGS and IFF_UP, see netdevice(7)."""


def raise_loopback() -> None:
    """Bring up `lo`, which is down in a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))


def start_relay(listening: int, port: int, reduce: Callable[[], None]) -> None:
    """Start a relay as a child of this process; it ends with this process.

    A socket stays in the network namespace it was created in: `listening` is outside, and the relay
    connects to `port` in its own. `reduce` drops its privileges.
    """
    parent = os.getpid()
    if os.fork() == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server may still send its reply
            for number in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            reduce()
            die_with_parent(parent)
            _pass_on(listening, port)
        finally:
            os._exit(0)
    os.close(listening)


def _pass_on(listening: int, port: int) -> None:
    listener = socket.socket(fileno=listening)
    while True:
        outer, _ = listener.accept()
        threading.Thread(target=_carry, args=(outer, port), daemon=True).start()


def _carry(outer: socket.socket, port: int) -> None:
    inner = socket.socket()  # create_connection would import the idna codec
    try:
        inner.connect(("127.0.0.1", port))
    except OSError:
        inner.close()
        outer.close()  # the server does not listen yet
        return
    back = threading.Thread(target=_copy, args=(inner, outer), daemon=True)
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
