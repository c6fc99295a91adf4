"""One suite for the fake registry and for those that others wrote, so that the fake stays true."""

import os
import socket
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.values import Blob, Digest
from weightsmith.oci.image import Image
from weightsmith.oci.layers import BlobLayer, Layer, Member, TarLayer
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

from tests.fakes.auth_server import PASSWORD, USER, make_certificate, token_server
from tests.fakes.images import tiny_image
from tests.fakes.real_registries import Given, real_registry, stop_registry
from tests.faults.relay import pass_on

AMD64 = "linux/amd64"


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return tiny_image(tmp_path / "model")


def test_push_and_pull(client: Registry, place: Reference, image: Image) -> None:
    assert client.digest_of(place) is None
    with pytest.raises(InputRefused, match="404"):
        client.pull(place)
    done = client.push(image, place)
    assert done.uploaded_bytes == sum(blob.size for blob, _ in image.blobs())
    back = client.pull(place, platform=AMD64)
    assert back.digest == image.digest == client.digest_of(place)
    for ours, theirs in zip(image.layers, back.layers, strict=True):
        assert b"".join(ours.open()) == b"".join(theirs.open())
    assert client.push(image, place).uploaded_bytes == 0


def test_mounted_from_another_repository(
    there: Given, client: Registry, place: Reference, image: Image
) -> None:
    client.push(image, place)
    other = Reference.parse(f"{place.name}-other:1")
    done = client.push(image, other, mount_from=["nobody/none", place.repository])
    expected = (0, 0) if there.pools_blobs else (4, image.config_blob.size)
    assert (done.mounted, done.uploaded_bytes) == expected
    again = client.push(image, other)
    assert (again.mounted, again.uploaded_bytes) == (0, 0)


def test_any_manifest(client: Registry, place: Reference, image: Image) -> None:
    blob = image.config_blob
    pairs = [*image.blobs()]
    digest = client.push_manifest(place, image.manifest_bytes, image.media_type, pairs).digest
    assert client.read_manifest(place.at(digest)) == (image.manifest_bytes, image.media_type)
    assert blob.digest == client.pull(place, platform=AMD64).config_blob.digest


def test_bytes_that_are_not_what_they_should_be(client: Registry, place: Reference) -> None:
    layer = TarLayer(members=(Member.of_bytes("/a", b"1"),), known_digest=Digest.of(b"other"))
    with pytest.raises(InputRefused, match=r"sha256|digest"):
        client.push(Image(layers=(layer,), settings={}), place)
    assert client.digest_of(place) is None


def _slowly(layer: TarLayer, act: Callable[[], None]) -> Layer:
    """Return the layer again, with something that happens in the middle of its upload."""

    def chunks() -> Iterator[bytes]:
        for n, chunk in enumerate(layer.open()):
            yield chunk
            if n == 3:
                act()

    blob = Blob(digest=layer.digest, size=layer.size, media_type=layer.media_type)
    return BlobLayer(blob=blob, diff_id=layer.diff_id, opener=chunks)


def _large(folder: Path) -> TarLayer:
    (folder / "w").write_bytes(os.urandom(16 << 20))
    return TarLayer(members=(Member.of_file("/w", folder / "w"),), epoch=0)


@pytest.mark.registry
def test_a_registry_that_dies_in_the_middle(tmp_path: Path) -> None:
    layer = _large(tmp_path)
    with real_registry(tmp_path) as host, Registry(pause=lambda _: None) as client:
        place = Reference.parse(f"{host}/a/b:1")
        stopped = _slowly(layer, lambda: stop_registry(host))
        with pytest.raises(EnvironmentFailure, match="does not answer") as caught:
            client.push(Image(layers=(stopped,), settings={}), place)
    assert "run it again" in caught.value.hint


@pytest.mark.registry
@pytest.mark.root
def test_a_registry_without_room(tmp_path: Path) -> None:
    layer = _large(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounts are not allowed here")
    try:
        with (
            real_registry(disk) as host,
            Registry(pause=lambda _: None) as client,
            pytest.raises(EnvironmentFailure, match="500") as caught,
        ):
            client.push(Image(layers=(layer,), settings={}), Reference.parse(f"{host}/a/b:1"))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "full" in caught.value.hint


def test_in_chunks(
    client: Registry, place: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask for chunks by ourselves, where the registry does not: some do only behind a proxy."""
    import httpx

    plain = httpx.Client.send

    def asking(self: httpx.Client, request: httpx.Request, **options: object) -> httpx.Response:
        response = plain(self, request, **options)  # type: ignore[arg-type]
        if request.method == "POST":
            response.headers.setdefault("OCI-Chunk-Min-Length", "1000")
        return response

    monkeypatch.setattr(httpx.Client, "send", asking)
    monkeypatch.setattr("weightsmith.oci.transfers._CHUNK", 5 << 20)
    image = Image(layers=(_large(tmp_path),), settings={})
    client.push(image, place)
    (back,) = client.pull(place, platform="").layers
    assert b"".join(back.open()) == b"".join(image.layers[0].open())


@pytest.mark.registry
def test_tls_is_verified(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_certificate(tmp_path, "registry")
    with real_registry(tmp_path, tls=pair) as host:
        place = Reference.parse(f"{host}/a/b:1")
        with Registry() as client, pytest.raises(EnvironmentFailure, match="certificate") as caught:
            client.check_push(place)
        assert "SSL_CERT_FILE" in caught.value.hint
        with Registry(insecure=True) as client:
            client.push(image, place)
        monkeypatch.setenv("SSL_CERT_FILE", str(pair[1]))
        with Registry() as client:
            assert client.pull(place, platform=AMD64).digest == image.digest
            assert client.push(image, place).uploaded_bytes == 0


@contextmanager
def tunnel_proxy(target: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a proxy that leads to `target`, whatever it is asked for; yield its host, and what
    it was asked."""
    host, _, port = target.rpartition(":")
    heads: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            head = b""
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                head += line
            heads.append(head.decode())
            with socket.create_connection((host, int(port))) as there:
                self.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=pass_on, args=(there, self.connection), daemon=True)
                back.start()
                pass_on(self.connection, there)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", heads
        server.shutdown()


@pytest.mark.registry
def test_through_a_proxy_with_a_password(
    tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_certificate(tmp_path, "registry")
    place = Reference.parse("registry.test:5000/team/app:1")
    with real_registry(tmp_path, tls=pair) as host, tunnel_proxy(host) as (proxy, asked):
        monkeypatch.setenv("HTTPS_PROXY", f"http://ann:{PASSWORD}@{proxy}")
        monkeypatch.setenv("NO_PROXY", "localhost,::1,fd00::/8,10.0.0.0/8")
        with Registry() as client, pytest.raises(EnvironmentFailure, match="certificate"):
            client.check_push(place)
        monkeypatch.setenv("SSL_CERT_FILE", str(pair[1]))
        with Registry() as client:
            client.push(image, place)
            assert client.pull(place, platform=AMD64).digest == image.digest
    assert all(head.startswith("CONNECT registry.test:5000 ") for head in asked)
    assert all("proxy-authorization: basic " in head.lower() for head in asked)


@pytest.mark.registry
def test_tokens_over_tls(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_certificate(tmp_path, "registry")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[1]))
    with (
        token_server(tmp_path) as tokens,
        real_registry(tmp_path, tls=pair, tokens=(tokens.url, tokens.certificate)) as host,
    ):
        place = Reference.parse(f"{host}/team/app:1")
        with Registry(credentials=lambda _: (USER, PASSWORD)) as client:
            client.push(image, place)
            other = Reference.parse(f"{host}/team/other:1")
            done = client.push(image, other, mount_from=["team/app"])
            assert done.mounted == len(image.layers)
            assert client.pull(other, platform=AMD64).digest == image.digest
        assert any("repository%3Ateam%2Fapp%3Apull" in path for path in tokens.asked)
        wrong = Registry(credentials=lambda _: (USER, "wr0ng"))
        with wrong, pytest.raises(EnvironmentFailure, match="401") as caught:
            wrong.check_push(place)
        assert "docker login" in caught.value.hint
        assert "wr0ng" not in f"{caught.value} {caught.value.hint}"
