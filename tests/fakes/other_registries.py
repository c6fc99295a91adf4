"""Registries that others wrote, beside Debian's docker-registry: started, or already running.

`tests/engine.sh` builds the program from `registries.go`. A registry that runs somewhere, such as
your company's, is named by WEIGHTSMITH_TEST_REGISTRIES: `[USER:PASSWORD@]HOST[:PORT][/PREFIX]`,
more than one with spaces between. What the tests push there stays.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.fakes.started import free_port

PROGRAM = "weightsmith-test-registries"
KINDS = (
    "go-containerregistry",
    "go-containerregistry-old",
    "cuelabs",
    "cuelabs-terse",
)


@dataclass(frozen=True, slots=True)
class Given:
    """A registry that runs."""

    place: str
    """Host, and the path before every repository if it wants one."""
    pair: tuple[str, str] | None = None
    """User and password."""
    kind: str = ""
    """One of KINDS, where it is one."""

    @property
    def pools_blobs(self) -> bool:
        """True where a blob of one repository is in every other: nothing has to be mounted."""
        return self.kind.startswith("go-containerregistry")

    @property
    def keeps_uploads(self) -> bool:
        """True where what came of a broken upload stays, so that the rest may follow."""
        return self.kind.startswith("cuelabs")

    @classmethod
    def parse(cls, text: str) -> Given:
        secret, at, place = text.rpartition("@")
        user, _, password = secret.partition(":")
        return cls(place.rstrip("/"), (user, password) if at else None)


def given_registries() -> list[Given]:
    return [Given.parse(text) for text in os.environ.get("WEIGHTSMITH_TEST_REGISTRIES", "").split()]


@contextmanager
def other_registry(kind: str) -> Iterator[str]:
    program = shutil.which(PROGRAM)
    assert program, f"{PROGRAM} is not there"
    port = free_port()
    server = subprocess.Popen(
        [program, f"127.0.0.1:{port}", kind], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, f"{kind} ended"
                assert time.monotonic() < until, f"{kind} does not listen"
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
