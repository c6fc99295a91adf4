"""The runtimes that `pull.py` pulls with, each with an empty folder of its own.

`pull_runtimes.py proxy PORT UPSTREAM BYTES` stands between a registry and its clients, and gives
each connection a fixed rate, as registries on object storage do.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bake_acts import WORK
from bake_servers import stop, wait_for

SO_MAX_PACING_RATE = 47
"""https://man7.org/linux/man-pages/man7/socket.7.html"""


@dataclass(frozen=True)
class Setting:
    """A runtime and what differs from its defaults.

    `program` is `docker`, or the name of a containerd given with `--containerd`.
    """

    program: str
    transfer: Mapping[str, Any] = field(default_factory=dict)
    differ: Mapping[str, Any] | None = None
    """Options of EROFS's differ; None for overlayfs."""


def _unpacks(downloads: int, unpacks: int, buffer: int = 0) -> dict[str, int]:
    """Return options of containerd's transfer service."""
    told = {"max_concurrent_downloads": downloads, "max_concurrent_unpacks": unpacks}
    return told | ({"concurrent_layer_fetch_buffer": buffer} if buffer else {})


_SORTED = ["-T0", "--mkfs-time", "--sort=none"]
BUFFER = 8 << 20
SETTINGS = {
    "docker": Setting("docker"),
    "1.7": Setting("1.7"),
    "2.1": Setting("2.1"),
    "2.1, 8 ranges": Setting(
        "2.1", {"max_concurrent_downloads": 8, "concurrent_layer_fetch_buffer": BUFFER}
    ),
    "2.4": Setting("2.4"),
    "2.4, 3 unpacks": Setting("2.4", _unpacks(3, 3)),
    "2.4, 8 downloads, 4 unpacks": Setting("2.4", _unpacks(8, 4)),
    "2.4, 8 ranges": Setting("2.4", _unpacks(8, 1, BUFFER)),
    "2.4, 8 ranges, 4 unpacks": Setting("2.4", _unpacks(8, 4, BUFFER)),
    "2.4, EROFS": Setting("2.4", {}, {"mkfs_options": _SORTED}),
    "2.4, EROFS, tar index": Setting("2.4", {}, {"enable_tar_index": True}),
    "2.4, EROFS, tar index, 8 ranges, 4 unpacks": Setting(
        "2.4", _unpacks(8, 4, BUFFER), {"enable_tar_index": True}
    ),
}


@dataclass(frozen=True)
class Client:
    """How to pull with a running runtime: a command without the reference, and its processes."""

    pull: list[str]
    pids: dict[str, int]
    folder: Path | None


@contextmanager
def runtime(setting: Setting, programs: Mapping[str, Path], erofs: Path | None) -> Iterator[Client]:
    """Yield a client of an empty runtime; delete what it pulled.

    Docker is the daemon that runs on this machine, whose own images are left alone.
    """
    if setting.program == "docker":
        yield Client(["docker", "pull", "-q"], _docker_pids(), None)
        return
    folder = WORK / "c"
    folder.mkdir()
    (folder / "config.toml").write_text(_config(folder, setting))
    bin_ = programs[setting.program]
    path = f"{erofs}:{os.environ['PATH']}" if erofs else os.environ["PATH"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [str(bin_ / "containerd"), "--config", str(folder / "config.toml")],
            stdout=log, stderr=log, env={**os.environ, "PATH": path},
        )  # fmt: skip
    ctr = [str(bin_ / "ctr"), "--address", f"{folder}/s"]
    snapshotter = "overlayfs" if setting.differ is None else "erofs"
    try:
        wait_for(lambda: subprocess.run([*ctr, "version"], check=True, capture_output=True))
        words = [*ctr, "image", "pull", "--plain-http", "--snapshotter", snapshotter]
        yield Client(words, {"containerd": server.pid}, folder)
    finally:
        _unmount(folder)
        stop(server, folder)


def removed(setting: Setting, reference: str) -> None:
    """Delete a pulled image from Docker; other runtimes' folders are deleted whole."""
    if setting.program == "docker":
        subprocess.run(["docker", "rmi", reference], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def paced(host: str, rate: int) -> Iterator[str]:
    """Yield an address of the registry at which each connection gets `rate` bytes per second."""
    if not rate:
        yield host
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    proxy = subprocess.Popen([sys.executable, __file__, "proxy", str(port), host, str(rate)])
    try:
        wait_for(lambda: socket.create_connection(("127.0.0.1", port), 5).close())
        yield f"127.0.0.1:{port}"
    finally:
        proxy.terminate()
        proxy.wait()


def _config(folder: Path, setting: Setting) -> str:
    """Return containerd's configuration; JSON's values are TOML's too."""
    lines = [
        "version = 2", f'root = "{folder}/root"', f'state = "{folder}/state"',
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]', "[grpc]", f'address = "{folder}/s"',
        '[plugins."io.containerd.transfer.v1.local"]',
        *(f"{key} = {json.dumps(value)}" for key, value in setting.transfer.items()),
    ]  # fmt: skip
    if setting.differ is not None:
        lines += [
            '[[plugins."io.containerd.transfer.v1.local".unpack_config]]',
            'platform = "linux/amd64"', 'snapshotter = "erofs"', 'differ = "erofs"',
            '[plugins."io.containerd.differ.v1.erofs"]',
            *(f"{key} = {json.dumps(value)}" for key, value in setting.differ.items()),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _docker_pids() -> dict[str, int]:
    """Return the process numbers of the engine on this machine and of its containerd."""
    pids = {}
    for name in ("dockerd", "containerd"):
        found = subprocess.run(["pgrep", "-o", "-x", name], capture_output=True, text=True)
        if found.stdout.strip():
            pids[name] = int(found.stdout)
    return pids


def _unmount(folder: Path) -> None:
    """Unmount what EROFS's snapshotter left mounted."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        place = line.split()[1]
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", place], check=False)
    # Layers may be immutable.
    if shutil.which("chattr"):
        for blob in folder.glob("root/*erofs/snapshots/*/layer.erofs"):
            subprocess.run(["chattr", "-i", str(blob)], check=False, stderr=subprocess.DEVNULL)


def proxy(port: str, upstream: str, rate: str) -> None:
    """Forward connections, each at `rate` bytes per second towards the client."""
    host, _, number = upstream.rpartition(":")
    with socket.create_server(("127.0.0.1", int(port)), backlog=128) as server:
        while True:
            client, _ = server.accept()
            client.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, int(rate))
            behind = socket.create_connection((host, int(number)))
            for source, sink in ((client, behind), (behind, client)):
                threading.Thread(target=_copied, args=(source, sink), daemon=True).start()


def _copied(source: socket.socket, sink: socket.socket) -> None:
    """Copy until one side ends, without copying the bytes into this process."""
    reader, writer = os.pipe()
    try:
        with suppress(OSError):
            while size := os.splice(source.fileno(), writer, 1 << 16):
                while size:
                    size -= os.splice(reader, sink.fileno(), size)
    finally:
        os.close(reader)
        os.close(writer)
        for side in (source, sink):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    proxy(*sys.argv[2:])
