"""A reverse proxy before a real registry that cuts, delays, refuses and truncates."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.fakes.serving import Replying, Serving, serving

CHUNK = 1 << 16


@dataclass
class Faults:
    """What goes wrong: (method, part of the path, fault), each once, in the order of requests.

    Methods may be joined, as in `PATCH PUT`.
    """

    plan: list[tuple[str, str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    received: int = 0
    """Bytes of bodies that were passed on."""

    def take(self, method: str, path: str) -> str:
        with self.lock:
            for row in self.plan:
                if method in row[0].split() and row[1] in path:
                    self.plan.remove(row)
                    return row[2]
        return ""


class _Handler(Replying):
    protocol_version = "HTTP/1.1"
    faults: Faults
    upstream: str

    def pass_on(self) -> None:
        fault = self.faults.take(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "reset":
            return self.reset()
        if fault in ("429", "500", "503"):
            self.rfile.read(length)
            extra = {"Retry-After": "1"} if fault == "429" else {}
            return self.reply(int(fault), b'{"errors":[{"code":"TOOMANYREQUESTS"}]}', extra)
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
        rows = ((k.title(), v) for k, v in reply.getheaders())
        headers = {k: v for k, v in rows if k not in ("Date", "Server")}
        body = reply.read()
        half = fault == "truncate"
        headers.setdefault("Content-Length", str(len(body)))
        self.reply(reply.status, body[: len(body) // 2] if half else body, headers)
        if half:
            self.wfile.flush()
            self.reset()
        return None


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[tuple[str, Faults]]:
    faults = Faults()
    with serving(Serving(_Handler, faults=faults, upstream=upstream)) as url:
        yield url.removeprefix("http://"), faults
