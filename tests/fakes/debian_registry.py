"""Starts Debian's docker-registry, a real one, on loopback."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


_RUNNING: dict[str, subprocess.Popen[bytes]] = {}


def stop_registry(host: str) -> None:
    """End a registry at once, as a power cut would."""
    _RUNNING[host].kill()
    _RUNNING[host].wait()


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = CONFIG.format(folder=folder / "data", port=port)
    if tls:
        pair = f'{{key: "{tls[0]}", certificate: "{tls[1]}"}}'
        config = config.replace(f'"127.0.0.1:{port}"', f'"127.0.0.1:{port}", tls: {pair}')
    if tokens:
        config += (
            f'auth: {{token: {{realm: "{tokens[0]}", service: registry, issuer: tests, '
            f'rootcertbundle: "{tokens[1]}"}}}}\n'
        )
    (folder / "config.yml").write_text(config)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            ["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log
        )
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        _RUNNING[f"127.0.0.1:{port}"] = server
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
