"""Programs that are started, and what is sure to come of them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from weightsmith.building.wiring import cache_folder
from weightsmith.core.files import sibling_folder

from tests.paths import ROOT


def weightsmith(
    *words: object, store: Path | None = None, code: int = 0, clone: Path | None = None
) -> dict:
    """What the command, a clone's if one is named, prints with --json; with a store of its own."""
    env = dict(os.environ) | ({"WEIGHTSMITH_STORE": str(store)} if store else {})
    env |= {"PYTHONPATH": str(clone / "toolchain")} if clone else {}
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith.cli.program", *map(str, words), "--json"],
        env=env, cwd=clone or ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def reader(package: str, *needs: str) -> Path:
    """Return a Python with one pinned package, and of its dependencies only what is named.

    Made once.
    """
    folder = cache_folder() / "readers" / package
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with sibling_folder(folder) as partial:
            subprocess.run([sys.executable, "-m", "venv", partial], check=True)
            pip = [partial / "bin" / "python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, "--no-deps", package], check=True)
            subprocess.run([*pip, *needs], check=True)
            partial.rename(folder)
    return folder / "bin" / "python"


def free_port() -> int:
    """A port that nobody listens on, and that the kernel gives to nobody who asks for any."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    # Not of the tests' own chance, which is the same in all of them.
    for port in random.SystemRandom().sample(range(first // 2, first), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@contextmanager
def started(argv: list, env: dict[str, str], port: int, log: Path) -> Iterator[httpx.Client]:
    """Yield a client of the server once /health answers; its output goes to `log`."""
    with log.open("w") as stream:
        process = subprocess.Popen(argv, env=env, stdout=stream, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            _wait(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait()


def at_once(ask: Callable[[int], httpx.Response], number: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(ask, range(number)))


def _wait(client: httpx.Client, process: subprocess.Popen, log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def hear_interrupts() -> None:
    """Take the default handler: a run under `nohup`, cron or `&` ignores it, with all it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def until(there: Callable[[], object], patience: float = 120.0) -> None:
    """Wait until this is true, however busy the machine is."""
    end = time.monotonic() + patience
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)
