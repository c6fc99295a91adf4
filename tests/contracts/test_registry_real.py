"""One suite for the fake registry and for Debian's docker-registry, so that the fake stays true."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.debian_registry import real_registry
from tests.fakes.images import entry, foreign_image, tar_of, tiny_image
from tests.fakes.registry import fake_registry
from toolchain.errors import InputRefused, UsageError
from toolchain.oci.image import Image, ImageConfig, assemble
from toolchain.oci.layers import Member, TarLayer
from toolchain.oci.references import Reference
from toolchain.oci.registry import Registry
from toolchain.values import Digest

AMD64 = "linux/amd64"


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.registry)])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "fake":
        with fake_registry() as state:
            yield state.host
        return
    if not shutil.which("docker-registry"):
        pytest.skip("docker-registry is not installed")
    with real_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture
def client() -> Iterator[Registry]:
    with Registry(pause=lambda _: None) as registry:
        yield registry


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return tiny_image(tmp_path / "model")


@pytest.fixture
def place(host: str, request: pytest.FixtureRequest) -> Reference:
    """A repository of this test's own."""
    name = request.node.originalname.replace("_", "-")
    return Reference.parse(f"{host}/{name}/app:1")


def test_push_and_pull(client: Registry, place: Reference, image: Image) -> None:
    done = client.push(image, place)
    assert done.uploaded_bytes == sum(blob.size for blob, _ in image.blobs())
    back = client.pull(place, platform=AMD64)
    assert back.digest == image.digest == client.digest_of(place)
    for ours, theirs in zip(image.layers, back.layers, strict=True):
        assert b"".join(ours.open()) == b"".join(theirs.open())
    assert client.push(image, place).uploaded_bytes == 0


def test_what_is_not_there(client: Registry, place: Reference) -> None:
    assert client.digest_of(place) is None
    with pytest.raises(InputRefused, match="404"):
        client.pull(place)


def test_tags_move_only_by_force(
    client: Registry, place: Reference, image: Image, tmp_path: Path
) -> None:
    client.push(image, place)
    other = tiny_image(tmp_path / "model", annotations={"a": "b"})
    with pytest.raises(UsageError):
        client.push(other, place)
    assert client.push(other, place, force=True).digest == client.digest_of(place)


def test_mounted_from_another_repository(client: Registry, place: Reference, image: Image) -> None:
    client.push(image, place)
    other = Reference.parse(f"{place.name}-other:1")
    done = client.push(image, other, mount_from=["nobody/none", place.repository])
    assert (done.mounted, done.uploaded_bytes) == (4, image.config_blob.size)


def test_rebased_without_weight_bytes(client: Registry, place: Reference, tmp_path: Path) -> None:
    weights = TarLayer(members=(Member.of_bytes("/models/w", bytes(1 << 20)),), epoch=0)
    bases = [
        foreign_image(tar_of((entry("engine"), version)), docker=docker)
        for version, docker in ((b"1", False), (b"2", True))
    ]
    for n, base in enumerate(bases):
        client.push(base, Reference.parse(f"{place.name}-base:{n}"))
    first = assemble([weights], config=ImageConfig(), base=bases[0], epoch=0)
    client.push(first, place)
    pulled = client.pull(place, platform=AMD64)
    onto = client.pull(Reference.parse(f"{place.name}-base:1"), platform=AMD64)
    second = assemble([pulled.layers[1]], config=ImageConfig(), base=onto, epoch=0)
    done = client.push(second, Reference.parse(f"{place.name}:2"))
    assert done.mounted == 1
    assert done.uploaded_bytes < 2000
    assert second.layers[1].digest == weights.digest


def test_any_manifest(client: Registry, place: Reference, image: Image) -> None:
    blob = image.config_blob
    pairs = [*image.blobs()]
    digest = client.push_manifest(place, image.manifest_bytes, image.media_type, pairs)
    assert client.read_manifest(place.at(digest)) == (image.manifest_bytes, image.media_type)
    assert blob.digest == client.pull(place, platform=AMD64).config_blob.digest


def test_bytes_that_are_not_what_they_should_be(client: Registry, place: Reference) -> None:
    layer = TarLayer(members=(Member.of_bytes("/a", b"1"),), known_digest=Digest.of(b"other"))
    with pytest.raises(InputRefused, match="not what their digest says"):
        client.push(Image(layers=(layer,), settings={}), place)


def test_in_chunks(
    client: Registry, place: Reference, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask for chunks by ourselves: a real registry asks only behind some proxies."""
    import httpx

    plain = httpx.Client.send

    def asking(self: httpx.Client, request: httpx.Request, **options: object) -> httpx.Response:
        response = plain(self, request, **options)  # type: ignore[arg-type]
        if request.method == "POST":
            response.headers["OCI-Chunk-Min-Length"] = "1000"
        return response

    monkeypatch.setattr(httpx.Client, "send", asking)
    monkeypatch.setattr("toolchain.oci.uploads._CHUNK", 20_000)
    client.push(image, place)
    assert client.digest_of(place) == image.digest
