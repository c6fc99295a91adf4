"""A registry that is down, and a push to one that is killed."""

from pathlib import Path

import pytest
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

from tests.fakes.real_registries import real_registry, stop_registry
from tests.faults.workshop import Finished, Workshop

pytestmark = [pytest.mark.builders, pytest.mark.registry]

NAME = "team/capitals"


def test_a_registry_that_is_down(workshop: Workshop, digest: str, tmp_path: Path) -> None:
    with real_registry(tmp_path) as host:
        stop_registry(host)

        outcome = workshop.build("--push", "--set", f"image.repository={host}/{NAME}")
        outcome.refused(5, host, "does not answer", "run it again")
        assert "resolve" not in outcome.err, "work began before the registry was asked"

    workshop.check_intact(digest)


def test_a_push_that_is_killed(
    workshop: Workshop, reference: Finished, digest: str, tmp_path: Path
) -> None:
    with real_registry(tmp_path) as host, Registry() as client:
        place = Reference.parse(f"{host}/{NAME}:1.0.0-llamacpp-q4_k_m")
        push = ("push", str(reference.results / "image"), "--to", str(place))
        running = workshop.start(*push)
        running.wait_for("push:")
        running.process.kill()
        running.end()
        assert client.digest_of(place) in (None, digest)

        again = workshop.run(*push)
        assert again.told["digest"] == client.digest_of(place) == digest
        assert workshop.run(*push).told["uploaded_bytes"] == 0
