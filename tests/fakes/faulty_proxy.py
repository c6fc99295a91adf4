"""A reverse proxy before a real registry that cuts, delays, refuses, truncates and lies."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.fakes.serving import serving

CHUNK = 1 << 16


@dataclass
class Faults:
    """What goes wrong: (method, part of the path, fault), each once, in the order of requests.

    Methods may be joined, as in `PATCH PUT`.
    """

    plan: list[tuple[str, str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    log: list[tuple[str, str]] = field(default_factory=list)
    watch: Callable[[int], None] = lambda _: None
    """Called with the number of each request, before it is passed on."""
    received: int = 0
    """Bytes of bodies that were passed on."""
    host: str = ""
    _open: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def count(self, more: int) -> None:
        """Keep the number of connections that are open."""
        with self._changed:
            self._open += more
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until all that a client, dead by now, had sent is passed on or given up."""
        name, _, port = self.host.partition(":")
        # Connections are taken in order: when this one is, none is left in the kernel's queue.
        with socket.create_connection((name, int(port)), timeout=60) as last:
            last.shutdown(socket.SHUT_WR)
            assert last.recv(1) == b""
        with self._changed:
            assert self._changed.wait_for(lambda: self._open == 0, timeout=120), self._open

    def take(self, method: str, path: str) -> str:
        with self.lock:
            self.log.append((method, path))
            self.watch(len(self.log))
            for row in self.plan:
                if method in row[0].split() and row[1] in path:
                    self.plan.remove(row)
                    return row[2]
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are sent apart: the second would wait 40 ms
    faults: Faults
    upstream: str

    def log_message(self, *_: object) -> None:
        pass

    def pass_on(self) -> None:
        fault = self.faults.take(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "reset":
            return self.reset()
        if fault in ("429", "500", "503"):
            self.rfile.read(length)
            extra = {"Retry-After": "1"} if fault == "429" else {}
            return self.answer(int(fault), extra, b'{"errors":[{"code":"TOOMANYREQUESTS"}]}')
        if fault == "delay":
            time.sleep(0.3)
        connection = http.client.HTTPConnection(self.upstream, timeout=120)
        try:
            self.exchange(connection, fault, length)
        finally:
            connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = pass_on  # noqa: N815 - the names http.server calls

    def exchange(self, connection: http.client.HTTPConnection, fault: str, length: int) -> None:
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        left = length // 2 if fault == "cut" else length
        while left and (data := self.rfile.read(min(CHUNK, left))):
            connection.send(data)
            left -= len(data)
            self.faults.received += len(data)
        if fault == "cut" or left:  # or the client is gone
            # The registry is done with what came before the client may ask how much it kept.
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)
                while connection.sock.recv(CHUNK):
                    pass
            return self.reset()
        reply = connection.getresponse()
        headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("date", "server")}
        body = reply.read()
        if fault == "lie":
            headers["Docker-Content-Digest"] = "sha256:" + "0" * 64
        if fault == "change" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        return self.answer(reply.status, headers, body, half=fault == "truncate")

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, *, half: bool = False
    ) -> None:
        self.send_response(status)
        if not any(name.lower() == "content-length" for name in headers):
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.wfile.flush()
            self.reset()

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    faults: Faults

    def process_request(self, *connection: Any) -> None:
        self.faults.count(+1)
        super().process_request(*connection)

    def process_request_thread(self, *connection: Any) -> None:
        try:
            super().process_request_thread(*connection)
        finally:
            self.faults.count(-1)

    def handle_error(self, *_: object) -> None:
        """Stay silent: broken connections are what tests ask for."""


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[tuple[str, Faults]]:
    """Serve the proxy on a free loopback port; yield its host and its faults."""
    faults = Faults()
    handler = type("Handler", (_Handler,), {"faults": faults, "upstream": upstream})
    server = _Server(("127.0.0.1", 0), handler)
    server.faults = faults
    faults.host = f"127.0.0.1:{server.server_address[1]}"
    with serving(server):
        yield faults.host, faults
