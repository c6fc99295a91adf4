"""What registries refuse is refused before anything is sent; a layer too slow for one is told."""

from __future__ import annotations

import itertools
import re

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.core.values import Blob, Digest
from weightsmith.oci.image import Image
from weightsmith.oci.layers import BlobLayer
from weightsmith.oci.limits import RegistryLimits, UploadDeadline, limits_of
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.serving.memory import parse_size

from tests.fakes.images import tiny_image

MB = 10**6
SLOW = RegistryLimits(name="Slow Registry", hosts="", upload_seconds=600, source="")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com", "Amazon ECR, private"),
        ("123456789012.dkr-ecr.eu-west-1.on.aws", "Amazon ECR, private"),
        ("public.ecr.aws", "Amazon ECR Public"),
        ("GHCR.io", "GitHub Container Registry"),
        ("ghcr.io", "GitHub Container Registry"),
        ("europe-west1-docker.pkg.dev", "Google Artifact Registry"),
        ("eu.gcr.io", "Google Artifact Registry"),
        ("team.azurecr.io", "Azure Container Registry"),
        ("docker.io", "Docker Hub"),
        ("registry.gitlab.com", "GitLab"),
        ("harbor.example.com", ""),
        ("ghcr.io.example.com", ""),
    ],
)
def test_known_by_its_host(host, name):
    found = limits_of(host)
    assert (found.name if found else "") == name


def test_a_layer_that_is_too_large_is_refused_first():
    digest = Digest.of(b"x")
    blob = Blob(digest=digest, size=11 * 10**9, media_type="application/vnd.oci.image.layer.v1.tar")
    layer = BlobLayer(blob=blob, diff_id=digest, opener=lambda: iter(()), file="models/big")
    place = Reference.parse("ghcr.io/a/b:1")
    with Registry() as client:
        with pytest.raises(UsageError, match="models/big has 110") as caught:
            client.push(Image(layers=(layer,), settings={}), place)
        with pytest.raises(UsageError, match=f"{digest.short} has 110"):
            client.push_manifest(place, b"{}", "a/b", [(blob, lambda: iter(()))])
    assert "--max-layer-size" in caught.value.hint


def told(limits: RegistryLimits | None, size: int, rate: float) -> list[str]:
    """What is said of two layers of `size` MB, of which `rate` MB go in a second."""
    said: list[str] = []
    deadline = UploadDeadline(limits, said.append, (n / rate for n in itertools.count()).__next__)
    for file in ("a.safetensors", "b.safetensors"):
        sent = deadline.over(lambda: itertools.repeat(bytes(MB), size), size * MB, file)()
        assert sum(map(len, sent)) == size * MB
    return said


@pytest.mark.parametrize(("rate", "advised"), [(0.5, "240MB"), (0.25, "120MB"), (4.0, "1.9GB")])
def test_too_slow_by_its_own_rate(rate, advised):
    (said,) = told(SLOW, int(rate * 700), rate)
    assert f"a.safetensors will take about 12 minutes at {rate:.1f} MB/s" in said
    assert "Slow Registry ends uploads after 10" in said
    assert f"--max-layer-size {advised} " in said
    assert parse_size(advised) / MB / rate < 600


def test_fast_enough_or_without_a_limit():
    cases = [(SLOW, 290), (SLOW, 10), (None, 400), (limits_of("registry.gitlab.com"), 400)]
    assert [told(limits, size, 0.5) for limits, size in cases] == [[]] * 4


def test_warned_before_half_of_the_time_is_over():
    now: list[float] = [0.0]
    said: list[float] = []
    deadline = UploadDeadline(limits_of("ghcr.io"), lambda _: said.append(now[0]), lambda: now[0])
    for _ in deadline.over(lambda: itertools.repeat(bytes(MB), 2000), 2000 * MB)():
        now[0] += 1
    assert said
    assert said[0] < 60


def test_a_push_tells_it(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("weightsmith.oci.registry.limits_of", lambda _: SLOW)
    image = tiny_image(tmp_path / "model")
    said: list[str] = []
    clock = itertools.count(0, 1000).__next__
    with Registry(pause=lambda _: None, clock=lambda: float(clock())) as client:
        client.push(image, Reference.parse(f"{fake.host}/a/b:1"), warn=said.append)
    assert len(said) == 1
    assert re.search(r"^\S.* will take about \d+ minutes", said[0])
