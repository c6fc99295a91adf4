"""The registry and the Docker daemon that `bake.py` pushes to, and the time spent on each side."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bake_acts import WORK

BRIDGE = "wsbench0"
TICK = os.sysconf("SC_CLK_TCK")
CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


def timed(
    commands: list[tuple[list[str], dict[str, str]]],
    registry: dict[str, int],
    daemon: dict[str, int],
    cwd: Path | None = None,
) -> dict[str, float]:
    """Run the commands; return wall and CPU seconds per party, and the client's peak MB."""
    os.sync()
    before = [cpu(registry), cpu(daemon), children()]
    start, peak = time.perf_counter(), 0
    for command, env in commands:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, cwd=cwd
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command[0]} failed")
        peak = max(peak, usage.ru_maxrss)
    wall = time.perf_counter() - start
    after = [cpu(registry), cpu(daemon), children()]
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "wall": wall, "client": spent[2], "daemon": spent[1], "registry": spent[0],
        "peak": peak / 1000,
    }  # fmt: skip


def cpu(pids: dict[str, int]) -> float:
    """Return the CPU seconds of processes and their reaped children."""
    total = 0
    for pid in pids.values():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))
    return total / TICK


def children() -> float:
    """Return the CPU seconds of this process's finished children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def registry() -> Iterator[tuple[str, dict[str, int]]]:
    """Serve an empty docker-registry."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = WORK / "registry"
    folder.mkdir()
    (folder / "config.yml").write_text(CONFIG.format(folder=folder, port=port))
    server = subprocess.Popen(
        ["docker-registry", "serve", str(folder / "config.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close())
        yield f"127.0.0.1:{port}", {"registry": server.pid}
    finally:
        stop(server, folder)


@contextmanager
def daemon_of_our_own() -> Iterator[tuple[str, dict[str, int]]]:
    """Start a dockerd that shares no images and no build cache with the host's."""
    folder = WORK / "docker"
    folder.mkdir()
    where = f"unix://{folder}/docker.sock"
    words = [
        "dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--host={where}",
        f"--pidfile={folder}/pid", f"--bridge={BRIDGE}", "--iptables=false", "--ip6tables=false",
        "--containerd-namespace=wsbench", "--containerd-plugins-namespace=wsbench-plugins",
    ]  # fmt: skip
    # Its own bridge: without one, dockerd removes the default bridge of the host's daemon.
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", "172.31.255.1/24", "dev", BRIDGE], check=True)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        info = ["docker", "-H", where, "info"]
        wait_for(lambda: subprocess.run(info, check=True, capture_output=True))
        yield where, {"dockerd": server.pid}
    finally:
        stop(server, folder)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False)


def wait_for(ready: object) -> None:
    """Call `ready` until it succeeds, for up to 30 seconds."""
    for left in range(150, -1, -1):
        try:
            ready()  # type: ignore[operator]
        except (OSError, subprocess.CalledProcessError):
            if not left:
                raise
            time.sleep(0.2)
        else:
            return


def stop(server: subprocess.Popen[bytes], folder: Path) -> None:
    """Stop a server and delete its data."""
    server.terminate()
    server.wait(60)
    shutil.rmtree(folder)
