"""The registry client against a registry with faults, and transfers that break off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.values import Blob, Digest
from weightsmith.oci import layers
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Image
from weightsmith.oci.layers import BlobLayer, Member, TarLayer
from weightsmith.oci.layout import write_layout
from weightsmith.oci.manifests import OCI_INDEX, described, index_of
from weightsmith.oci.registry import Registry
from weightsmith.outside.registries import PushedLayers

from tests.fakes.images import entry as tar_entry
from tests.fakes.images import foreign_image, tar_of, tiny_image
from tests.fakes.registry import at, fake_registry


def about(image: Image, data: bytes = b"{}") -> Attachment:
    part = AttachmentPart.of_bytes(data, "application/json")
    return Attachment(artifact_type="a/b", subject=image.manifest_blob, parts=(part,))


def test_pushed_and_pulled_whole(fake, client, image):
    seen: list[tuple[int, int]] = []
    done = client.push(image, at(fake), progress=lambda n, total: seen.append((n, total)))
    assert done.digest == image.digest
    assert done.uploaded_bytes == sum(blob.size for blob, _ in image.blobs())
    assert seen[-1][0] == seen[-1][1] == sum(layer.size for layer in image.layers)
    assert fake.manifests["team/app", "1"][1] == image.manifest_bytes
    back = client.pull(at(fake), platform="linux/amd64")
    assert back.digest == image.digest
    for ours, theirs in zip(image.layers, back.layers, strict=True):
        assert b"".join(ours.open()) == b"".join(theirs.open())
        assert ours.file == theirs.file
    assert client.digest_of(at(fake)) == image.digest
    assert client.digest_of(at(fake, "team/app:none")) is None
    puts = [path for method, path in fake.log if method == "PUT" and "manifests" in path]
    assert puts == [f"/v2/team/app/manifests/{name}" for name in (image.digest, "1")]


def test_what_is_there_is_not_sent_again(fake, client, image):
    client.push(image, at(fake), also_tags=["1-again"])
    fake.log.clear()
    assert client.push(image, at(fake), also_tags=["1-again"]).uploaded_bytes == 0
    assert {path for _, path in fake.log} == {
        f"/v2/team/app/manifests/{t}" for t in ("1", "1-again")
    }
    assert set(fake.counts()) == {"HEAD", "GET"}


def test_an_image_that_is_gone_is_sent_again(fake, client, image):
    """Without its tag everything is looked for; with it, only if that is asked for."""
    client.push(image, at(fake))
    layer = ("team/app", image.layers[0].digest)
    del fake.blobs[layer], fake.manifests["team/app", "1"]
    assert client.push(image, at(fake)).uploaded_bytes == image.layers[0].size
    del fake.blobs[layer]
    assert client.push(image, at(fake)).uploaded_bytes == 0
    assert client.push(image, at(fake), force=True).uploaded_bytes == image.layers[0].size


def test_requests_share_a_connection(fake, client, image):
    client.push(image, at(fake))
    before = fake.connections
    for _ in range(5):
        assert client.digest_of(at(fake)) == image.digest
        assert client.digest_of(at(fake, "team/app:none")) is None
    assert fake.connections == before


def test_a_tag_is_moved_only_by_force(fake, client, image, tmp_path):
    client.push(image, at(fake))
    other = tiny_image(tmp_path / "model", annotations={"a": "b"})
    with pytest.raises(UsageError, match=r"team/app:1 ") as caught:
        client.push(other, at(fake))
    assert "--force" in caught.value.hint
    client.push(other, at(fake), force=True)
    assert client.digest_of(at(fake)) == other.digest


def test_a_tag_that_may_be_set_once(fake, client, image):
    fake.immutable_tags = True
    for force in (False, True):
        client.push(image, at(fake), force=force)
        assert client.digest_of(at(fake)) == image.digest


@pytest.mark.parametrize("status", ["415", "400"])
def test_manifests_that_an_old_registry_does_not_know(fake, client, image, status):
    fake.trouble, fake.faults = " MANIFEST_INVALID", [("PUT", "/manifests/", status)]
    with pytest.raises(EnvironmentFailure, match="bad moment") as caught:
        client.push(image, at(fake))
    assert "OCI manifests" in caught.value.hint
    client.push(image, at(fake))
    fake.faults = [("PUT", "/manifests/", status)]
    with pytest.raises(EnvironmentFailure, match="bad moment") as caught:
        client.attach(at(fake), about(image))
    assert "subject" in caught.value.hint


def test_what_is_attached_already_is_not_sent_again(fake, client, image):
    client.push(image, at(fake))
    old, new = about(image), about(image, b"[]")
    client.attach(at(fake), old)
    fake.log.clear()
    client.attach(at(fake), old, new)
    sent = [path for method, path in fake.log if method == "PUT" and "/manifests/" in path]
    assert f"/v2/team/app/manifests/{old.blob.digest}" not in sent
    found = client.attached(at(fake), image.digest)
    assert {blob.digest for blob, _ in found} == {old.blob.digest, new.blob.digest}
    fake.log.clear()
    client.attach(at(fake), old, new)
    lists = [path.rpartition("/")[2] for _, path in fake.log]
    assert lists == [image.digest, f"sha256-{image.digest.hex}"]
    del fake.manifests["team/app", old.blob.digest]
    client.attach(at(fake), old, every=True)
    assert ("team/app", old.blob.digest) in fake.manifests


def test_a_registry_that_fails_when_it_is_asked_for_a_list_gets_attachments(fake, client, image):
    client.push(image, at(fake))
    one = about(image)
    fake.faults = [("GET", "/referrers/", "500")] * 20
    client.attach(at(fake), one)
    fake.faults.clear()
    assert [blob.digest for blob, _ in client.attached(at(fake), image.digest)] == [one.blob.digest]


def test_layers_are_mounted_from_another_repository(fake, client, image):
    client.push(image, at(fake))
    fake.log.clear()
    done = client.push(image, at(fake, "team/other:1"), mount_from=["team/none", "team/app"])
    assert done.mounted == 4
    assert done.uploaded_bytes == image.config_blob.size
    assert not fake.uploads, "what a refused mount opened is closed"
    fake.mount_allowed = False
    done = client.push(image, at(fake, "team/third:1"), mount_from=["team/app"])
    assert (done.mounted, done.uploaded_bytes > 140_000) == (0, True)


def test_what_was_pushed_before_is_mounted(fake, tmp_path):
    memory = PushedLayers(tmp_path / "cache")
    fake.auth = "bearer"
    (tmp_path / "w").write_bytes(bytes(2 << 20))
    layer = TarLayer(members=(Member.of_file("/w", tmp_path / "w"),), epoch=0)
    image = Image(layers=(layer,), settings={})

    def push(name: str) -> tuple[int, int]:
        credentials = (fake.user, fake.password)
        with Registry(credentials=lambda _: credentials, memory=memory) as client:
            done = client.push(image, at(fake, name))
            return done.mounted, done.uploaded_bytes

    assert push("team/first:1")[0] == 0
    assert push("team/second:1") == (1, image.config_blob.size)
    fake.blobs = {key: data for key, data in fake.blobs.items() if key[0] == "nobody"}
    assert push("team/third:1") == (0, layer.size + image.config_blob.size)


def test_a_pulled_base_is_mounted_or_copied(fake, client, image):
    client.push(image, at(fake))
    pulled = client.pull(at(fake), platform="linux/amd64")
    assert client.push(pulled, at(fake, "else/app:1")).mounted == 4
    with fake_registry() as second:
        done = client.push(pulled, at(second))
        assert done.uploaded_bytes > 140_000
        assert second.manifests["team/app", "1"][1] == image.manifest_bytes


def test_a_layer_hashed_here_is_not_hashed_again_unless_its_file_changed(
    fake, client, tmp_path, monkeypatch
):
    (tmp_path / "w").write_bytes(bytes(3000))
    layer = TarLayer(members=(Member.of_file("/w", tmp_path / "w"),), epoch=0)
    known = TarLayer(members=layer.members, epoch=0, known_digest=layer.digest)
    checked = []
    plain = layers.verified

    def counting(chunks: Iterator[bytes], blob: Blob, *more: str) -> Iterator[bytes]:
        checked.append(blob.digest)
        return plain(chunks, blob, *more)

    monkeypatch.setattr(layers, "verified", counting)
    for number, each in enumerate((layer, known)):
        image = Image(layers=(each,), settings={})
        client.push(image, at(fake, f"team/{number}:1"))
        assert len(checked) == number
        write_layout(image, tmp_path / f"layout-{number}")
        assert len(checked) == 2 * number
    (tmp_path / "w").write_bytes(b"1" * 3000)
    for number, each in enumerate((layer, known)):
        with pytest.raises(InputRefused, match="does not match its digest"):
            client.push(Image(layers=(each,), settings={}), at(fake, f"other/{number}:1"))


@pytest.mark.parametrize("limits", [(1000, 0), (0, 50_000)])
def test_chunks_where_the_registry_asks(fake, client, image, limits, monkeypatch):
    monkeypatch.setattr("weightsmith.oci.transfers._CHUNK", 20_000)
    fake.chunk_min, fake.largest_body = limits
    client.push(image, at(fake))
    assert fake.counts()["PATCH"] >= 8
    assert client.pull(at(fake), platform="linux/amd64").digest == image.digest


@pytest.mark.parametrize("status", ["404", "405", "501"])
def test_a_registry_that_takes_a_blob_in_one_request_alone(
    fake, client, image, status, monkeypatch
):
    monkeypatch.setattr("weightsmith.oci.transfers._SMALL", 0)
    fake.faults = [("PATCH", "/uploads/", status)] * 9
    client.push(image, at(fake))
    assert client.pull(at(fake), platform="linux/amd64").digest == image.digest


def test_an_index_is_read_for_a_platform(fake, client, image):
    client.push(image, at(fake))
    row = described(image.manifest_blob)
    here, arm = ({"os": "linux", "architecture": name} for name in ("amd64", "arm64"))
    rows = [row | {"digest": "sha256:" + "0" * 64, "platform": arm}, row | {"platform": here}]
    pushed = client.push_manifest(at(fake, "team/app:all"), index_of(rows), OCI_INDEX)
    assert client.digest_of(at(fake, "team/app:all")) == pushed.digest
    assert client.pull(at(fake, "team/app:all"), platform="linux/amd64").digest == image.digest
    with pytest.raises(UsageError, match="s390x") as caught:
        client.pull(at(fake, "team/app:all"), platform="linux/s390x")
    assert "linux/amd64, linux/arm64" in caught.value.hint


def test_blobs_of_a_manifest_are_sent_beside_each_other(fake, client, image):
    both = threading.Barrier(2, timeout=60)

    def opener(blob: Blob) -> Iterator[bytes]:
        both.wait()  # until another is being sent, too
        yield bytes(blob.size)

    sizes = {Digest.of(bytes(size)): size for size in (5000, 7000)}
    blobs = [Blob(digest=d, size=size, media_type="a/b") for d, size in sizes.items()]
    seen: list[tuple[int, int]] = []
    done = client.push_manifest(
        at(fake),
        image.manifest_bytes,
        image.media_type,
        [(blob, partial(opener, blob)) for blob in (*blobs, blobs[0])],
        progress=lambda n, total: seen.append((n, total)),
    )
    assert done.uploaded_bytes == 12_000
    assert seen[-1] == (12_000, 12_000)


def test_a_docker_base_keeps_its_layers(fake, client):
    base = foreign_image(tar_of((tar_entry("bin/sh"), b"sh")), docker=True)
    client.push(base, at(fake, "base/engine:1"))
    pulled = client.pull(at(fake, "base/engine:1"), platform="linux/amd64")
    assert pulled.digest == base.digest
    assert pulled.layers[0].media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip"
    assert isinstance(pulled.layers[0], BlobLayer)


def test_a_mounted_layer_whose_size_is_stated_wrongly(fake, client, image):
    """Cloudflare's registry tells HEAD the size of its own link, and GET the blob's."""
    client.push(image, at(fake))
    fake.faults = [("HEAD", "/blobs/", "short")] * 5
    assert client.push(image, at(fake), force=True).uploaded_bytes == 0
    assert not fake.faults


@pytest.mark.parametrize("then", ["503", "norange"])
def test_a_broken_download_goes_on_where_it_stopped(fake, client, image, pauses, then):
    client.push(image, at(fake))
    pulled = client.pull(at(fake), platform="linux/amd64")
    fake.faults = [("GET", "/blobs/", "half"), ("GET", "/blobs/", then)]
    assert b"".join(pulled.layers[0].open()) == b"".join(image.layers[0].open())
    assert len(pauses) == (2 if then == "503" else 1)


@pytest.mark.parametrize("chunk_min", [0, 20_000])
def test_a_broken_upload_goes_on_where_the_registry_kept_it(
    fake, client, image, chunk_min, monkeypatch
):
    monkeypatch.setattr("weightsmith.oci.transfers._CHUNK", 20_000)
    fake.chunk_min = chunk_min
    method = "PATCH" if chunk_min else "PUT"
    fake.faults = [(method, "/uploads/", "keep:10001")] + [("PATCH", "/uploads/", "keep:777")] * 9
    sent: list[int] = []
    client.push(image, at(fake), parallel=1, progress=lambda done, _: sent.append(done))
    assert not fake.faults
    opened = sum(1 for m, path in fake.log if m == "POST")
    assert opened == len(list(image.blobs())), "no upload was begun a second time"
    assert client.digest_of(at(fake)) == image.digest
    for layer in client.pull(at(fake), platform="linux/amd64").layers:
        b"".join(layer.open())


def test_a_registry_that_kept_something_else(fake, client, image, monkeypatch):
    """What it kept is not what was sent: the layer starts again, and comes whole."""
    fake.faults = [("PUT", "/uploads/", "keep:30000"), ("GET", "/uploads/", "spoil")]
    client.push(image, at(fake))
    assert client.digest_of(at(fake)) == image.digest
    assert not fake.faults


@pytest.mark.parametrize("stays", [False, True])
def test_a_registry_that_has_half_of_a_layer(fake, client, image, stays):
    """Pulp keeps what came of an upload that broke off under the digest of the whole."""
    layer = image.layers[0]
    fake.blobs["team/app", layer.digest] = b"".join(layer.open())[:30_000]
    fake.keeps_first = stays
    if stays:
        with pytest.raises(EnvironmentFailure, match=f"30000 of its {layer.size} bytes") as caught:
            client.push(image, at(fake))
        assert "delete" in caught.value.hint
        assert client.digest_of(at(fake)) is None
    else:
        client.push(image, at(fake))
        assert len(fake.blobs["team/app", layer.digest]) == layer.size


def test_a_large_blob_is_a_part_first(fake, client, tmp_path):
    """Of a broken whole some registries keep what came as if it were all."""
    (tmp_path / "w").write_bytes(bytes(2 << 20))
    layer = TarLayer(members=(Member.of_file("/w", tmp_path / "w"),), epoch=0)
    fake.faults = [("PATCH", "/uploads/", "keep:1000000"), ("PATCH", "/uploads/", "reset")]
    client.push(Image(layers=(layer,), settings={}), at(fake))
    assert len(fake.blobs["team/app", layer.digest]) == layer.size
    assert not fake.faults


def test_a_failed_layer_stops_the_others(fake, client, tmp_path):
    before = threading.active_count()
    layers = tuple(
        TarLayer(members=(Member("/w", 5, 0o644, tmp_path / f"{n}"),)) for n in range(20)
    )
    with pytest.raises(InputRefused, match="changed"):
        client.push(Image(layers=layers, settings={"os": "linux"}), at(fake), parallel=3)
    assert threading.active_count() <= before + 10
    assert not fake.manifests
