"""A real registry behind a proxy that does what networks do: nothing half-visible, nothing lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.core.errors import WeightsmithError
from weightsmith.oci.image import Image
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

from tests.fakes.debian_registry import real_registry
from tests.fakes.faulty_proxy import Faults, faulty_proxy
from tests.fakes.images import tiny_image
from tests.fakes.other_registries import other_registry

AMD64 = "linux/amd64"
REPAIRABLE = ("reset", "cut", "429", "500", "503", "delay")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("docker-registry", marks=pytest.mark.registry),
        pytest.param("cuelabs", marks=pytest.mark.other_registries),
    ],
)
def behind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, Faults]]:
    """One that drops what came of a broken upload, and one that keeps it."""
    with (
        real_registry(tmp_path_factory.mktemp("registry"))
        if request.param == "docker-registry"
        else other_registry(request.param) as host,
        faulty_proxy(host) as (way, faults),
    ):
        yield host, way, faults


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return tiny_image(tmp_path / "model")


def straight(host: str, name: str) -> str | None:
    """Return what a tag names, asked without the proxy."""
    with Registry() as client:
        return client.digest_of(Reference.parse(f"{host}/{name}"))


def as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send small layers as large ones are sent: a part, and then its end."""
    monkeypatch.setattr("weightsmith.oci.uploads._SMALL", 0)


@pytest.mark.parametrize("seed", range(6))
def test_a_push_and_a_pull_through_a_storm(
    behind: tuple[str, str, Faults], image: Image, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, way, faults = behind
    if seed % 2:
        as_if_large(monkeypatch)
    source = random.Random(seed)
    places = [("HEAD", "/blobs/"), ("POST", "/uploads/"), ("PATCH PUT", "/uploads/"), ("GET", "/"),
              ("HEAD", "/manifests/"), ("PUT", "/manifests/")]  # fmt: skip
    faults.plan = [(*source.choice(places), source.choice(REPAIRABLE)) for _ in range(10)]
    name = f"storm/{seed}:1"
    place = Reference.parse(f"{way}/{name}")
    with Registry(pause=lambda _: None) as client:
        while straight(host, name) != image.digest:
            try:
                client.push(image, place)
            except WeightsmithError:
                # Patience ended: nothing may be visible, and the next push goes on.
                assert straight(host, name) is None
        back = client.pull(place, platform=AMD64)
        for ours, theirs in zip(image.layers, back.layers, strict=True):
            assert b"".join(ours.open()) == b"".join(theirs.open())
    faults.plan = []
