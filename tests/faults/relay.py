"""A way to a server that a test can watch and cut."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

Connect = Callable[[], socket.socket]


class Relay:
    """Passes connections on from a listening socket until it is cut."""

    def __init__(self, listener: socket.socket, connect: Connect) -> None:
        self._listener = listener
        self._connect = connect
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.is_cut = False

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self.cut()

    def cut(self) -> None:
        """End every connection, and take no more."""
        with self._lock:
            self.is_cut = True
            ends = (self._listener, *self._ends)
        for end in ends:
            _end(end)

    def _keep(self, end: socket.socket) -> bool:
        """Remember a connection for the cut; end it where that has been, and say so by False."""
        with self._lock:
            self._ends.append(end)
            if not self.is_cut:
                return True
        _end(end)
        return False

    def _start(self, target: Callable[..., None], *words: object) -> None:
        thread = threading.Thread(target=target, args=words, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.is_cut:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            if not self._keep(inner):
                return
            try:
                outer = self._connect()
            except OSError:
                _end(inner)
                continue
            if not self._keep(outer):
                return
            self._start(pass_on, inner, outer)
            self._start(pass_on, outer, inner)


def pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _end(end: socket.socket) -> None:
    with suppress(OSError):
        # Wakes who waits; then the other side gets a reset, as from a server that died.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def way_to_engine(folder: Path, engine: str) -> Iterator[tuple[str, Relay]]:
    """Yield an address that leads to the engine until the relay is cut: then the engine is gone."""

    def connect() -> socket.socket:
        outer = socket.socket(socket.AF_UNIX)
        outer.connect(engine)
        return outer

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "engine.sock"))
    listener.listen()
    with Relay(listener, connect) as relay:
        yield f"unix://{folder}/engine.sock", relay
