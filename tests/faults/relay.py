"""A way to a container engine that a test can cut."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Relay:
    """Passes connections on to an engine's socket until it is cut."""

    def __init__(self, listener: socket.socket, engine: str) -> None:
        self._listener, self._engine = listener, engine
        self._lock = threading.Lock()
        self._ends = [listener]
        self._is_cut = False

    def cut(self) -> None:
        """End every connection, and take no more."""
        with self._lock:
            self._is_cut = True
        for end in self._ends:
            _end(end)

    def accept(self) -> None:
        with suppress(OSError):  # of the listener that was cut
            while True:
                inner, _ = self._listener.accept()
                outer = socket.socket(socket.AF_UNIX)
                with self._lock:
                    self._ends += [] if self._is_cut else [inner, outer]
                try:
                    outer.connect(self._engine)
                except OSError:
                    _end(inner)
                    _end(outer)
                for ends in ((inner, outer), (outer, inner)):
                    threading.Thread(target=pass_on, args=ends, daemon=True).start()
                if self._is_cut:
                    _end(inner)
                    _end(outer)


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
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "engine.sock"))
        listener.listen()
        relay = Relay(listener, engine)
        thread = threading.Thread(target=relay.accept, daemon=True)
        thread.start()
        try:
            yield f"unix://{folder}/engine.sock", relay
        finally:
            relay.cut()
            thread.join(10)
