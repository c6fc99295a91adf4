"""Limits of time and bytes for whole HTTP requests; httpx itself limits each single read.

A server that sends a byte a minute keeps every timeout for a read, and holds its caller for ever.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import httpcore
import httpx

HEAD_SECONDS = 60.0
"""For the rest of a reply's head once it has begun: its start, and all replies before the last."""
LARGEST_HEAD = 1 << 20
"""Bytes of the same; servers send a few hundred."""
WINDOW = 300.0
"""Seconds of waiting for a body after which its rate is looked at."""
LEAST_RATE = 1000
"""Bytes per second."""
_END = re.compile(rb"\n\r?\n")
"""Of a head: httpx takes both kinds of lines."""


class ForbiddenAddress(Exception):
    """An address that a client must not connect to."""


class Limit(Protocol):
    """What a connection asks before it waits, and tells of what it got."""

    def left(self, timeout: float | None) -> float | None:
        """Return how long the next step may take; raises httpcore.ReadTimeout if it is over."""

    def sent(self) -> None:
        """Note that something was sent: what follows is another reply."""

    def got(self, data: bytes) -> None:
        """Note what was received since it was asked how long that may take."""


class ReplyLimiter:
    """Limits the head of each reply by time and bytes, and its body by its rate.

    Nothing here limits how long a server may take until it begins to reply: that is the client's
    own timeout, and may be half an hour where a registry copies a layer.
    """

    def __init__(self) -> None:
        self._head: bytearray | None = bytearray()
        """What there is of it; None in a body."""
        self._began = 0.0
        self._read = self._bytes = 0
        self._waited = self._asked = 0.0

    def sent(self) -> None:
        """Begin with another reply."""
        self.__init__()  # type: ignore[misc]

    def left(self, timeout: float | None) -> float | None:
        """Return the seconds for the next step; raises ReadTimeout if the reply is too slow."""
        self._asked = time.monotonic()
        if self._head is None:
            if self._waited >= WINDOW:
                if self._bytes < WINDOW * LEAST_RATE:
                    raise httpcore.ReadTimeout(f"it sends less than {LEAST_RATE // 1000} kB/s")
                self._waited, self._bytes = 0.0, 0
            return timeout
        if not self._read:
            return timeout
        left = self._began + HEAD_SECONDS - self._asked
        if left <= 0 or self._read > LARGEST_HEAD:
            raise httpcore.ReadTimeout("the head of its reply does not end")
        return left if timeout is None else min(left, timeout)

    def got(self, data: bytes) -> None:
        """Count it; a reply such as `100 Continue` is part of the head of the one that follows."""
        if self._head is None:
            self._bytes += len(data)
            self._waited += time.monotonic() - self._asked
            return
        if not self._read:
            self._began = time.monotonic()
        self._read += len(data)
        looked = max(0, len(self._head) - 2)
        self._head += data
        while self._head is not None and (end := _END.search(self._head, looked)):
            goes_on = self._head[8:10] == b" 1"  # HTTP/1.1 100 Continue
            self._head, looked = self._head[end.end() :] if goes_on else None, 0


class _Deadline(threading.local):
    """The deadline of this thread's request."""

    until: float | None = None

    def left(self, timeout: float | None) -> float | None:
        if self.until is None:
            return timeout
        left = self.until - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("deadline of the whole response exceeded")
        return left if timeout is None else min(left, timeout)

    def sent(self) -> None:
        pass

    def got(self, data: bytes) -> None:
        pass


class DeadlineTransport(httpx.HTTPTransport):
    """An HTTP transport that limits the total time of requests made inside `within`."""

    def __init__(self, trusted: ssl.SSLContext | None = None) -> None:
        super().__init__(
            verify=trusted or httpx.create_ssl_context(trust_env=False),
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=None),
        )
        self._deadline = _Deadline()
        _limit(self, lambda: self._deadline)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Limit the total time of this thread's request in the block, including the body."""
        self._deadline.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline.until = None


def paced(client: httpx.Client) -> httpx.Client:
    """Return the client; its replies, also those through proxies, now have the limits of Pace."""
    for transport in (client._transport, *client._mounts.values()):  # noqa: SLF001 - its own
        if isinstance(transport, httpx.HTTPTransport):
            pace(transport)
    return client


def pace(transport: httpx.HTTPTransport) -> httpx.HTTPTransport:
    """Return the transport, whose replies now have the limits of Pace."""
    _limit(transport, ReplyLimiter)
    return transport


def pinned_to(client: httpx.Client, allowed: Callable[[str], bool]) -> httpx.Client:
    """Return a paced client, which now connects only to addresses that are allowed.

    A name is looked up once and its address is connected to, so it cannot be another one then. A
    proxy is connected to whatever its address: it reaches the others itself.
    """
    transport = client._transport  # noqa: SLF001 - its own
    if isinstance(transport, httpx.HTTPTransport):
        pool: Any = transport._pool  # noqa: SLF001 - httpx accepts no network backend
        pool._network_backend = _Network(ReplyLimiter, allowed)  # noqa: SLF001
    return client


def _limit(transport: httpx.HTTPTransport, limit: Callable[[], Limit]) -> None:
    pool: Any = transport._pool  # noqa: SLF001 - httpx accepts no network backend
    pool._network_backend = _Network(limit)  # noqa: SLF001


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, limit: Limit) -> None:
        self._inner = inner
        self._limit = limit

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._inner.read(max_bytes, self._limit.left(timeout))
        self._limit.got(data)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._limit.sent()
        self._inner.write(buffer, self._limit.left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = self._limit.left(timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._limit)

    def get_extra_info(self, info: str) -> object:
        return self._inner.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
    def __init__(
        self, limit: Callable[[], Limit], allowed: Callable[[str], bool] | None = None
    ) -> None:
        self._inner = httpcore.SyncBackend()
        self._limit = limit
        self._allowed = allowed

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        limit = self._limit()
        left = limit.left(timeout)
        if self._allowed:
            host = self._address(host, port)
        return _Stream(
            self._inner.connect_tcp(host, port, left, local_address, socket_options), limit
        )

    def _address(self, host: str, port: int) -> str:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        found = [str(row[4][0]) for row in rows]
        if self._allowed and not all(map(self._allowed, found)):
            raise ForbiddenAddress(f"{host} is an address that a redirect must not lead to")
        return found[0]

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)
