"""Real registries on loopback: Debian's docker-registry, and those that others wrote.

`tests/engine.sh` builds the others' program from `registries.go`. A registry that runs somewhere,
such as your company's, is named by WEIGHTSMITH_TEST_REGISTRIES:
`[USER:PASSWORD@]HOST[:PORT][/PREFIX]`, more than one with spaces between. What the tests push there
stays.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.started import free_port

CONFIG = """
version: 0.1
log: {{level: info, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"{tls}}}
"""
_LISTENS = re.compile(r'listening on (127\.0\.0\.1:\d+)[",]')
_PATIENCE = 120
"""Seconds in which it must listen; a tenth of one is what it needs."""


_RUNNING: dict[str, subprocess.Popen[bytes]] = {}


def stop_registry(host: str) -> None:
    """End a registry at once, as a power cut would."""
    _RUNNING[host].kill()
    _RUNNING[host].wait()


def start_again(host: str, folder: Path) -> None:
    """Start a registry that was ended, at the same address and with what it had."""
    config = CONFIG.format(folder=folder / "data", tls="", port=host.rpartition(":")[2])
    (folder / "config.yml").write_text(config)
    (folder / "log").unlink()
    _RUNNING[host] = _started(folder)
    assert _listening(_RUNNING[host], folder / "log") == host


def _started(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            ["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log
        )


@contextmanager
def real_registry(
    folder: Path,
    *,
    tls: tuple[Path, Path] | None = None,
    tokens: tuple[str, Path] | None = None,
) -> Iterator[str]:
    """Serve Debian's docker-registry on a free loopback port; yield its host.

    With `tls`, a key and its certificate; with `tokens`, a token server's address and certificate.
    """
    pair = f', tls: {{key: "{tls[0]}", certificate: "{tls[1]}"}}' if tls else ""
    config = CONFIG.format(folder=folder / "data", tls=pair, port=0)
    if tokens:
        config += (
            f'auth: {{token: {{realm: "{tokens[0]}", service: registry, issuer: tests, '
            f'rootcertbundle: "{tokens[1]}"}}}}\n'
        )
    (folder / "config.yml").write_text(config)
    server, host = _started(folder), ""
    try:
        host = _listening(server, folder / "log")
        _RUNNING[host] = server
        yield host
    finally:
        server = _RUNNING.pop(host, server)
        server.terminate()
        server.wait()


def _listening(server: subprocess.Popen[bytes], log: Path) -> str:
    """Return where it listens: a port that it was given, not one that was free a moment ago."""
    until = time.monotonic() + _PATIENCE
    while not (found := _LISTENS.search(said := log.read_text(errors="replace"))):
        assert server.poll() is None, f"docker-registry ended: {said}"
        assert time.monotonic() < until, f"docker-registry does not listen: {said}"
        time.sleep(0.02)
    return found[1]


PROGRAM = "weightsmith-test-registries"
KINDS = (
    "go-containerregistry",
    "go-containerregistry-old",
    "cuelabs",
    "cuelabs-terse",
)


@dataclass(frozen=True, slots=True)
class Given:
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
