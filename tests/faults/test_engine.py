"""A container engine that is not there, or goes away in the middle of a build."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.fakes.started import until
from tests.faults.relay import way_to_engine
from tests.faults.workshop import PATIENCE, Running, Workshop

pytestmark = pytest.mark.builders

SOCKET = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout


def containers(workshop: Workshop) -> list[str]:
    """Return the running containers that have something of the workshop mounted."""
    found = docker("ps", "--quiet", "--no-trunc").split()
    return [
        name
        for name in found
        if subprocess.run(
            ["docker", "inspect", name], check=False, capture_output=True, text=True
        ).stdout.count(str(workshop.folder))
    ]


def wait_for_container(workshop: Workshop, running: Running) -> str:
    until(lambda: running.process.poll() is not None or containers(workshop), PATIENCE)
    assert running.process.poll() is None, running.err
    return containers(workshop)[0]


def check_no_container(workshop: Workshop) -> None:
    until(lambda: not containers(workshop))


def test_no_engine(workshop: Workshop, digest: str) -> None:
    for place in ("tcp://127.0.0.1:9", "unix:///nowhere/docker.sock", "nonsense://x"):
        outcome = workshop.build("--runner", "docker", env={"DOCKER_HOST": place})
        outcome.refused(5, place.partition("://")[2], "--runner local")
    workshop.check_intact(digest)


def test_no_engine_is_no_fault_where_none_is_asked_for(workshop: Workshop, digest: str) -> None:
    outcome = workshop.build("--runner", "auto", env={"DOCKER_HOST": "tcp://127.0.0.1:9"})

    assert outcome.digest == digest


@pytest.mark.docker
def test_an_engine_that_goes_away(workshop: Workshop, digest: str, tmp_path: Path) -> None:
    workshop.forget("reference")
    with way_to_engine(tmp_path, SOCKET) as (address, relay):
        running = workshop.start_build("--runner", "docker", env={"DOCKER_HOST": address})
        wait_for_container(workshop, running)
        relay.cut()
        outcome = running.end()

    outcome.refused(5, "lost the connection to the container engine", "run the same command")
    check_no_container(workshop)
    assert workshop.build("--runner", "docker", *layout(workshop)).digest == digest
    workshop.check_intact(digest)


@pytest.mark.docker
def test_a_container_that_is_killed(workshop: Workshop, digest: str) -> None:
    workshop.forget("reference")
    running = workshop.start_build("--runner", "docker")
    docker("kill", wait_for_container(workshop, running))
    outcome = running.end()

    outcome.refused(5, "reference", "killed")
    check_no_container(workshop)
    workshop.check_intact(digest)


@pytest.mark.docker
def test_a_killed_build_leaves_no_container(workshop: Workshop, digest: str) -> None:
    workshop.forget("reference")
    running = workshop.start_build("--runner", "docker")
    wait_for_container(workshop, running)
    running.process.kill()
    running.end()

    check_no_container(workshop)
    workshop.check_intact(digest)


def layout(workshop: Workshop) -> tuple[str, str]:
    """Name a folder for the image, so that nothing stays in the engine."""
    return "--layout", str(workshop.folder / "layout")


@pytest.mark.docker
def test_an_interrupted_trial_leaves_no_container_and_no_name(
    workshop: Workshop, digest: str
) -> None:
    workshop.forget("smoke", "trial")
    before = json.dumps(sorted(docker("images", "--format", "{{.Repository}}:{{.Tag}}").split()))
    running = workshop.start_build("--runner", "docker", *layout(workshop))
    running.wait_for("evaluate:")
    time.sleep(0.3)
    running.process.send_signal(signal.SIGTERM)

    assert running.end().code in (130, 0)
    after = docker("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    assert not [name for name in after if "weightsmith-candidate" in name and name not in before]
    check_no_container(workshop)
    workshop.check_intact(digest)
