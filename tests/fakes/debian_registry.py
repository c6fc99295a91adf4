"""Starts Debian's docker-registry, a real one, on loopback."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
