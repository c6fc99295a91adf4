"""A push that is killed at any request: nothing half-visible, and the next one finishes it."""

from __future__ import annotations

import os
import queue
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.oci.layout import write_layout
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

from tests.fakes.debian_registry import real_registry
from tests.fakes.faulty_proxy import Faults, faulty_proxy
from tests.fakes.images import tiny_image
from tests.paths import ROOT

pytestmark = [
    pytest.mark.registry,
    pytest.mark.skipif(not shutil.which("docker-registry"), reason="no docker-registry"),
]
PATIENCE = 120


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Faults]]:
    with (
        real_registry(tmp_path_factory.mktemp("registry")) as host,
        faulty_proxy(host) as (way, faults),
    ):
        yield host, way, faults


def start(layout: Path, to: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "weightsmith", "push", f"oci:{layout}", "--to", to],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}",
             "WEIGHTSMITH_CACHE": str(folder)},
    )  # fmt: skip


def test_killed_at_any_request(behind: tuple[str, str, Faults], tmp_path: Path) -> None:
    host, way, faults = behind
    image = tiny_image(tmp_path / "model")
    write_layout(image, tmp_path / "layout")
    whole = start(tmp_path / "layout", f"{way}/whole:1", tmp_path)
    assert whole.wait(PATIENCE) == 0
    faults.settle()
    requests = len(faults.log)
    source = random.Random(7)
    for n in sorted(source.sample(range(1, requests), 5)):
        name = f"killed/{n}:1"
        place = Reference.parse(f"{host}/{name}")
        started: queue.SimpleQueue[int] = queue.SimpleQueue()

        def kill(number: int, last: int = n, pid: queue.SimpleQueue[int] = started) -> None:
            if number == last:
                os.kill(pid.get(timeout=PATIENCE), signal.SIGKILL)

        faults.log.clear()
        faults.watch = kill
        running = start(tmp_path / "layout", f"{way}/{name}", tmp_path / str(n))
        started.put(running.pid)
        assert running.wait(PATIENCE) == -signal.SIGKILL
        # What it sent in its last moment may still arrive, and count as there or not.
        faults.settle()
        faults.watch = lambda _: None
        with Registry() as client:
            found = client.digest_of(place)
            if found is not None:
                assert found == image.digest
                for layer in client.pull(place, platform="linux/amd64").layers:
                    b"".join(layer.open())
            there = set(_stored(client, place, image.layers))
            done = client.push(image, place)
            lacked = [layer for layer in image.layers if layer.digest not in there]
            sent = sum(layer.size for layer in lacked)
            assert done.uploaded_bytes in (sent, sent + image.config_blob.size)
            assert client.digest_of(place) == image.digest


def _stored(client: Registry, place: Reference, layers: object) -> Iterator[str]:
    session = client.session(place, "pull")
    for layer in layers:  # type: ignore[attr-defined]
        if session.call("HEAD", f"blobs/{layer.digest}").status == 200:
            yield layer.digest
