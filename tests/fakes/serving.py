"""HTTP servers of this process, for the length of a `with` block."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer


class Replying(BaseHTTPRequestHandler):
    """Sends whole replies, and writes no log."""

    disable_nagle_algorithm = True  # head and body are sent apart: the second would wait 40 ms

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reset(self) -> None:
        """Break the connection off, as a server that dies does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class Serving(ThreadingHTTPServer):
    """Listens on a free loopback port; the handler's class gets some facts besides."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler], **facts: object) -> None:
        super().__init__(("127.0.0.1", 0), type("Handler", (handler,), facts))

    def handle_error(self, *_: object) -> None:
        """Stay silent: broken connections are what tests ask for."""


@contextmanager
def serving(server: HTTPServer) -> Iterator[str]:
    """Serve in a thread; yield the address, `http://127.0.0.1:PORT`."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Answer each connection in a thread of its own, byte by byte; yield host and port."""

    def attend(caller: socket.socket) -> None:
        with caller, suppress(OSError):
            caller.recv(65536)
            answer(caller)

    def accept() -> None:
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                threading.Thread(target=attend, args=(caller,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def drips_its_head(caller: socket.socket) -> None:
    """Send each byte in time, and never the last."""
    caller.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        caller.sendall(b"x")
        time.sleep(0.01)
