"""An object store in this process: moto's server, over real HTTP."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest


class S3Server:
    """An S3 server on a loopback port of its own, which can be stopped and started again."""

    def __init__(self) -> None:
        pytest.importorskip("s3fs", reason="s3fs is not installed")
        self._module = pytest.importorskip("moto.server", reason="moto is not installed")
        self._running: Any = None
        self._port = 0

    def start(self) -> None:
        """Serve; what was stored before is still there."""
        self._running = self._module.ThreadedMotoServer(
            ip_address="127.0.0.1", port=self._port, verbose=False
        )
        self._running.start()
        self._port = self._running.get_host_and_port()[1]

    def stop(self) -> None:
        if self._running:
            self._running.stop()
        self._running = None

    def variables(self, bucket: str) -> Mapping[str, str]:
        import httpx

        url = f"http://127.0.0.1:{self._port}"
        httpx.put(f"{url}/{bucket}", timeout=60).raise_for_status()
        return {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def s3_server(bucket: str) -> Iterator[Mapping[str, str]]:
    server = S3Server()
    server.start()
    try:
        yield server.variables(bucket)
    finally:
        server.stop()
