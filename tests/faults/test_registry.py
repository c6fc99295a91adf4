"""Registries that are down, die in the middle, or hold another image under the tag."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.debian_registry import real_registry, stop_registry
from tests.faults.relay import Relay
from tests.faults.workshop import Workshop

pytestmark = [pytest.mark.builders, pytest.mark.registry]

NAME = "team/capitals"
TAG = "1.0.0-llamacpp-q4_k_m"


@pytest.fixture
def layout(reference: object) -> Path:
    """The image, as the undisturbed build left it."""
    return reference.workshop.results / "image"  # type: ignore[attr-defined]


def tagged(host: str, tag: str = TAG) -> str:
    """Return the digest that a tag names; '' without one."""
    request = urllib.request.Request(
        f"http://{host}/v2/{NAME}/manifests/{tag}",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        method="HEAD",
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.headers["Docker-Content-Digest"])
    except urllib.error.HTTPError as error:
        return "" if error.code == 404 else f"HTTP {error.code}"


@contextmanager
def cutting(host: str, after: int) -> Iterator[str]:
    """Lead to a registry, and kill it once so many bytes went up; yield the way's own host."""
    name, _, port = host.partition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    with Relay(listener, lambda: socket.create_connection((name, int(port))), after) as relay:
        relay.at_cut = lambda: stop_registry(host)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        assert relay.is_cut


def test_a_registry_that_is_down(workshop: Workshop, digest: str, tmp_path: Path) -> None:
    with real_registry(tmp_path) as host:
        stop_registry(host)
        push = ("--push", "--set", f"image.repository={host}/{NAME}")

        outcome = workshop.build(*push)
        outcome.refused(5, host, "does not answer", "run it again")
        assert "resolve" not in outcome.err, "work began before the registry was asked"

    workshop.check_intact(digest)


def test_a_registry_that_dies_in_the_middle(
    workshop: Workshop, layout: Path, digest: str, tmp_path: Path
) -> None:
    with real_registry(tmp_path) as host, cutting(host, after=6_000_000) as way:
        outcome = workshop.run("push", str(layout), "--to", f"{way}/{NAME}:{TAG}")

        outcome.refused(5, way, "does not answer", "run it again")

    with real_registry(tmp_path) as host:
        assert tagged(host) == ""
        again = workshop.run("push", str(layout), "--to", f"{host}/{NAME}:{TAG}")
        assert again.told["digest"] == tagged(host) == digest
        third = workshop.run("push", str(layout), "--to", f"{host}/{NAME}:{TAG}")
        assert third.told["uploaded_bytes"] == 0
    workshop.check_intact(digest)


def test_a_tag_that_holds_another_image(
    workshop: Workshop, layout: Path, digest: str, tmp_path: Path
) -> None:
    with real_registry(tmp_path) as host:
        push = ("--push", "--set", f"image.repository={host}/{NAME}")
        first = workshop.build(*push).digest
        assert first == tagged(host)
        changed = (*push, "--set", "serve.max_num_seqs=2")

        workshop.build(*changed).refused(2, f"{NAME}:{TAG}", "--force")

        assert tagged(host) == first
        assert workshop.build(*push).digest == first
        forced = workshop.build(*changed, "--force").digest
        assert forced == tagged(host) != first
        workshop.run("push", str(layout), "--to", f"{host}/{NAME}:{TAG}").refused(2, "--force")
        assert tagged(host) == forced
    workshop.check_intact(digest)


def test_a_push_that_is_killed(
    workshop: Workshop, layout: Path, digest: str, tmp_path: Path
) -> None:
    with real_registry(tmp_path) as host:
        running = workshop.start("push", str(layout), "--to", f"{host}/{NAME}:{TAG}")
        running.wait_for("push:")
        running.process.kill()
        running.end()
        assert tagged(host) in ("", digest)

        again = workshop.run("push", str(layout), "--to", f"{host}/{NAME}:{TAG}")
        assert again.told["digest"] == tagged(host) == digest
