"""What the CPU of a launcher can do: known where images are started on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.cpus import flags
from weightsmith.outside import docker
from weightsmith.outside.docker import DockerEngine
from weightsmith.outside.docker_launcher import DockerLauncher
from weightsmith.outside.rootfs import EitherLauncher, RootfsLauncher, StartInfo


class Client:
    """Of an engine under some kernel."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def info(self) -> dict[str, Any]:
        return {"KernelVersion": self.kernel}

    def close(self) -> None:
        """Has nothing to close."""


def engine(kernel: str) -> DockerEngine:
    made = DockerEngine()
    made._opened = Client(kernel)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    ("host", "kernel", "here"),
    [
        ("unix:///var/run/docker.sock", os.uname().release, True),
        ("unix:///var/run/docker.sock", "6.12.0-linuxkit", False),  # in a virtual machine
        ("tcp://build.example.com:2376", os.uname().release, False),
        ("ssh://build.example.com", os.uname().release, False),
    ],
)
def test_an_engine_tells_its_cpu_only_under_this_machine_s_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, kernel: str, here: bool
) -> None:
    monkeypatch.setattr(docker, "engine_host", lambda: host)
    launcher = DockerLauncher(engine(kernel))
    layouts = RootfsLauncher(lambda layout, root: StartInfo(argv=(), env={}), tmp_path)

    assert launcher.cpu_flags() == (flags() if here else None)
    assert EitherLauncher(launcher, layouts).cpu_flags() == launcher.cpu_flags()
    assert layouts.cpu_flags() == flags()
