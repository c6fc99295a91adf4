"""Requests that end at a moment, however slowly a server drips: httpx limits each read alone."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx


class Timely(httpx.HTTPTransport):
    """Sends requests, from many threads; those made inside `within` have that many seconds."""

    def __init__(self) -> None:
        super().__init__(trust_env=False)
        self._moment = _Moment()
        # The library's own pool, with our way of waiting below it; httpx hands on none.
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False),
            max_connections=None,
            max_keepalive_connections=None,
            network_backend=_Network(self._moment),
        )

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Give what this thread asks in the block, head and body, so many seconds in all."""
        self._moment.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self._moment.until = None


class _Moment(threading.local):
    """When this thread's request must have ended."""

    until: float | None = None

    def left(self, timeout: float | None) -> float | None:
        """Return how long may be waited; raises ReadTimeout where the moment has come."""
        if self.until is None:
            return timeout
        left = self.until - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the time for the whole answer is over")
        return left if timeout is None else min(left, timeout)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, moment: _Moment) -> None:
        self._inner = inner
        self._moment = moment

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._moment.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._moment.left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = self._moment.left(timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._moment)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
    def __init__(self, moment: _Moment) -> None:
        self._inner = httpcore.SyncBackend()
        self._moment = moment

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left = self._moment.left(timeout)
        stream = self._inner.connect_tcp(host, port, left, local_address, socket_options)
        return _Stream(stream, self._moment)
