"""What registries are known to refuse is refused before anything is sent."""

from __future__ import annotations

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.core.values import Blob, Digest
from weightsmith.oci.image import Image
from weightsmith.oci.layers import BlobLayer
from weightsmith.oci.limits import REGISTRIES, limits_of
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry


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
def test_known_by_its_host(host: str, name: str) -> None:
    found = limits_of(host)
    assert (found.name if found else "") == name


def test_every_figure_has_a_source() -> None:
    assert all(limits.source.startswith("https://") for limits in REGISTRIES)


def test_a_layer_that_is_too_large_is_refused_first() -> None:
    digest = Digest.of(b"x")
    blob = Blob(digest=digest, size=11 * 10**9, media_type="application/vnd.oci.image.layer.v1.tar")
    layer = BlobLayer(blob=blob, diff_id=digest, opener=lambda: iter(()), file="models/big")
    with (
        Registry() as client,
        pytest.raises(UsageError, match="models/big has 110") as caught,
    ):
        client.push(Image(layers=(layer,), settings={}), Reference.parse("ghcr.io/a/b:1"))
    assert "--max-layer-size" in caught.value.hint
    place = Reference.parse("ghcr.io/a/b:1")
    with Registry() as client, pytest.raises(UsageError, match=f"{digest.short} has 110"):
        client.push_manifest(place, b"{}", "a/b", [(blob, lambda: iter(()))])
