"""HTTP transport with a deadline for the whole request; httpx only limits each single read."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx


class DeadlineTransport(httpx.HTTPTransport):
    """An HTTP transport that limits the total time of requests made inside `within`."""

    def __init__(self, trusted: ssl.SSLContext | None = None) -> None:
        context = trusted or httpx.create_ssl_context(trust_env=False)
        super().__init__(verify=context, trust_env=False)
        self._deadline = _Deadline()
        # httpx does not accept a network backend, so replace its pool.
        self._pool = httpcore.ConnectionPool(
            ssl_context=context,
            max_connections=None,
            max_keepalive_connections=None,
            network_backend=_Network(self._deadline),
        )

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Limit the total time of this thread's request in the block, including the body."""
        self._deadline.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline.until = None


class _Deadline(threading.local):
    """The deadline of this thread's request."""

    until: float | None = None

    def left(self, timeout: float | None) -> float | None:
        """Return the remaining seconds to wait; raises ReadTimeout after the deadline."""
        if self.until is None:
            return timeout
        left = self.until - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("deadline of the whole response exceeded")
        return left if timeout is None else min(left, timeout)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
    def __init__(self, deadline: _Deadline) -> None:
        self._inner = httpcore.SyncBackend()
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(timeout)
        stream = self._inner.connect_tcp(host, port, left, local_address, socket_options)
        return _Stream(stream, self._deadline)
